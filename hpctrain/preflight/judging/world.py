"""Judges what the ranks tell about themselves: launcher, versions, devices."""

from __future__ import annotations

from collections import Counter

from hpctrain.preflight.finding import Finding
from hpctrain.preflight.judging.node import Ranks, by_node
from hpctrain.topology import Topology
from hpctrain.utils.text import listed, plural

_SAME_OR_BROKEN = ("hpctrain", "python", "torch", "MPI", "NCCL", "CUDA", "ROCm")


def judge_launcher(topology: Topology) -> Finding:
    """Tell who started the ranks, and that MPI agrees; where it does not, nothing starts at all."""
    world = f"{plural(topology.world_size, 'rank')} on {plural(topology.num_nodes, 'node')}"
    if topology.launcher == "none":
        why = topology.reasons.get("rank", "no launcher")
        return Finding(name="launcher", status="pass", fact=f"one process: {why}")
    by = f"{topology.launcher} ({topology.reasons.get('rank', '')})"
    if topology.mpi is None:
        return Finding(name="launcher", status="pass", fact=f"{world} by {by}, without MPI")
    fact = f"{world} by {by}; {topology.mpi} fits it and sees the same world"
    return Finding(name="launcher", status="pass", fact=fact)


def judge_gpu_aware(topology: Topology, ranks: Ranks) -> Finding:
    """Tell what becomes of MPI's own use of GPUs."""
    name = "MPI and GPUs"
    if topology.mpi is None:
        return Finding(name=name, status="skip", fact="no MPI here")
    on = sorted({f"{k}={v}" for rank in ranks for k, v in rank.gpu_aware.items() if v != "0"})
    if on:
        return Finding(
            name=name,
            status="warn",
            fact=f"{', '.join(on)}: MPI may open a GPU before the rank has chosen its own",
            fix="unset it: MPI carries control messages only, gradients go by torch.distributed",
        )
    off = ", ".join(f"{key}=0" for key in ranks[0].gpu_aware)
    fact = f"GPU-aware MPI is switched off by hpctrain ({off}); gradients do not go through MPI"
    return Finding(name=name, status="pass", fact=fact)


def judge_versions(ranks: Ranks) -> Finding:
    """Compare the versions of all ranks."""
    first = ranks[0]
    different: list[str] = []
    broken = False
    for name in sorted({name for rank in ranks for name in rank.versions}):
        hosts: dict[str, list[str]] = {}
        for rank in ranks:
            hosts.setdefault(rank.versions.get(name, "none"), []).append(rank.host)
        if len(hosts) > 1:
            broken |= name in _SAME_OR_BROKEN
            different.append(
                f"{name} is "
                + " but ".join(
                    f"{version} on {listed(list(dict.fromkeys(where)))}"
                    for version, where in hosts.items()
                )
            )
    if different:
        return Finding(
            name="versions",
            status="fail" if broken else "warn",
            fact="; ".join(different),
            fix="start every rank in one environment: on a shared file system, or the same "
            "container image on all nodes",
            values=dict(first.versions),
        )
    shown = [f"{key} {value}" for key, value in first.versions.items() if key != "MPI"]
    return Finding(
        name="versions",
        status="pass",
        fact=("equal everywhere: " if len(ranks) > 1 else "") + ", ".join(shown),
        values=dict(first.versions),
    )


def judge_devices(ranks: Ranks) -> Finding:
    """Look for idle and for unequal GPUs."""
    kinds = Counter(rank.device_name or rank.device for rank in ranks)
    fact = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if len(kinds) > 1:
        return Finding(
            name="devices",
            status="warn",
            fact=f"{fact}: every step waits for the slowest",
            fix="ask the scheduler for nodes of one kind (a constraint, or a partition)",
        )
    for node in by_node(ranks):
        if (idle := node[0].visible_devices - len(node)) > 0:
            seen = f"{node[0].visible_devices} visible, {plural(len(node), 'rank')}"
            return Finding(
                name="devices",
                status="warn",
                fact=f"{fact}; {plural(idle, 'GPU')} of {node[0].host} idle ({seen})",
                fix="start as many ranks per node as it has GPUs",
            )
    return Finding(name="devices", status="pass", fact=fact)


def judge_peers(ranks: Ranks) -> Finding:
    """Look whether GPUs of one node reach each other's memory directly."""
    name = "GPU peers"
    if not any(rank.visible_devices for rank in ranks):
        return Finding(name=name, status="skip", fact="no GPUs here")
    crowded = [rank for node in by_node(ranks) if len(node) > 1 for rank in node]
    if not crowded:
        return Finding(name=name, status="skip", fact="one GPU per node")
    hidden = [rank for rank in crowded if rank.visible_devices == 1]
    if hidden:
        return Finding(
            name=name,
            status="warn",
            fact=f"{plural(len(hidden), 'rank')} see only their own GPU (first: rank "
            f"{hidden[0].rank} on {hidden[0].host}): NCCL may not copy from GPU to GPU",
            fix="let every rank see all GPUs of its node: --gpus-per-node without "
            "--gpus-per-task or --gpu-bind; hpctrain takes the one of its local rank",
        )
    apart = [rank for rank in crowded if not all(rank.peers)]
    if apart:
        return Finding(
            name=name,
            status="warn",
            fact=f"peer access is off for {plural(len(apart), 'rank')} (first: rank "
            f"{apart[0].rank}, {apart[0].device} of {apart[0].host}): all goes through the host",
            fix="`nvidia-smi topo -p2p r` shows between which; inside a virtual machine or with "
            "an IOMMU it has to be allowed by the site",
        )
    return Finding(name=name, status="pass", fact="GPUs of a node reach each other's memory")
