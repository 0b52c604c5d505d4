"""The checks of the world: launcher, process group, table of the ranks, what each of them has."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack

from hpctrain.errors import LaunchError
from hpctrain.launch.process_group import World, gathering, prepare_deterministic, process_group
from hpctrain.observe.job_record import image
from hpctrain.preflight.checks import HOST_FIX, Checks
from hpctrain.preflight.rank_facts import RankFacts, Ranks, rank_facts
from hpctrain.preflight.report import Finding, ranges, world_table
from hpctrain.topology import Topology
from hpctrain.utils.text import listed, plural, printable, size

_SAME_OR_BROKEN = ("hpctrain", "python", "torch", "MPI", "NCCL", "CUDA", "ROCm")
"""What has to have one version on all ranks; of all else another one is a warning."""
_SHM_BYTES_PER_RANK = 64 * 2**20
"""What MPI and NCCL take of /dev/shm for their buffers, at most; containers have 64 MB in all."""
_FILES_PER_RANK = 512
"""Shards (at most 256 at once), libraries, and room for the user's own."""
# How each launcher gives a rank more than one core, by its label.
_PINNING = {
    "Open MPI's mpirun": "mpirun --bind-to none, or --map-by slot:PE={share}",
    "MPICH's mpirun": "mpirun -bind-to none",
    "Intel MPI's mpirun": "I_MPI_PIN=off in the environment of mpirun",
    "MVAPICH2's mpirun": "MV2_ENABLE_AFFINITY=0 in the environment of mpirun",
    "srun": "srun -c {share} (the --cpus-per-task of sbatch does not reach srun)",
    "jsrun": "jsrun -c {share} -b packed:{share}",
    "PALS mpiexec": "mpiexec --depth {share} --cpu-bind depth",
    "flux run": "flux run -c {share}",
}


# What modules of the host set, and the family that they are of.
_MPI_OF_HOST = {
    "CRAY_MPICH_VERSION": "Cray MPICH",
    "HPCX_MPI_VERSION": "Open MPI",
    "I_MPI_VERSION": "Intel MPI",
    "SMPI_VERSION": "Spectrum MPI",
}


def connect(checks: Checks, stack: ExitStack) -> World | None:
    """Make the process group, for as long as `stack` lasts. Collective: all ranks.

    Returns:
        None where the network or the devices do not carry one.
    """
    checks.add(judge_launcher(checks.topology))
    topology, communicator, section = checks.topology, checks.communicator, checks.config.launch
    if checks.config.run.deterministic:
        prepare_deterministic()
    try:
        meeting = stack.enter_context(gathering(topology, communicator, section, checks.guard))
        world = stack.enter_context(
            process_group(topology, communicator, section, meeting, checks.guard)
        )
    except LaunchError as error:
        if not error.everywhere:
            raise
        checks.add(Finding(name="process group", status="fail", fact=str(error)))
        return None
    checks.backend = world.backend
    fact = f"ready over {world.backend}"
    checks.add(Finding(name="process group", status="pass", fact=fact))
    return world


def check_world(checks: Checks, world: World) -> None:
    """Tell who and where the ranks are, and judge what they have. Collective: all ranks."""
    ranks = checks.gather("ranks", HOST_FIX, lambda: rank_facts(world))
    if ranks is None:
        return
    checks.ranks = ranks
    checks.report(f"\n{world_table(ranks)}\n")
    checks.add(judge_versions(ranks))
    checks.add(judge_devices(ranks))
    checks.add(judge_peers(ranks))
    checks.add(judge_gpu_aware(checks.topology, ranks))
    checks.add(judge_cores(ranks, checks.topology.launcher))
    checks.add(judge_open_files(ranks))
    checks.add(judge_shared_memory(ranks))
    checks.add(judge_image(image(os.environ), ranks[0].versions, os.environ))


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


def judge_cores(ranks: Ranks, launcher: str) -> Finding:
    """Compare ranks and threads with the cores that they may run on."""
    for node in by_node(ranks):
        host, count, total = node[0].host, len(node), node[0].node_cores
        share = max(1, total // count)
        pinning = _PINNING.get(launcher, "the launcher's option for cores per rank").format(
            share=share
        )
        masks = Counter(rank.cores for rank in node)
        cores, sharing = max(masks.items(), key=lambda item: item[1] / len(item[0]))
        if count > total:
            return Finding(
                name="cores",
                status="warn",
                fact=f"{plural(count, 'rank')} on the {plural(total, 'core')} of {host}",
                fix=f"start at most {plural(total, 'rank')} per node, or ask for more cores",
            )
        if sharing > len(cores):
            return Finding(
                name="cores",
                status="warn",
                fact=f"{plural(sharing, 'rank')} are pinned to {plural(len(cores), 'core')} "
                f"({ranges(cores)}) of the {total} of {host}",
                fix=pinning,
            )
        widest = max(len(rank.cores) for rank in node)
        if widest < share:
            return Finding(
                name="cores",
                status="warn",
                fact=f"every rank on {host} is pinned to {plural(widest, 'core')}; its share of "
                f"the {total} there is {share}",
                fix=pinning,
            )
        union = {core for rank in node for core in rank.cores}
        threads = sum(rank.threads for rank in node)
        if threads > len(union):
            return Finding(
                name="cores",
                status="warn",
                fact=f"{plural(threads, 'thread')} of {plural(count, 'rank')} on "
                f"{plural(len(union), 'core')} of {host}",
                fix=f"unset OMP_NUM_THREADS, or set it to {max(1, len(union) // count)}",
            )
    first = ranks[0]
    fact = f"{plural(len(first.cores), 'core')} and {plural(first.threads, 'thread')} per rank"
    shared = len(by_node(ranks)[0]) > 1 and len({rank.cores for rank in ranks}) == 1
    return Finding(name="cores", status="pass", fact=fact + (", not pinned" if shared else ""))


def judge_open_files(ranks: Ranks) -> Finding:
    """Compare the limit of open files with shards and connections."""
    lowest = min(ranks, key=lambda rank: rank.open_files[0])
    soft, hard = lowest.open_files
    needed = _FILES_PER_RANK + 2 * len(ranks)
    fact = f"soft limit {soft:,}, hard {hard:,} (rank {lowest.rank} on {lowest.host})"
    values = {"soft": soft, "hard": hard, "needed": needed}
    if soft >= needed:
        return Finding(name="open files", status="pass", fact=fact, values=values)
    # Every rank connects to rank 0, and to the others.
    broken = soft < 64 + len(ranks)
    return Finding(
        name="open files",
        status="fail" if broken else "warn",
        fact=f"{fact}; {plural(len(ranks), 'rank')} may take {needed:,}",
        fix=f"ulimit -n {needed} in the job script"
        + ("" if hard >= needed else f"; the hard limit {hard:,} is the site's to raise"),
        values=values,
    )


def judge_shared_memory(ranks: Ranks) -> Finding:
    """Look for the small /dev/shm of containers."""
    name = "/dev/shm"
    tightest: tuple[float, Finding] | None = None
    for node in by_node(ranks):
        host, shm = node[0].host, node[0].shm_bytes
        if shm is None:
            return Finding(
                name=name,
                status="warn" if len(node) > 1 else "pass",
                fact=f"there is none on {host}",
                fix="start the container with one: --shm-size=8g" if len(node) > 1 else "",
            )
        total, free = shm
        needed = _SHM_BYTES_PER_RANK * len(node)
        few = free < needed and len(node) > 1
        finding = Finding(
            name=name,
            status="warn" if few else "pass",
            fact=f"{size(free)} free of {size(total)}, {plural(len(node), 'rank')} on {host}",
            fix=f"MPI and NCCL may need {size(needed)} there: clean up what dead jobs have left, "
            "or start the container with --shm-size=8g"
            if few
            else "",
            values={"free_bytes": free, "total_bytes": total},
        )
        if tightest is None or free / needed < tightest[0]:
            tightest = free / needed, finding
    assert tightest is not None
    return tightest[1]


def judge_image(
    name: str | None, versions: Mapping[str, str], environ: Mapping[str, str]
) -> Finding:
    """Tell the container's image, and whether the host's MPI is another one than that in it.

    Args:
        name: of the image; None outside of a container.
        versions: of what rank 0 has loaded.
        environ: variables, to which those of the host's modules may belong.
    """
    if name is None:
        return Finding(name="image", status="pass", fact="no container")
    inside = versions.get("MPI")
    shown = ", ".join(f"{key} {versions[key]}" for key in ("MPI", "NCCL") if key in versions)
    fact = f"{printable(name)}; in it {shown or 'no MPI'}"
    host = {label: environ[key] for key, label in _MPI_OF_HOST.items() if environ.get(key)}
    others = [
        f"{label} {version}"
        for label, version in host.items()
        if inside is not None and label.partition(" ")[0].lower() not in inside.lower()
    ]
    if others:
        return Finding(
            name="image",
            status="warn",
            fact=f"{fact}; the host has {printable(', '.join(others))} loaded",
            fix="MPI between nodes is fast where the image's is the host's: bind the host's "
            "library into the container and set MPI4PY_LIBMPI to it, as the site's documentation "
            "says; gradients go by NCCL, which needs its network plugin in the image",
        )
    return Finding(name="image", status="pass", fact=fact)


def by_node(ranks: Ranks) -> list[list[RankFacts]]:
    """Return the ranks of every node."""
    nodes: dict[int, list[RankFacts]] = {}
    for rank in ranks:
        nodes.setdefault(rank.node_rank, []).append(rank)
    return list(nodes.values())
