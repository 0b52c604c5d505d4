"""The world in three steps: control plane, meeting under watch, process group."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.config.choices import is_preparing
from hpctrain.config.schema import LaunchSection
from hpctrain.errors import HpctrainError, LaunchError
from hpctrain.launch.communicators import SingleCommunicator
from hpctrain.launch.environment import Claim, this_process
from hpctrain.launch.failure import (
    Guard,
    Standing,
    end_quietly_if_uncaught,
    guard,
    standing,
    stands,
)
from hpctrain.launch.nccl_log import NcclLog, prepare_nccl
from hpctrain.launch.placement import discover
from hpctrain.launch.rendezvous import Meeting, meet
from hpctrain.launch.reporter import reporting
from hpctrain.launch.surroundings import (
    check_own_place,
    look_around_alone,
    spare_login_node,
    take_place,
)
from hpctrain.launch.watchdog.client import Pulse
from hpctrain.launch.watchdog.start import watched
from hpctrain.topology import Communicator, Topology, closing_together
from hpctrain.utils.proc import most_open_files, raise_open_files
from hpctrain.utils.streams import quiet_native_libraries

if TYPE_CHECKING:
    import torch
    from mpi4py.MPI import Intracomm
    from torch import distributed as dist

_LOOPBACK = Path("/sys/class/net/lo")
_FEW_FILES = 256


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
        guard: ends the job for a failure of this rank alone, and learns the run folder.
    """

    topology: Topology
    communicator: Communicator
    device: torch.device
    backend: str | None
    pulse: Pulse = field(default_factory=Pulse)
    nccl_log: NcclLog | None = None
    guard: Guard | None = None


@contextmanager
def control_plane(
    claim: Claim | None = None, part: Intracomm | None = None, *, keep_mpi: bool = False
) -> Iterator[tuple[Topology, Communicator]]:
    """Find out who and where all ranks are, and connect them for messages.

    Collective: all ranks. Does not import torch where MPI started the job, so that what every
    rank has to know can be checked and shared first.

    Args:
        claim: what the launcher says of this process; None: asked here.
        part: mpi4py's communicator of the ranks that are meant, where they are not all.
        keep_mpi: leave MPI up for further worlds of this process.

    Raises:
        LaunchError: if the launcher's claim is broken, MPI sees another world, or some ranks do
            not come.
    """
    quiet_native_libraries()  # read when torch is loaded, which comes next
    raise_open_files()
    if part is None and (around := standing()) is not None:
        yield around.topology, around.communicator
        return
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

        with mpi_world(claim, keep=keep_mpi) as over_mpi:
            topology = discover(claim, over_mpi, mpi=over_mpi.library, program=over_mpi.program)
            if topology.world_size == 1:
                look_around_alone(claim.launcher)
            yield _placed(topology), over_mpi
    else:
        from hpctrain.launch.store import store_world

        with store_world(claim) as over_store:
            yield _placed(discover(claim, over_store, mpi=None)), over_store


@contextmanager
def gathering(
    topology: Topology, communicator: Communicator, section: LaunchSection, job_guard: Guard
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
    if (around := standing()) is not None and around.communicator is communicator:
        # They are watched already. Those that take their time in the program are waited for.
        meeting = meet(topology, communicator, interface=section.interface, ip=section.address)
        job_guard.entering(section)
        yield meeting
        job_guard.outside()
        return
    meeting = meet(topology, communicator, interface=section.interface, ip=section.address)
    with watched(
        topology,
        communicator,
        meeting,
        job_guard.pulse,
        hang_timeout_seconds=section.hang_timeout_seconds,
        first_step_timeout_seconds=section.first_step_timeout_seconds,
    ) as client:
        if client is not None:
            job_guard.watched_by(client)
        # What takes long from here on is for the watchdog to judge.
        communicator.limit(None)
        yield meeting


@contextmanager
def process_group(
    topology: Topology,
    communicator: Communicator,
    section: LaunchSection,
    meeting: Meeting | None,
    job_guard: Guard,
) -> Iterator[World]:
    """Choose the device and initialise torch.distributed. Collective: all ranks.

    Raises:
        LaunchError: on every rank, if devices or network cannot carry the world.
    """
    with loading():
        import torch
        from torch import distributed as dist

        from hpctrain.launch.device import choose_backend, choose_device, set_threads

    # Until the first heartbeat the watchdog waits for those who load.
    communicator.limit(section.first_step_timeout_seconds)
    device = choose_device(section, topology, communicator)
    set_threads(communicator, topology)
    job_guard.runs_on(str(device))
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
    job_guard.wait_until_watched()
    with closing_together(communicator, close):
        yield World(
            topology=topology,
            communicator=communicator,
            device=device,
            backend=backend,
            pulse=job_guard.pulse,
            nccl_log=nccl_log,
            guard=job_guard,
        )
        job_guard.leaving()


@contextmanager
def connect(
    section: LaunchSection | None = None, *, communicator: Intracomm | None = None
) -> Iterator[World]:
    """Make the world of this job and give it, ready for a training loop of your own.

    Collective: all ranks. On leaving, the process group is destroyed and MPI finalized, where MPI
    was not up before. An exception of one rank ends the whole job, with its traceback; in a world
    of one process it is the caller's to catch. `sys.exit(0)` leaves as the end of the body does,
    and so does a SystemExit that all ranks share, by an attribute `everywhere`. Under `python -m
    hpctrain prepare` it ends the program, which has fetched by then what it needs.

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
    if is_preparing():
        sys.stderr.write("hpctrain: prepared up to hpctrain.connect(): nothing is trained here\n")
        raise SystemExit(0)
    section = section or LaunchSection()
    ending: SystemExit | None = None
    try:
        with (
            alone_in_this_process(),
            control_plane(part=communicator) as (topology, messages),
            guard(topology, is_callers=True) as job_guard,
            # One process reports nothing: its failure may be caught.
            reporting(topology.is_rank_zero) if topology.world_size > 1 else nullcontext(),
            gathering(topology, messages, section, job_guard) as meeting,
            process_group(topology, messages, section, meeting, job_guard) as world,
        ):
            try:
                yield world
            except SystemExit as asked:
                if asked.code not in (0, None) and not getattr(asked, "everywhere", False):
                    raise
                ending = asked
    except HpctrainError as error:
        end_quietly_if_uncaught(error)
        raise
    if ending is not None:
        raise ending


@contextmanager
def standing_ranks(claim: Claim) -> Iterator[Standing]:
    """Connect the ranks of a launcher around a whole program, and have them watched.

    Collective: all ranks. What fails or ends on one of them, before the program's first
    `connect()` too, ends the job; each `connect()` in the body is of these ranks. MPI is up from
    before the body until after it.

    Args:
        claim: what the launcher says of this process.

    Raises:
        LaunchError: if the processes cannot form one world.
    """
    with (
        control_plane(claim) as (topology, messages),
        guard(topology) as job_guard,
        reporting(topology.is_rank_zero),
        gathering(topology, messages, LaunchSection(), job_guard),
    ):
        job_guard.wait_until_watched()
        job_guard.outside()
        around = Standing(topology=topology, communicator=messages, guard=job_guard)
        if topology.world_size == 1:
            yield around
            return
        with stands(around):
            yield around
        # The others may be long in what they do alone.
        job_guard.leaving()


def _warn_of_few_files() -> None:
    """Warn where so few files may be open that data or connections may fail for want of them."""
    most = most_open_files()
    if most is not None and most < _FEW_FILES:
        sys.stderr.write(
            f"hpctrain: a process may open only {most} files here (ulimit -Hn): connections and "
            "shards of data are files, too. Raise the limit where the job is started\n"
        )


_in_use = threading.Lock()


def is_in_use() -> bool:
    """Tell whether this process is in a world already."""
    return _in_use.locked()


@contextmanager
def alone_in_this_process() -> Iterator[None]:
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
    if topology.is_rank_zero:
        _warn_of_few_files()
    if topology.world_size > 1:
        take_place()
    spare_login_node(topology)
    return topology


@contextmanager
def own_interface(meeting: Meeting | None) -> Iterator[None]:
    """Have gloo look up no host name for one process, which has nobody to connect to."""
    name = "GLOO_SOCKET_IFNAME"
    if meeting is not None or name in os.environ or not _LOOPBACK.exists():
        yield
        return
    os.environ[name] = _LOOPBACK.name
    try:
        yield
    finally:
        del os.environ[name]


def group_store(
    topology: Topology, meeting: Meeting | None, section: LaunchSection, timeout: timedelta
) -> dist.Store:
    """Return the key-value store through which the process group finds itself."""
    import torch
    from torch import distributed as dist

    if meeting is None:
        return dist.HashStore()
    if meeting.interface:
        # gloo would look its own host name up, and bind 127.0.1.1 on a Debian host.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", meeting.interface)
        # NCCL knows the fast networks better than we do, unless the user has named one.
        if section.interface or section.address:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={meeting.interface}")
    return dist.TCPStore(
        meeting.ip,
        meeting.port,
        topology.world_size,
        is_master=topology.is_rank_zero,
        timeout=timeout,
        wait_for_workers=False,
        # The store takes the descriptor over and closes it.
        master_listen_fd=meeting.listener.detach() if meeting.listener is not None else None,
        # Until torch 2.8 the libuv kind cannot take one.
        use_libuv=torch.__version__ >= "2.8",
    )


@contextmanager
def loading() -> Iterator[None]:
    """Import inside, and what is there afterwards is never looked through again.

    torch makes 165,000 objects, all to stay. Looking for garbage among them takes 8 % of its
    import, and 50 ms of every full collection later, in mid-training (torch 2.13, measured).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def prepare_deterministic(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have cuBLAS sum in the same order every time; to be called before CUDA starts.

    torch 2.6 to 2.9 refuse deterministic algorithms without it; newer ones do without (pull request
    161749), where it changes nothing. What the user has set stays.

    Source: docs of torch.use_deterministic_algorithms; NVIDIA's cuBLAS, "Results Reproducibility".
    """
    environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
