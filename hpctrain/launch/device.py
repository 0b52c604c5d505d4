"""The device of every rank, its own unless it is asked to share, and its cores."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpctrain.config.schema import LaunchSection
from hpctrain.errors import LaunchError
from hpctrain.topology import Communicator, Topology
from hpctrain.utils.proc import allowed_cores, cpu_quotas
from hpctrain.utils.text import plural

logger = logging.getLogger("hpctrain")

# In the order in which "auto" looks for them. torch calls AMD's GPUs cuda as well. Apple's are left
# alone until somebody can run hpctrain on one.
_ACCELERATORS = ("cuda", "xpu")
_OWN_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}

# By `Topology.launcher`. Source: the manual pages of each.
UNPINNING = {
    "Open MPI's mpirun": "mpirun --bind-to none, or --map-by slot:PE=4 for four cores per rank",
    "MPICH's mpirun": "mpirun -bind-to none, or -bind-to core:4 for four cores per rank",
    "Intel MPI's mpirun": "I_MPI_PIN=off, or I_MPI_PIN_DOMAIN=4 for four cores per rank",
    "MVAPICH2's mpirun": "MV2_ENABLE_AFFINITY=0",
    "srun": "srun --cpus-per-task=4; that of sbatch does not reach srun",
    "jsrun": "jsrun --cpu_per_rs with --bind packed:4",
    "PALS mpiexec": "mpiexec --depth 4 --cpu-bind depth",
    "flux run": "flux run --cores-per-task=4",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank on its node, and how many devices of each kind it sees there."""

    host: str
    local_rank: int
    local_world_size: int
    visible: dict[str, int]


def device_index(
    visible: int, local_rank: int, local_world_size: int, *, share: bool = False
) -> int | None:
    """Return which of the visible devices a rank takes; None if there is no clean answer.

    A launcher that binds devices shows each rank one, as index 0; one that does not shows all.
    """
    if visible == 1:
        return 0
    if visible >= local_world_size:
        return local_rank
    return local_rank % visible if share and visible else None


def device_kind(asked: str, places: Sequence[Place]) -> str:
    """Return the kind of device that all ranks take, such as "cuda"."""
    if asked != "auto":
        return asked
    for kind in _ACCELERATORS:
        if any(place.visible[kind] for place in places):
            return kind
    return "cpu"


def choose_device(
    section: LaunchSection, topology: Topology, communicator: Communicator
) -> torch.device:
    """Return the device of this rank and make it current. Collective: all ranks.

    Raises:
        LaunchError: on every rank, if there is no device where one is asked for, fewer than ranks,
            or if two ranks would share one unasked.
    """
    if section.device == "cpu":
        return torch.device("cpu")
    if section.device == "mps":
        raise LaunchError(
            'launch.device = "mps": nobody has run hpctrain on an Apple GPU yet; "auto" and "cpu" '
            "train without it",
            everywhere=True,
        )
    take_instance(topology.local_rank, topology.local_world_size, share=section.share_device)
    here = Place(
        host=topology.host,
        local_rank=topology.local_rank,
        local_world_size=topology.local_world_size,
        visible={kind: _count_visible(kind) for kind in _ACCELERATORS},
    )
    places: list[Place] = communicator.all_gather(here)
    kind = device_kind(section.device, places)
    if kind == "cpu":
        return torch.device("cpu")
    _check_places(kind, places, share=section.share_device)
    if topology.is_rank_zero:
        _warn_idle(kind, places)
    index = device_index(
        here.visible[kind], here.local_rank, here.local_world_size, share=section.share_device
    )
    assert index is not None
    device = torch.device(kind, index)
    _module(kind).set_device(device)
    if not section.share_device:
        owners = communicator.all_gather(_owner(topology.host, device))
        _check_owners(kind, owners)
        if choose_backend(section, device) == _OWN_BACKENDS[kind]:
            _check_instances(owners)
    return device


def take_instance(
    local_rank: int,
    local_world_size: int,
    *,
    share: bool,
    environ: MutableMapping[str, str] = os.environ,
) -> None:
    """Show this rank the MIG instance that is its own, where all ranks are shown the same ones.

    Of several instances a process sees the first only, so that each rank has to be shown another.
    To be called before anything asks CUDA, which reads the variable once.

    Source: NVIDIA's MIG user guide, "CUDA_VISIBLE_DEVICES": only one instance is enumerated.
    """
    shown = environ.get(_VISIBLE, "").split(",")
    instances = [each.strip() for each in shown]
    if len(instances) < 2 or not all(each.startswith("MIG-") for each in instances):
        return
    index = device_index(len(instances), local_rank, local_world_size, share=share)
    if index is not None:
        environ[_VISIBLE] = instances[index]


_VISIBLE = "CUDA_VISIBLE_DEVICES"


def choose_backend(section: LaunchSection, device: torch.device) -> str:
    """Return the backend of the process group.

    Raises:
        LaunchError: on every rank, if the one that is asked for cannot serve shared devices.
    """
    own = _OWN_BACKENDS.get(device.type, "gloo")
    if section.share_device and own != "gloo":
        if section.backend not in ("auto", "gloo"):
            raise LaunchError(
                f"{section.backend} cannot run where ranks share a device: set launch.backend to "
                '"gloo" or "auto", or launch.share_device to false.',
                everywhere=True,
            )
        return "gloo"
    return own if section.backend == "auto" else section.backend


def _check_places(kind: str, places: Sequence[Place], *, share: bool) -> None:
    """Raise if some rank has no device to take.

    Raises:
        LaunchError: naming the first.
    """
    for rank, place in enumerate(places):
        visible = place.visible[kind]
        index = device_index(visible, place.local_rank, place.local_world_size, share=share)
        if index is None or not visible:
            sharing = "" if not visible else " Or let them share: launch.share_device = true."
            raise LaunchError(
                f"rank {rank} on {place.host} has no {kind} device of its own: "
                f"{_number(place.local_world_size, 'rank')} there, "
                f"{_number(visible, 'visible device')}. Start as many ranks per node as it has "
                'devices, or ask the scheduler for more; launch.device = "cpu" trains without.'
                + sharing,
                everywhere=True,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A rank's host, and what distinguishes its device.

    Attributes:
        uuid: of the device, or of its MIG instance; None where torch does not say it.
        bus: of the GPU; empty where torch does not say it.
        is_instance: whether the device is a part of a GPU.
    """

    host: str
    uuid: str | None
    bus: str
    is_instance: bool


def _check_owners(kind: str, owners: Sequence[Owner]) -> None:
    """Raise if two ranks have taken the same device.

    Raises:
        LaunchError: naming both.
    """
    for rank, owner in enumerate(owners):
        first = owners.index(owner)
        if owner.uuid is None or first == rank:
            continue
        bind = (
            "A process sees one MIG instance only: show each rank its own "
            f"({_VISIBLE}=MIG-..., or all of them in that list)"
            if owner.is_instance
            else "Bind one device per rank (srun --gpus-per-task=1 --gpu-bind=closest)"
        )
        raise LaunchError(
            f"ranks {first} and {rank} on {owner.host} have taken the same {kind} device "
            f"({owner.uuid}), on which {_OWN_BACKENDS[kind]} cannot run. {bind}, start fewer ranks "
            "per node, or let them share: launch.share_device = true.",
            everywhere=True,
        )


def _check_instances(owners: Sequence[Owner]) -> None:
    """Raise if two ranks have parts of one GPU: NCCL would refuse it as a "Duplicate GPU".

    Raises:
        LaunchError: naming both instances.
    """
    seen: dict[tuple[str, str], int] = {}
    for rank, owner in enumerate(owners):
        if not owner.is_instance:
            continue
        first = seen.setdefault((owner.host, owner.bus), rank)
        if first != rank:
            where = f" of the GPU {owner.bus}" if owner.bus else ""
            raise LaunchError(
                f"ranks {first} and {rank} on {owner.host} have two MIG instances{where}, "
                f"{owners[first].uuid} and {owner.uuid}, between which NCCL carries nothing "
                '("Duplicate GPU detected"): launch.share_device = true has gloo do it; one rank '
                "per GPU is faster.",
                everywhere=True,
            )


def _warn_idle(kind: str, places: Sequence[Place]) -> None:
    """Warn of devices that no rank takes."""
    idle = {
        place.host: place.visible[kind] - place.local_world_size
        for place in places
        if place.visible[kind] > max(1, place.local_world_size)
    }
    if idle:
        host, count = next(iter(idle.items()))
        others = f" (and on {_number(len(idle) - 1, 'other node')})" if len(idle) > 1 else ""
        logger.warning(
            "%s stay idle on %s%s: start as many ranks per node as there are",
            _number(count, f"{kind} device"),
            host,
            others,
        )


def _module(kind: str) -> Any:
    return getattr(torch, kind)


def _count_visible(kind: str) -> int:
    module = getattr(torch, kind, None)
    return 0 if module is None or not torch_sees(kind) else module.device_count()


def num_devices() -> int:
    """Return how many devices "auto" would find on this node."""
    return next((count for kind in _ACCELERATORS if (count := _count_visible(kind))), 0)


def torch_sees(kind: str) -> bool:
    """Tell whether this torch can compute on a kind of device here."""
    available: bool = _module(kind).is_available()
    return available


def _owner(host: str, device: torch.device) -> Owner:
    """Return what distinguishes this rank's device from all others."""
    properties = _module(device.type).get_device_properties(device)
    uuid = getattr(properties, "uuid", None)
    # Not every torch says it.
    numbers = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    known = [number for number in numbers if number is not None]
    return Owner(
        host=host,
        uuid=None if uuid is None else str(uuid),
        bus="{:04x}:{:02x}:{:02x}".format(*known) if len(known) == len(numbers) else "",
        is_instance=" MIG " in getattr(properties, "name", ""),
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@dataclass(frozen=True, slots=True)
class Cores:
    """The cores that a rank may use, of those of its node.

    Attributes:
        quotas: of its control groups: which group, and as many cores' time for all in it.
    """

    node_rank: int
    allowed: tuple[int, ...]
    num_on_node: int
    quotas: tuple[tuple[str, float], ...] = ()


def thread_budget(here: Cores, ranks: Sequence[Cores]) -> int:
    """Return the threads of a rank: its part of the cores and quotas that it shares with others.

    Args:
        here: of the rank.
        ranks: of all ranks, this one too.
    """
    beside = [cores for cores in ranks if cores.node_rank == here.node_rank]
    shares = [len(here.allowed) / sum(cores.allowed == here.allowed for cores in beside)]
    shares += [cpus / _num_in(group, beside) for group, cpus in here.quotas]
    return max(1, int(min(shares)))


def throttling(ranks: Sequence[Cores]) -> str | None:
    """Return what quota leaves the ranks less than a core each; None if none does."""
    for rank, cores in enumerate(ranks):
        beside = [other for other in ranks if other.node_rank == cores.node_rank]
        for group, cpus in cores.quotas:
            together = _num_in(group, beside)
            if cpus < together:
                return (
                    f"a quota of {cpus:g} cores (cpu.max of a control group) is there for "
                    f"{plural(together, 'rank')}, rank {rank} among them: the kernel stops them "
                    "now and then to keep to it; ask for more, or start fewer ranks per node"
                )
    return None


def _num_in(group: str, ranks: Sequence[Cores]) -> int:
    return sum(any(other == group for other, _ in cores.quotas) for cores in ranks)


def crowding(ranks: Sequence[Cores]) -> str | None:
    """Return what is wrong with how the ranks are pinned; None if nothing is.

    Ranks that may use the whole node are not pinned, whatever their number: that was asked for.
    """
    sharing = Counter((cores.node_rank, cores.allowed) for cores in ranks)
    for rank, cores in enumerate(ranks):
        allowed, together = len(cores.allowed), sharing[cores.node_rank, cores.allowed]
        if allowed == cores.num_on_node:
            continue
        if together > allowed:
            which = "core" if allowed == 1 else f"{allowed} cores"
            return (
                f"{together} ranks, rank {rank} among them, are pinned to the same {which} of "
                f"{cores.num_on_node}"
            )
        on_node = sum(other.node_rank == cores.node_rank for other in ranks)
        if allowed == 1 and cores.num_on_node >= 4 * on_node:
            return f"rank {rank} is pinned to 1 core of {cores.num_on_node}, beside its data reader"
    return None


def set_threads(communicator: Communicator, topology: Topology) -> int:
    """Give torch this rank's share of its cores. Collective: all ranks.

    A launcher that pins gives every rank its own cores; one that does not gives all of them all
    cores, which they then divide. OMP_NUM_THREADS, where it is set, is the user's word.

    Returns:
        The threads of this rank.
    """
    here = Cores(
        topology.node_rank,
        tuple(sorted(allowed_cores())),
        os.cpu_count() or 1,
        tuple((quota.group, quota.cpus) for quota in cpu_quotas()),
    )
    ranks: list[Cores] = communicator.all_gather(here)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(thread_budget(here, ranks))
    if topology.is_rank_zero and (quota := throttling(ranks)) is not None:
        logger.warning("%s", quota)
    problem = crowding(ranks)
    if problem is not None and topology.is_rank_zero:
        fix = UNPINNING.get(topology.launcher)
        logger.warning("%s%s", problem, "" if fix is None else f"; to change that: {fix}")
    return torch.get_num_threads()
