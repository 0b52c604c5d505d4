"""Job scripts as the command makes them, under a real Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpctrain.data.digits import pack_digits

lab = pytest.importorskip("slurm", reason="the Slurm of the tests is not here")

ROOT = Path(__file__).parents[2]
CLOCKED = {"seconds", "samples_per_second", "time"}
COMMON = ["training.max_epochs=30", "data.micro_batch_size=8"]
SHAPE = ["--nodes", "2", "--ranks-per-node", "1", "--cpus-per-rank", "1", "--gpus-per-node", "2"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    pack_digits(tmp_path / "data" / "digits")
    config = (ROOT / "configs" / "run.toml").read_text(encoding="utf-8")
    config = config.replace("every_steps = 10 ", "every_steps = 1 ")
    (tmp_path / "run.toml").write_text(config, encoding="utf-8")
    return tmp_path


def records(site: Path, run: str = "digits") -> list[dict[str, Any]]:
    path = site / "runs" / run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [
        {key: value for key, value in record.items() if key not in CLOCKED}
        for record in (json.loads(line) for line in lines if line.endswith("}"))
    ]


def outcome(site: Path) -> dict[str, Any]:
    path = site / "runs" / "digits" / "exit.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def environment(slurm: Any) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**slurm.environment, "PATH": path, "SLURM_MPI_TYPE": "pmi2", "OMP_NUM_THREADS": "1"}


def submit(slurm: Any, site: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "hpctrain", "job", "run.toml", *COMMON, "--scheduler", "slurm"]
    result = slurm.run(
        *command,
        *SHAPE,
        "--time",
        "0:09:00",
        "--submit",
        *options,
        cwd=site,
        env=environment(slurm),
    )
    assert result.returncode == 0, result.stderr
    ids: list[str] = result.stdout.split()
    return ids


def undisturbed(site: Path) -> list[dict[str, Any]]:
    result = subprocess.run(
        ["mpirun", "-np", "2", sys.executable, "-m", "hpctrain", "run.toml", *COMMON, "run.name=x"],
        cwd=site,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return records(site, "x")


def wait_for(site: Path, condition: Any, what: str) -> None:
    try:
        lab.wait_for(condition, what, 90)
    except TimeoutError as error:
        logs = "".join(path.read_text(encoding="utf-8") for path in sorted(site.glob("*.log")))
        pytest.fail(f"{error}\n{outcome(site)}\n{logs}")


@pytest.mark.timeout(400)
def test_a_job_that_is_stopped_requeues_itself(slurm: Any, site: Path) -> None:
    """Only the batch shell gets the signal; it hands it on, and asks for another start."""
    (job,) = submit(slurm, site)
    wait_for(site, lambda: len(records(site)) > 40, "steps")
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(site, lambda: outcome(site)["code"] == 75, "stop")
    wait_for(site, lambda: outcome(site)["code"] == 0, "end of the run")
    assert outcome(site)["job"] == f"slurm {job}.1"
    assert outcome(site)["tries"] == 2
    assert records(site) == undisturbed(site)


@pytest.mark.timeout(400)
def test_a_chain_continues_one_run(slurm: Any, site: Path) -> None:
    """The first job is cancelled, the second signalled in its steps; the third completes it."""
    jobs = submit(slurm, site, "--chain", "3")
    assert len(jobs) == 3
    for number, options in ((0, []), (1, ["--signal=USR1"])):
        wait_for(site, lambda n=number: outcome(site).get("tries") == n + 1, "next job")
        begin = len(records(site))
        wait_for(site, lambda start=begin: len(records(site)) > start + 40, "steps")
        slurm.run("scancel", *options, jobs[number])
        wait_for(site, lambda: outcome(site)["code"] == 75, "stop")
    wait_for(site, lambda: outcome(site)["code"] == 0, "end of the run")
    assert outcome(site)["job"] == f"slurm {jobs[2]}.0"
    assert records(site) == undisturbed(site)
