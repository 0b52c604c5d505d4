"""The world in two steps: the control plane without torch, then the process group."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from hpctrain.config.schema import LaunchSection
from hpctrain.launch.discovery import discover
from hpctrain.launch.launchers import Claim, detect
from hpctrain.launch.single import SingleCommunicator
from hpctrain.observe.log import quiet_native_libraries
from hpctrain.topology import Communicator, Topology

if TYPE_CHECKING:
    import torch
    from torch import distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A proven world, ready to train in.

    Attributes:
        backend: of the default process group; None in a world of one process, which has none.
    """

    topology: Topology
    communicator: Communicator
    device: torch.device
    backend: str | None


@contextmanager
def control_plane(claim: Claim | None = None) -> Iterator[tuple[Topology, Communicator]]:
    """Find out who and where all ranks are, and connect them for messages.

    Collective: all ranks. Does not import torch where MPI started the job, so that what every
    rank has to know can be checked and shared first.

    Raises:
        LaunchError: if the launcher's claim is broken or MPI sees another world.
    """
    quiet_native_libraries()  # read when torch is loaded, which comes next
    claim = detect(os.environ) if claim is None else claim
    if claim.launcher is None:
        # Without a launcher MPI is not even imported: MPI_Init aborts on some login nodes.
        alone = SingleCommunicator()
        yield discover(claim, alone, mpi=None), alone
    elif claim.needs_mpi:
        from hpctrain.launch.mpi import mpi_world

        with mpi_world(claim) as over_mpi:
            yield discover(claim, over_mpi, mpi=over_mpi.library), over_mpi
    else:
        from hpctrain.launch.store import store_world

        with store_world(claim) as over_store:
            yield discover(claim, over_store, mpi=None), over_store


@contextmanager
def process_group(
    topology: Topology, communicator: Communicator, section: LaunchSection
) -> Iterator[World]:
    """Choose the device and initialise torch.distributed. Collective: all ranks.

    Raises:
        LaunchError: on every rank, if devices or network cannot carry the world.
    """
    from torch import distributed as dist

    from hpctrain.launch.agreement import closing_together
    from hpctrain.launch.device import choose_device, set_threads

    device = choose_device(section, topology, communicator)
    set_threads(communicator, topology)
    if topology.world_size == 1:
        yield World(topology=topology, communicator=communicator, device=device, backend=None)
        return

    backend = section.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    store = _store(topology, communicator, section)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("hpctrain/process_group", store),
        rank=topology.rank,
        world_size=topology.world_size,
        # Longer than our own limits, which can say more about who is late.
        timeout=timedelta(seconds=2 * section.hang_timeout_seconds),
        device_id=device if backend == "nccl" else None,
    )

    def close() -> None:
        # A DDP model in a reference cycle would outlive its process group and abort at exit.
        gc.collect()
        dist.destroy_process_group()
        # Rank 0 holds the store: it stays until everybody has taken leave.
        communicator.barrier()

    with closing_together(communicator, close):
        yield World(topology=topology, communicator=communicator, device=device, backend=backend)


@contextmanager
def connect(section: LaunchSection | None = None) -> Iterator[World]:
    """Make the world of this job and give it, ready for a training loop of your own.

    Collective: all ranks. On leaving, the process group is destroyed and MPI finalized; an
    exception of one rank ends the whole job, with its traceback.

    Example:
        >>> with hpctrain.connect() as world:
        ...     model = DistributedDataParallel(model.to(world.device))

    Raises:
        LaunchError: if the processes cannot form one world.
    """
    from hpctrain.launch.failure import guard

    with (
        control_plane() as (topology, communicator),
        guard(topology),
        process_group(topology, communicator, section or LaunchSection()) as world,
    ):
        yield world


def _store(topology: Topology, communicator: Communicator, section: LaunchSection) -> dist.Store:
    """Return the key-value store through which the process group finds itself."""
    from torch import distributed as dist

    from hpctrain.launch.rendezvous import meet

    existing: dist.Store | None = getattr(communicator, "store", None)
    if existing is not None:
        return existing
    meeting = meet(topology, communicator, interface=section.interface, ip=section.address)
    # gloo would look its own host name up, and bind 127.0.1.1 on a Debian host.
    if meeting.interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", meeting.interface)
    return dist.TCPStore(
        meeting.ip,
        meeting.port,
        topology.world_size,
        is_master=topology.is_rank_zero,
        timeout=timedelta(seconds=section.hang_timeout_seconds),
        wait_for_workers=False,
        # The store takes the descriptor over and closes it.
        master_listen_fd=meeting.listener.detach() if meeting.listener is not None else None,
    )
