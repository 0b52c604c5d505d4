"""The world in three steps: control plane, meeting under watch, process group."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from hpctrain.config.schema import LaunchSection
from hpctrain.errors import HpctrainError, LaunchError
from hpctrain.launch.discovery import discover
from hpctrain.launch.failure import Guard, guard
from hpctrain.launch.group_store import group_store, own_interface
from hpctrain.launch.launchers import Claim, this_process
from hpctrain.launch.limits import prepare_nccl, raise_open_files
from hpctrain.launch.loading import loading
from hpctrain.launch.nccl_log import NcclLog
from hpctrain.launch.rendezvous import Meeting, meet
from hpctrain.launch.single import SingleCommunicator
from hpctrain.launch.surroundings import (
    check_own_place,
    look_around_alone,
    spare_login_node,
    take_place,
)
from hpctrain.launch.uncaught import end_quietly_if_uncaught
from hpctrain.launch.voice import telling
from hpctrain.launch.watchdog.gathering import watched
from hpctrain.launch.watchdog.pulse import Pulse
from hpctrain.topology import Communicator, Topology, closing_together
from hpctrain.utils.streams import quiet_native_libraries

if TYPE_CHECKING:
    import torch
    from mpi4py.MPI import Intracomm


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A proven world, ready to train in.

    Attributes:
        backend: of the default process group, which a world of one process has too; None where a
            preflight goes on without.
        pulse: heartbeats. From the first one on, `launch.hang_timeout_seconds` holds: a loop of
            your own calls `world.pulse.step_done(step)` after every step, or never.
        nccl_log: what NCCL says of its way; None where it does not run, or the user has said how it
            is to log.
    """

    topology: Topology
    communicator: Communicator
    device: torch.device
    backend: str | None
    pulse: Pulse = field(default_factory=Pulse)
    nccl_log: NcclLog | None = None


@contextmanager
def control_plane(
    claim: Claim | None = None, part: Intracomm | None = None
) -> Iterator[tuple[Topology, Communicator]]:
    """Find out who and where all ranks are, and connect them for messages.

    Collective: all ranks. Does not import torch where MPI started the job, so that what every
    rank has to know can be checked and shared first.

    Args:
        claim: what the launcher says of this process; None: asked here.
        part: mpi4py's communicator of the ranks that are meant, where they are not all.

    Raises:
        LaunchError: if the launcher's claim is broken, MPI sees another world, or some ranks do
            not come.
    """
    quiet_native_libraries()  # read when torch is loaded, which comes next
    raise_open_files()
    if part is not None:
        from hpctrain.launch.mpi import claim_of_part, mpi_part

        with mpi_part(part) as over_part:
            topology = discover(claim_of_part(over_part), over_part, mpi=over_part.library)
            yield _placed(topology), over_part
        return
    claim = this_process() if claim is None else claim
    if claim.launcher is None:
        look_around_alone()
        # Without a launcher MPI is not even imported: MPI_Init aborts on some login nodes.
        alone = SingleCommunicator()
        yield _placed(discover(claim, alone, mpi=None)), alone
        return
    check_own_place(claim.launcher, claim.world_size)
    if claim.needs_mpi:
        from hpctrain.launch.mpi import mpi_world

        with mpi_world(claim) as over_mpi:
            topology = discover(claim, over_mpi, mpi=over_mpi.library, program=over_mpi.program)
            yield _placed(topology), over_mpi
    else:
        from hpctrain.launch.store import store_world

        with store_world(claim) as over_store:
            yield _placed(discover(claim, over_store, mpi=None)), over_store


@contextmanager
def gathering(
    topology: Topology, communicator: Communicator, section: LaunchSection, keeper: Guard
) -> Iterator[Meeting | None]:
    """Agree where to meet, and have watchdogs watch over all ranks. Collective: all ranks.

    Needs no torch: from here on no rank is lost unnoticed while the others still load it.

    Gives:
        The proven address of rank 0; None in a world of one process.

    Raises:
        LaunchError: on every rank, if some node cannot reach rank 0's.
    """
    if topology.world_size == 1:
        yield None
        return
    meeting = meet(topology, communicator, interface=section.interface, ip=section.address)
    with watched(
        topology,
        communicator,
        meeting,
        keeper.pulse,
        hang_timeout_seconds=section.hang_timeout_seconds,
        first_step_timeout_seconds=section.first_step_timeout_seconds,
    ) as member:
        if member is not None:
            keeper.watched_by(member)
        # What takes long from here on is for the watchdog to judge.
        communicator.limit(None)
        yield meeting


@contextmanager
def process_group(
    topology: Topology,
    communicator: Communicator,
    section: LaunchSection,
    meeting: Meeting | None,
    keeper: Guard,
) -> Iterator[World]:
    """Choose the device and initialise torch.distributed. Collective: all ranks.

    Raises:
        LaunchError: on every rank, if devices or network cannot carry the world.
    """
    with loading():
        import torch
        from torch import distributed as dist

        from hpctrain.launch.cores import set_threads
        from hpctrain.launch.device import choose_backend, choose_device

    # Until the first heartbeat the watchdog waits for those who load.
    communicator.limit(section.first_step_timeout_seconds)
    device = choose_device(section, topology, communicator)
    set_threads(communicator, topology)
    keeper.runs_on(str(device))
    backend = choose_backend(section, device)
    # Longer than the watchdog's limits, which can say more about who is late.
    timeout = timedelta(
        seconds=60 + 2 * max(section.hang_timeout_seconds, section.first_step_timeout_seconds)
    )
    prepare_nccl(timeout.total_seconds(), has_flight_recorder=torch.__version__ >= "2.9")
    nccl_log = NcclLog.begin() if backend == "nccl" and meeting is not None else None
    # Of one process somebody else may have made the group: a notebook, a test beside ours.
    is_ours = topology.world_size > 1 or not dist.is_initialized()
    if is_ours:
        with own_interface(meeting):
            dist.init_process_group(
                backend,
                store=group_store(topology, meeting, section, timeout),
                rank=topology.rank,
                world_size=topology.world_size,
                timeout=timeout,
                # Its communicator is made at once; one process mostly needs none.
                device_id=device if backend in ("nccl", "xccl") and meeting is not None else None,
            )

    def close() -> None:
        if not is_ours:
            return
        # A DDP model in a reference cycle would outlive its process group and abort at exit.
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
        if nccl_log is not None:
            nccl_log.close()
        # Rank 0 holds the store: it stays until everybody has taken leave.
        communicator.barrier()

    communicator.limit(None)
    keeper.wait_until_watched()
    with closing_together(communicator, close):
        yield World(
            topology=topology,
            communicator=communicator,
            device=device,
            backend=backend,
            pulse=keeper.pulse,
            nccl_log=nccl_log,
        )
        keeper.leaving()


@contextmanager
def connect(
    section: LaunchSection | None = None, *, communicator: Intracomm | None = None
) -> Iterator[World]:
    """Make the world of this job and give it, ready for a training loop of your own.

    Collective: all ranks. On leaving, the process group is destroyed and MPI finalized, where MPI
    was not up before. An exception of one rank ends the whole job, with its traceback; in a world
    of one process it is the caller's to catch. `sys.exit(0)` leaves as the end of the body does.

    Example:
        >>> with hpctrain.connect() as world:
        ...     model = DistributedDataParallel(model.to(world.device))

    Args:
        section: of the launch; None: as a config without one has it.
        communicator: mpi4py's, of the ranks that train, where an mpirun has started others too,
            such as a simulation; None: all ranks. A failure ends all that mpirun has started.

    Raises:
        LaunchError: if the processes cannot form one world.
    """
    section = section or LaunchSection()
    success: SystemExit | None = None
    try:
        with (
            _alone_in_this_process(),
            control_plane(part=communicator) as (topology, messages),
            guard(topology, is_callers=True) as keeper,
            # One process tells nothing: its failure may be caught.
            telling(topology.is_rank_zero) if topology.world_size > 1 else nullcontext(),
            gathering(topology, messages, section, keeper) as meeting,
            process_group(topology, messages, section, meeting, keeper) as world,
        ):
            try:
                yield world
            except SystemExit as asked:
                if asked.code not in (0, None):
                    raise
                success = asked
    except HpctrainError as error:
        end_quietly_if_uncaught(error)
        raise
    if success is not None:
        raise success


_in_use = threading.Lock()


@contextmanager
def _alone_in_this_process() -> Iterator[None]:
    """Refuse a second world beside one that is in use: device, process group and MPI are one.

    Raises:
        LaunchError: if this process is in a world already.
    """
    if not _in_use.acquire(blocking=False):
        raise LaunchError(
            "connect() was called while another connect() of this process is in use: leave that "
            "first, or hand its world on.",
            everywhere=True,
        )
    try:
        yield
    finally:
        _in_use.release()


def _placed(topology: Topology) -> Topology:
    """Return the topology, now that this process has its place."""
    if topology.world_size > 1:
        take_place()
    spare_login_node(topology)
    return topology
