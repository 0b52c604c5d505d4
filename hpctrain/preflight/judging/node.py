"""Judges what the nodes give their ranks: cores, open files, shared memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hpctrain.preflight.finding import Finding, ranges
from hpctrain.preflight.probes.process import RankFacts
from hpctrain.utils.text import plural, size

Ranks = Sequence[RankFacts]

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


def judge_cores(ranks: Ranks, launcher: str) -> Finding:
    """Hold ranks and threads against the cores that they may run on."""
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
    """Hold the limit of open files against shards and connections."""
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


def by_node(ranks: Ranks) -> list[list[RankFacts]]:
    """Return the ranks of every node."""
    nodes: dict[int, list[RankFacts]] = {}
    for rank in ranks:
        nodes.setdefault(rank.node_rank, []).append(rank)
    return list(nodes.values())
