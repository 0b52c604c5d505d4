"""What a process can tell about itself and its node. Does not communicate."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import h5py
import numpy as np
import psutil
import torch

from hpctrain.launch.mpi import HOST_ONLY
from hpctrain.launch.process_group import World
from hpctrain.utils.proc import allowed_cores, cgroup_folders
from hpctrain.version import __version__

_NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """One rank, in one row of the world table.

    Attributes:
        device: as torch calls it, such as "cuda:0".
        device_name: such as "NVIDIA H100"; empty for a CPU.
        device_uuid: empty for a CPU.
        cores: of the affinity mask.
        node_cores: those that the job may use on this node, whatever this rank is pinned to.
        numa_nodes: that the cores are part of.
        threads: that torch computes with.
        interface: that the rendezvous chose; empty in a world of one process, and where a store
            was given.
        addresses: of that interface.
        link_speeds: of all interfaces that are up, Mb/s; 0 where the driver does not tell.
        versions: of what has to be equal everywhere.
        open_files: soft and hard limit.
        shm_bytes: size and free bytes of /dev/shm; None where there is none.
        gpu_aware: the variables that switch MPI's own use of GPUs, as they are set.
        peers: whether this GPU reaches the memory of the other visible ones directly.
        visible_devices: GPUs that this process sees.
    """

    rank: int
    host: str
    node_rank: int
    local_rank: int
    device: str
    device_name: str
    device_uuid: str
    cores: tuple[int, ...]
    node_cores: int
    numa_nodes: tuple[int, ...]
    threads: int
    interface: str
    addresses: tuple[str, ...]
    link_speeds: Mapping[str, int]
    versions: Mapping[str, str]
    open_files: tuple[int, int]
    shm_bytes: tuple[int, int] | None
    gpu_aware: Mapping[str, str]
    peers: tuple[bool, ...]
    visible_devices: int


Ranks = Sequence[RankFacts]


def rank_facts(world: World) -> RankFacts:
    """Return the facts of this rank."""
    topology = world.topology
    cuda = world.device.type == "cuda"
    properties = torch.cuda.get_device_properties(world.device) if cuda else None
    visible = torch.cuda.device_count() if cuda else 0
    cores = affinity()
    # Where `hpctrain.launch.process_group` notes it for gloo.
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    return RankFacts(
        rank=topology.rank,
        host=topology.host,
        node_rank=topology.node_rank,
        local_rank=topology.local_rank,
        device=str(world.device),
        device_name=properties.name if properties else "",
        device_uuid=str(properties.uuid) if properties else "",
        cores=cores,
        node_cores=node_cores(),
        numa_nodes=numa_nodes(cores),
        threads=torch.get_num_threads(),
        interface=interface if topology.world_size > 1 else "",
        addresses=_addresses(interface),
        link_speeds={name: link.speed for name, link in psutil.net_if_stats().items() if link.isup},
        versions=versions(topology.mpi, cuda),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        shm_bytes=_shm(),
        gpu_aware={name: os.environ[name] for name in HOST_ONLY if name in os.environ},
        peers=tuple(
            torch.cuda.can_device_access_peer(world.device.index, other)
            for other in range(visible)
            if other != world.device.index
        ),
        visible_devices=visible,
    )


def versions(mpi: str | None, cuda: bool) -> dict[str, str]:
    """Return the versions of what runs here."""
    found = {
        "hpctrain": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "HDF5": h5py.version.hdf5_version,
    }
    if mpi is not None:
        # Without importing it: nothing but the launch layer does.
        found |= {"mpi4py": metadata.version("mpi4py"), "MPI": mpi}
    if cuda:
        name, version = (
            ("ROCm", torch.version.hip) if torch.version.hip else ("CUDA", torch.version.cuda)
        )
        found[name] = str(version)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def affinity() -> tuple[int, ...]:
    """Return the cores that this process may run on."""
    return tuple(sorted(allowed_cores()))


def node_cores() -> int:
    """Return how many cores the job may use on this node: those of its cpuset, or all."""
    for path in (
        *(folder / "cpuset.cpus.effective" for folder in cgroup_folders("")[:1]),
        *(folder / "cpuset.effective_cpus" for folder in cgroup_folders("cpuset")[:1]),
    ):
        try:
            if cores := parse_ranges(path.read_text(encoding="ascii")):
                return len(cores)
        except OSError:
            continue
    return os.cpu_count() or 1


def numa_nodes(cores: tuple[int, ...]) -> tuple[int, ...]:
    """Return the NUMA nodes that some cores are part of; none where the system does not tell."""
    found = []
    for folder in _NODES.glob("node[0-9]*"):
        try:
            members = parse_ranges((folder / "cpulist").read_text(encoding="ascii"))
        except OSError:
            continue
        if members & set(cores):
            found.append(int(folder.name.removeprefix("node")))
    return tuple(sorted(found))


def parse_ranges(text: str) -> set[int]:
    """Return the numbers of a list as the kernel writes it: "0-7,64"."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _addresses(interface: str) -> tuple[str, ...]:
    return tuple(
        entry.address
        for entry in psutil.net_if_addrs().get(interface, [])
        if entry.family in (socket.AF_INET, socket.AF_INET6)
        # Link-local: of the same interface on every node, and of none in particular.
        and "%" not in entry.address
    )


def _shm() -> tuple[int, int] | None:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return None
    return usage.total, usage.free
