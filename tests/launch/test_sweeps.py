"""Sweeps under a real Slurm: a job array whose points are runs, one killed and submitted again."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.jobs import here
from helpers.waiting import wait_for

pytestmark = pytest.mark.ranks(2)

SWEEP = ["--sweep", "optimizer.lr=1e-3,3e-4", "--sweep", "run.seed=1,2,3", "--throttle", "2"]
SHAPE = ["--nodes", "1", "--cpus-per-rank", "1", "--gpus-per-node", "0"]
COMMON = ["training.max_epochs=1", "--scheduler", "slurm"]

TASK = """
import os
import sys
import time
from pathlib import Path

from hpctrain.training.task import Classification


class Slow(Classification):
    def loss(self, model, fields):
        is_first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        is_slow = os.environ.get("SLURM_ARRAY_TASK_ID") in ("3", "5") and is_first
        if is_slow and Path("slow").exists():
            time.sleep(0.5)
        if Path("broken").exists() and any('"001"' in word for word in sys.argv):
            raise ValueError("broken")
        return super().loss(model, fields)
"""


@pytest.fixture
def study(site: Path) -> Path:
    config = (site / "run.toml").read_text(encoding="utf-8")
    config = config.replace('use = "classification" ', 'use = "tasks:Slow" ')
    (site / "run.toml").write_text(config, encoding="utf-8")
    (site / "tasks.py").write_text(TASK, encoding="utf-8")
    return site


def submit(slurm: Any, study: Path, *options: str) -> tuple[str, str]:
    """Submit a sweep, and return the id of its array and what was said of it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"PATH": path, "OMP_NUM_THREADS": "1", "SLURM_MPI_TYPE": "pmi2"}
    command = [sys.executable, "-m", "hpctrain", "job", "run.toml", *COMMON, *SHAPE]
    command += ["--time", "1:00:00", "--submit", *options]
    result = slurm.run(*command, cwd=study, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr


def outcomes(study: Path, name: str = "digits") -> dict[str, Any]:
    paths = (study / "runs" / name).glob("*/exit.json")
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def logs(study: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(study.glob("*.log")))


def wait_for_end(slurm: Any, study: Path) -> None:
    try:
        wait_for(lambda: not slurm.jobs(), "end of the array")
    except TimeoutError as error:
        pytest.fail(f"{error}\n{outcomes(study)}\n{logs(study)}")


def kill_element(slurm: Any, element: str) -> None:
    """Kill script and ranks of an element at once: nobody is left who could submit it again."""
    found = []
    for process in slurm.processes(""):
        with suppress(psutil.Error):
            if process.environ().get("SLURM_ARRAY_TASK_ID") == element:
                found.append(process)
    assert found
    for process in found:
        with suppress(psutil.Error):
            process.kill()


def test_six_points_one_killed_and_submitted_again(slurm: Any, study: Path) -> None:
    """The five that are complete are not begun again; the sixth goes on.

    The last element has the id of the whole array: stopped, it comes back by itself alone.
    """
    (study / "slow").touch()
    every = ["checkpoint.every_steps=5", "--ranks-per-node", "1"]
    job, said = submit(slurm, study, *every, *SWEEP)
    assert "6 points: 6 to submit" in said
    wait_for(lambda: outcomes(study).get("003", {}).get("tries") == 1, "point 3")
    wait_for((study / "runs" / "digits" / "003" / "latest").exists, "a checkpoint of point 3")
    kill_element(slurm, "3")
    wait_for((study / "runs" / "digits" / "005" / "latest").exists, "a checkpoint of point 5")
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_5")
    wait_for_end(slurm, study)
    before = outcomes(study)
    assert {name for name, found in before.items() if found["tries"] == 2} == {"005"}, logs(study)
    assert {name: found["code"] for name, found in before.items()} == {
        f"{number:03}": None if number == 3 else 0 for number in range(6)
    }, logs(study)
    (study / "slow").unlink()
    again, said = submit(slurm, study, *every, *SWEEP)
    assert "6 points: 5 complete, 1 to submit (003)" in said
    assert slurm.run("squeue", "-h", "-r", "-j", again, "-o", "%K").stdout.split() in ([], ["3"])
    wait_for_end(slurm, study)
    after = outcomes(study)
    assert all(found["code"] == 0 for found in after.values()), logs(study)
    assert after.pop("003")["tries"] == 2
    before.pop("003")
    assert after == before
    assert "nothing is submitted" in submit(slurm, study, *every, *SWEEP)[1]
    table = here(study, "runs", "runs/digits", "--sort", "accuracy").splitlines()
    assert re.split("  +", table[0])[:4] == ["run", "state", "optimizer.lr", "run.seed"]
    assert len(table) == 7
    sorted_by = json.loads(here(study, "runs", "runs/digits", "--sort", "accuracy", "--json"))
    found = [row["metrics"]["accuracy"] for row in sorted_by]
    assert found == sorted(found, reverse=True)
    assert sorted_by[0]["point"].keys() == {"optimizer.lr", "run.seed"}


def test_points_side_by_side_one_of_which_fails(slurm: Any, study: Path) -> None:
    """Each is a step of its own; the exit code tells of the one that failed."""
    (study / "broken").touch()
    pack = ["--pack", "3", "--ranks-per-node", "3", "--sweep", "run.seed=1,2,3"]
    pack += ["run.name=packed", "--output", "packed.sh"]
    job, said = submit(slurm, study, *pack)
    assert "up to 1 group x 50 jobs" in said
    wait_for_end(slurm, study)
    codes = {name: found["code"] for name, found in outcomes(study, "packed").items()}
    assert codes == {"000": 0, "001": 70, "002": 0}, logs(study)
    told = (study / f"packed-{job}_0.log").read_text(encoding="utf-8")
    assert "2 of 3 points complete; failed or given up: 001 (code 70). Exit code 70" in told
    assert "ValueError: broken" in logs(study)
