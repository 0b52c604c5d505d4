"""What the environment of each launcher makes of a process; recorded, or from its documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.errors import LaunchError
from hpctrain.launch.launchers import detect
from hpctrain.launch.mpi import library_family, library_name
from hpctrain.launch.pmi import check_process_manager

RECORDED = Path(__file__).parent / "environments"

BATCH = {  # inside an sbatch script, without srun
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
}
STEP = BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "PMIX_RANK": "1",
}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("env", "launcher", "rank", "world_size", "needs_mpi"),
    [
        ({}, None, 0, 1, False),
        (BATCH, None, 0, 1, False),
        (STEP, "srun", 3, 4, True),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None, 0, 1, False),
        (STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"}, "srun", 3, 4, True),
        (STEP | {"PMIX_RANK": "3"}, "srun", 3, 4, True),
        (HYDRA, "mpich", 2, 4, True),
        (HYDRA | STEP | {"SLURM_STEP_NUM_TASKS": "2"}, "mpich", 2, 4, True),
        (HYDRA | {"I_MPI_HYDRA_UUID": "x"}, "intelmpi", 2, 4, True),
        (OPEN_MPI, "openmpi", 1, 3, True),
        (OPEN_MPI | BATCH, "openmpi", 1, 3, True),
        (OPEN_MPI | STEP, "openmpi", 1, 3, True),
        (
            OPEN_MPI | {"JSM_NAMESPACE_RANK": "5", "JSM_NAMESPACE_SIZE": "12"},
            "jsrun",
            5,
            12,
            True,
        ),
        ({"PALS_RANKID": "5", "PMI_RANK": "5", "PMI_SIZE": "8"}, "pals", 5, 8, True),
        ({"PALS_RANKID": "5"}, "pals", 5, None, True),
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "2", "PMI_RANK": "0"}, "flux", 0, 2, True),
        (
            {"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2", "PMI_RANK": "0"},
            "mvapich2",
            0,
            2,
            True,
        ),
        (BY_HAND, "environment", 1, 2, False),
        (BY_HAND | HYDRA, "mpich", 2, 4, True),
        (BY_HAND | STEP | {"TORCHELASTIC_RUN_ID": "x"}, "torchrun", 1, 2, False),
    ],
)
def test_the_innermost_launcher_wins(
    env: dict[str, str],
    launcher: str | None,
    rank: int,
    world_size: int | None,
    needs_mpi: bool,
) -> None:
    claim = detect(env)
    assert (claim.launcher.name if claim.launcher else None) == launcher
    assert (claim.rank, claim.world_size, claim.needs_mpi) == (rank, world_size, needs_mpi)
    assert claim.reasons


def recorded(name: str) -> dict[str, str]:
    """Return an environment as it was seen; the head of the file says where."""
    lines = (RECORDED / f"{name}.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


@pytest.mark.parametrize(
    ("name", "launcher", "rank", "world_size", "local_rank"),
    [
        ("srun-pmi2-cyclic", "srun", 2, 4, 1),
        ("srun-pmix-uneven", "srun", 2, 3, 0),
        ("srun-none", "srun", 1, 4, 1),
        ("srun-cray-shasta", "srun", 0, 3, 0),
        ("srun-heterogeneous", "srun", 3, 4, 1),
        ("srun-second-node", "srun", 1, 2, 1),
        ("srun-shell", None, 0, 1, 0),
        ("sbatch", None, 0, 1, 0),
        ("salloc", None, 0, 1, 0),
        ("sbatch-mpich", "mpich", 3, 4, 1),
        ("sbatch-intelmpi", "intelmpi", 3, 4, 1),
        ("sbatch-openmpi", "openmpi", 3, 4, 1),
    ],
)
def test_recorded_environments(
    name: str, launcher: str | None, rank: int, world_size: int, local_rank: int
) -> None:
    env = recorded(name)
    claim = detect(env)
    assert (claim.launcher.name if claim.launcher else None) == launcher
    assert (claim.rank, claim.world_size, claim.local_rank) == (rank, world_size, local_rank)
    if claim.launcher is not None:
        check_process_manager(claim.launcher, env, "Some MPI 1.0")


def test_every_recorded_environment_is_looked_at() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [path.stem for path in RECORDED.iterdir() if f'"{path.stem}"' not in source] == []


MPICH = "MPICH Version:      5.0.2\nMPICH configure:    --with-device=ch4:ucx,ofi\n"


@pytest.mark.parametrize(
    ("name", "changes", "version", "words"),
    [
        ("sbatch-by-a-rank", {}, MPICH, "step 10.0 of Slurm, but PMI_JOBID is of step 9.0"),
        ("srun-pmix-uneven", {"SLURM_JOB_ID": "99"}, "Open MPI v5", "PMIX_NAMESPACE is of step"),
        ("srun-pmix-uneven", {}, MPICH, "srun speaks PMIx to this process"),
    ],
)
def test_what_mpi_init_would_die_of_is_explained(
    name: str, changes: dict[str, str], version: str, words: str
) -> None:
    env = recorded(name) | changes
    launcher = detect(env).launcher
    assert launcher is not None
    with pytest.raises(LaunchError, match=words):
        check_process_manager(launcher, env, version)


@pytest.mark.parametrize(
    ("name", "changes", "version"),
    [
        ("srun-pmi2-cyclic", {}, MPICH),
        ("srun-pmix-uneven", {}, MPICH[:-1] + " --with-pmix=/usr"),
        ("srun-pmix-uneven", {}, "Intel(R) MPI Library 2021.19.0 for Linux* OS"),
        # A namespace that was inherited is overruled by a PMI of this step.
        ("srun-pmi2-cyclic", {"PMIX_NAMESPACE": "slurm.pmix.99.0", "PMIX_RANK": "1"}, MPICH),
        ("srun-heterogeneous", {"SLURM_JOB_ID": "7"}, "Open MPI v5"),
        # Newer Slurm's cray_shasta names the job alone.
        ("srun-cray-shasta", {"PMI_JOBID": "4", "PMI_RANK": "0"}, "CRAY MPICH version 8"),
        ("sbatch-openmpi", {}, "Open MPI v5"),
    ],
)
def test_a_process_manager_that_fits(name: str, changes: dict[str, str], version: str) -> None:
    env = recorded(name) | changes
    launcher = detect(env).launcher
    assert launcher is not None
    check_process_manager(launcher, env, version)


def test_every_value_has_its_reason() -> None:
    assert detect(HYDRA).reasons == {
        "rank": "PMI_RANK=2",
        "world_size": "PMI_SIZE=4",
        "local_rank": "MPI_LOCALRANKID=0",
        "local_world_size": "MPI_LOCALNRANKS=2",
    }


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (HYDRA | {"PMI_RANK": "4"}, "PMI_RANK=4 and PMI_SIZE=4 contradict"),
        (HYDRA | {"PMI_RANK": "-1"}, "PMI_RANK='-1' is not a whole number"),
        (HYDRA | {"PMI_SIZE": "four"}, "PMI_SIZE='four' is not a whole number"),
        (HYDRA | {"PMI_SIZE": "0", "PMI_RANK": "0"}, "contradict"),
        (HYDRA | {"MPI_LOCALRANKID": "2"}, "MPI_LOCALRANKID=2 and MPI_LOCALNRANKS=2 contradict"),
        ({"RANK": "1"}, "RANK=1 is set, WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, RANK is not"),
        ({"WORLD_SIZE": "2", "NODE_RANK": "0"}, "where WORLD_SIZE counts nodes"),
    ],
)
def test_a_broken_environment_is_explained(env: dict[str, str], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        detect(env)


@pytest.mark.parametrize(
    ("version", "name", "family"),
    [
        ("MPICH Version:      5.0.2\nMPICH Release date: Tue\n\0", "MPICH 5.0.2", "mpich"),
        ("Open MPI v5.0.11, package: Open MPI, ident\0", "Open MPI v5.0.11", "openmpi"),
        ("Intel(R) MPI Library 2021.18 for Linux\n\0", "Intel(R) MPI 2021.18 for Linux", "intel"),
        ("MPI VERSION    : CRAY MPICH version 8.1.28 (ANL base)\n", None, "cray"),
        ("IBM Spectrum MPI v10.4\0", "IBM Spectrum MPI v10.4", "spectrum"),
        ("MVAPICH2 Version      :\t2.3.7\n", None, "mvapich"),
        ("Some MPI 1.0", "Some MPI 1.0", "unknown"),
    ],
)  # fmt: skip
def test_library_names(version: str, name: str | None, family: str) -> None:
    assert name is None or library_name(version) == name
    assert library_family(library_name(version)) == family
