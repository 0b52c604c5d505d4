"""The preflight's judgements of ranks and nodes, on tables."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.preflight_tables import GIB, VERSIONS, gpu, rank, topology

from hpctrain.launch.environment import LAUNCHERS
from hpctrain.preflight import world
from hpctrain.preflight.rank_facts import RankFacts
from hpctrain.preflight.world import (
    judge_cores,
    judge_devices,
    judge_gpu_aware,
    judge_image,
    judge_launcher,
    judge_open_files,
    judge_peers,
    judge_shared_memory,
    judge_versions,
)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "4 ranks on 2 nodes by srun (SLURM_PROCID=0); MPICH 4.2 fits it"),
        ({"mpi": None, "launcher": "torchrun"}, "without MPI"),
        (
            {"mpi": None, "launcher": "none", "reasons": {"rank": "no launcher"}},
            "one process: no launcher",
        ),
    ],
)
def test_launcher(changed: dict[str, Any], words: str) -> None:
    finding = judge_launcher(topology(**changed))
    assert finding.status == "pass"
    assert words in finding.fact


@pytest.mark.parametrize(
    ("cores", "threads", "node_cores", "launcher", "status", "words"),
    [
        # What default pinning does: sixteen ranks, one core, 64 there.
        ([(0,)] * 16, [1] * 16, 64, "Open MPI's mpirun", "warn", "16 ranks are pinned to 1 core"),
        ([(0,), (1,)], [1, 1], 64, "Open MPI's mpirun", "warn", "its share of the 64 there is 32"),
        # Two share a core, the others have their own.
        ([(0,), (0,), (1, 2)], [1, 1, 1], 3, "srun", "warn", "2 ranks are pinned to 1 core (0)"),
        ([(0, 1)] * 3, [1] * 3, 2, "MPICH's mpirun", "warn", "3 ranks on the 2 cores of n0"),
        ([(0, 1)] * 2, [2, 2], 2, "MPICH's mpirun", "warn", "4 threads of 2 ranks on 2 cores"),
        ([(0, 1)] * 2, [1, 1], 2, "MPICH's mpirun", "pass", "not pinned"),
        ([(0, 1), (2, 3)], [2, 2], 4, "srun", "pass", "2 cores and 2 threads per rank"),
        ([(0,)], [1], 1, "none", "pass", "1 core and 1 thread"),
    ],
)
def test_cores(
    cores: list[tuple[int, ...]],
    threads: list[int],
    node_cores: int,
    launcher: str,
    status: str,
    words: str,
) -> None:
    ranks = [
        rank(i, cores=mask, threads=count, node_cores=node_cores)
        for i, (mask, count) in enumerate(zip(cores, threads, strict=True))
    ]
    finding = judge_cores(ranks, launcher)
    assert finding.status == status
    assert words in finding.fact
    assert bool(finding.fix) == (status == "warn")


@pytest.mark.parametrize(
    ("launcher", "fix"),
    [
        ("Open MPI's mpirun", "--bind-to none, or --map-by slot:PE=4"),
        ("MPICH's mpirun", "-bind-to none"),
        ("Intel MPI's mpirun", "I_MPI_PIN=off"),
        ("srun", "srun -c 4"),
        ("torchrun", "the launcher's option"),
    ],
)
def test_pinning_is_undone_in_the_words_of_the_launcher(launcher: str, fix: str) -> None:
    ranks = [rank(i, cores=(0,), node_cores=64) for i in range(16)]
    assert fix in judge_cores(ranks, launcher).fix


def test_every_launcher_with_an_option_is_one_that_hpctrain_knows() -> None:
    assert set(world._PINNING) <= {launcher.label for launcher in LAUNCHERS}


@pytest.mark.parametrize(
    ("other", "status", "words"),
    [
        (VERSIONS, "pass", "equal everywhere"),
        (VERSIONS | {"torch": "2.7"}, "fail", "torch is 2.6 on n0 but 2.7 on n1"),
        (VERSIONS | {"h5py": "3.11"}, "warn", "h5py is 3.10 on n0 but 3.11 on n1"),
        (VERSIONS | {"NCCL": "2.21"}, "fail", "NCCL is none on n0 but 2.21 on n1"),
    ],
)
def test_versions(other: dict[str, str], status: str, words: str) -> None:
    finding = judge_versions([rank(0), rank(1, host="n1", node_rank=1, versions=other)])
    assert finding.status == status
    assert words in finding.fact


@pytest.mark.parametrize(
    ("ranks", "status", "words"),
    [
        ([rank(0), rank(1)], "pass", "2 x cpu"),
        ([gpu(0), gpu(1)], "pass", "2 x H100"),
        ([gpu(0), gpu(1, device_name="A100")], "warn", "the slowest"),
        ([gpu(0), gpu(1, node=1)], "warn", "1 GPU of n0 idle (2 visible, 1 rank)"),
    ],
)
def test_devices(ranks: list[RankFacts], status: str, words: str) -> None:
    finding = judge_devices(ranks)
    assert (finding.status, words in finding.fact) == (status, True), finding


@pytest.mark.parametrize(
    ("ranks", "status", "words"),
    [
        ([rank(0)], "skip", "no GPUs"),
        ([gpu(0), gpu(1, node=1)], "skip", "one GPU per node"),
        ([gpu(0), gpu(1)], "pass", "reach"),
        ([gpu(0), gpu(1, peers=(False,))], "warn", "rank 1, cuda:1 of n0"),
        # --gpus-per-task hides the others.
        (
            [gpu(0, visible_devices=1, peers=()), gpu(1, visible_devices=1, peers=())],
            "warn",
            "see only their own GPU",
        ),
    ],
)
def test_peers(ranks: list[RankFacts], status: str, words: str) -> None:
    finding = judge_peers(ranks)
    assert (finding.status, words in finding.fact) == (status, True), finding


@pytest.mark.parametrize(
    ("mpi", "variables", "status"),
    [
        (None, {}, "skip"),
        ("MPICH 4.2", {"MPICH_GPU_SUPPORT_ENABLED": "0"}, "pass"),
        ("MPICH 4.2", {"MPICH_GPU_SUPPORT_ENABLED": "1"}, "warn"),
    ],
)
def test_gpu_aware_mpi(mpi: str | None, variables: dict[str, str], status: str) -> None:
    assert judge_gpu_aware(topology(mpi=mpi), [rank(gpu_aware=variables)]).status == status


@pytest.mark.parametrize(
    ("ranks", "soft", "hard", "status"),
    [
        (2, 1024, 4096, "pass"),
        (1000, 1024, 4096, "fail"),
        (400, 1024, 4096, "warn"),
        (400, 1312, 1312, "pass"),
    ],
)
def test_open_files(ranks: int, soft: int, hard: int, status: str) -> None:
    finding = judge_open_files([rank(i, open_files=(soft, hard)) for i in range(ranks)])
    assert finding.status == status
    assert status == "pass" or f"ulimit -n {512 + 2 * ranks}" in finding.fix


@pytest.mark.parametrize(
    ("ranks", "shm", "status"),
    [
        (1, (2**26, 2**26), "pass"),
        (2, (2**26, 2**26), "warn"),  # a container's default
        (2, (8 * GIB, 8 * GIB), "pass"),
        (2, (8 * GIB, 2**20), "warn"),
        (1, None, "pass"),
        (2, None, "warn"),
    ],
)
def test_shared_memory(ranks: int, shm: tuple[int, int] | None, status: str) -> None:
    assert judge_shared_memory([rank(i, shm_bytes=shm) for i in range(ranks)]).status == status


@pytest.mark.parametrize(
    ("name", "mpi", "environ", "status", "words"),
    [
        (None, None, {}, "pass", "no container"),
        ("/me/train.sif", "MPICH 4.2.0", {}, "pass", "/me/train.sif; in it MPI MPICH 4.2.0"),
        (
            *("x.sif", "MPICH 4.2.0", {"CRAY_MPICH_VERSION": "8.1.29"}),
            *("warn", "the host has Cray MPICH 8.1.29 loaded"),
        ),
        ("x.sif", "CRAY MPICH 8.1.29", {"CRAY_MPICH_VERSION": "8.1.29"}, "pass", "in it MPI CRAY"),
        ("x.sif", None, {"CRAY_MPICH_VERSION": "8.1.29"}, "pass", "in it no MPI"),
    ],
)
def test_the_image_and_the_mpi_of_its_host(
    name: str | None, mpi: str | None, environ: dict[str, str], status: str, words: str
) -> None:
    finding = judge_image(name, {} if mpi is None else {"MPI": mpi}, environ)
    assert (finding.status, words in finding.fact) == (status, True), finding
