"""Worlds under real launchers: what ranks see, and how they end together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

pytestmark = pytest.mark.ranks(3)

BODIES = Path(__file__).parents[1] / "mpi"


def start(
    *command: str, timeout: float = JOB_SECONDS, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | (env or {}),
    )


def mpirun(ranks: int, body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return start("mpirun", "-np", str(ranks), sys.executable, str(BODIES / body), *arguments)


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_control_plane_over_mpi(ranks: int) -> None:
    result = mpirun(ranks, "communicator.py")
    assert result.returncode == 0, result.stderr
    assert f"passed {ranks} MPICH's mpirun gloo" in result.stdout
    assert result.stderr == ""


def test_the_control_plane_alone() -> None:
    result = start(sys.executable, str(BODIES / "communicator.py"))
    assert result.stdout == "passed 1 none gloo\n", result.stderr
    assert result.stderr == ""


def test_the_control_plane_over_a_store() -> None:
    """torchrun's world has no MPI; the behaviour is the same."""
    result = start(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"),
        str(BODIES / "communicator.py"),
    )
    assert "passed 3 torchrun gloo" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("ranks", "failing", "how", "code", "words"),
    [
        (3, 2, "exception", 70, "ValueError: the story"),
        (2, 1, "thread", 70, "ValueError: the story"),
        (2, 0, "exit", 3, "SystemExit: 3"),
        (2, 1, "dataset", 65, "a shard is gone"),
    ],
)
def test_a_failing_rank_ends_the_job_with_its_story(
    ranks: int, failing: int, how: str, code: int, words: str
) -> None:
    result = mpirun(ranks, "failing.py", str(failing), how)
    assert result.returncode == code, result.stderr
    assert result.stderr.count(words) == 1
    assert f"rank {failing}@" in result.stderr
    assert ("Traceback" in result.stderr) == (how != "dataset")


def test_a_broken_world_is_one_message_and_never_solo_runs() -> None:
    """The launcher claims two ranks, MPI sees one: as under srun --mpi=none."""
    claim = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
    }
    result = start(sys.executable, "-m", "hpctrain", "no.toml", env=claim)
    assert result.returncode == 69
    assert "srun claims rank 0 of 2" in result.stderr
    assert "sees rank 0 of 1" in result.stderr
    assert "srun --mpi=pmi2" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"},
            "MASTER_PORT='70000' is not a port",
        ),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "contradict"),
    ],
)
def test_a_broken_environment_is_a_launch_error(env: dict[str, str], words: str) -> None:
    result = start(sys.executable, str(BODIES / "communicator.py"), env=env)
    assert result.returncode != 0
    assert words in result.stderr
