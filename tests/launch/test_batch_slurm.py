"""Job scripts as the command makes them, under a real Slurm, ended in every way that it knows.

However often a run was ended, its metrics are those of one that nobody disturbed: no step missing,
none twice, the same bits. Slurm's shortest limit is a minute: the jobs that run into one do so
while the other tests go on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import waiting
from helpers.jobs import undisturbed_metrics
from helpers.runs import metrics
from helpers.slurm import NODES

from hpctrain.convert.digits import pack_digits

pytestmark = pytest.mark.ranks(4)

ROOT = Path(__file__).parents[2]
COMMON = ["training.max_epochs=30"]
SHAPE = ["--nodes", "2", "--ranks-per-node", "1", "--cpus-per-rank", "1"]
SCRIPT = "digits.slurm.sh"

TASK = """
import os
import time
from pathlib import Path

from hpctrain.training.task import Classification

calls = 0


class Slow(Classification):
    def loss(self, model, fields):
        global calls
        calls += 1
        if Path("slow").exists() and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            time.sleep(float(Path("slow").read_text()))
        if Path("stuck").exists() and calls > 100:
            time.sleep(3600)
        return super().loss(model, fields)
"""


def make_site(folder: Path) -> Path:
    pack_digits(folder / "data" / "digits")
    config = (ROOT / "configs" / "run.toml").read_text(encoding="utf-8")
    config = config.replace("every_steps = 10 ", "every_steps = 1 ")
    config = config.replace('use = "classification" ', 'use = "tasks:Slow" ')
    (folder / "run.toml").write_text(config, encoding="utf-8")
    (folder / "tasks.py").write_text(TASK, encoding="utf-8")
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return make_site(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(slurm_lab: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a run leaves that nobody has ended, to compare the others with."""
    return undisturbed_metrics(make_site(tmp_path_factory.mktemp("undisturbed")), *COMMON)


def records(site: Path) -> list[dict[str, Any]]:
    return metrics(site / "runs" / "digits")


def outcome(site: Path) -> dict[str, Any]:
    path = site / "runs" / "digits" / "exit.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def environment(slurm: Any, **more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    python = {"PATH": path, "OMP_NUM_THREADS": "1"}
    return {**slurm.environment, **python, "SLURM_MPI_TYPE": "pmi2", **more}


def submit(slurm: Any, site: Path, *options: str, **variables: str) -> list[str]:
    command = [sys.executable, "-m", "hpctrain", "job", "run.toml", *COMMON]
    if "--site-file" not in options:
        command += ["--scheduler", "slurm"]
    result = slurm.run(
        *(*command, *SHAPE, "--gpus-per-node", "0", "--time", "9:00:00", "--submit", *options),
        cwd=site,
        env=environment(slurm, **variables),
    )
    assert result.returncode == 0, result.stderr
    ids: list[str] = result.stdout.split()
    return ids


def logs(site: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(site.glob("*.log")))


def wait_for(site: Path, condition: Any, what: str) -> None:
    try:
        waiting.wait_for(condition, what)
    except TimeoutError as error:
        pytest.fail(f"{error}\n{outcome(site)}\n{logs(site)}")


@pytest.fixture(scope="module", autouse=True)
def limited(slurm_lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Sites of two jobs that train and will soon meet their limit, of which they do not know.

    One has enough to do for more than that the first time, the other is stuck and heeds no signal.
    Slurm counts limits in minutes: they run into theirs while the other tests go on.
    """
    sites = {name: make_site(tmp_path_factory.mktemp(name)) for name in ("slow", "stuck")}
    far = {"HPCTRAIN_DEADLINE": "2099-01-01"}
    jobs = {}
    for name, site in sites.items():
        (site / name).write_text("0.5", encoding="utf-8")
        (jobs[name],) = submit(slurm_lab, site, "checkpoint.every_steps=10", **far)
    wait_for(sites["slow"], lambda: len(records(sites["slow"])) > 5, "steps of the slow one")
    # Nearer than the time before the limit at which Slurm gives its signal: it comes at once.
    set_limit(slurm_lab, jobs["slow"], 1)
    wait_for(sites["stuck"], lambda: len(records(sites["stuck"])) > 80, "the last steps")
    set_limit(slurm_lab, jobs["stuck"], 0)
    wait_for(sites["slow"], lambda: outcome(sites["slow"])["code"] == 75, "stop")
    # The next one is to have the time that it takes, which nobody knows of this machine.
    set_limit(slurm_lab, jobs["slow"], 60)
    yield sites
    slurm_lab.cancel_all()


def set_limit(slurm: Any, job: str, minutes: int) -> None:
    """Have a job meet its limit after so many minutes more, and up to another one."""
    clock = slurm.run("squeue", "-h", "-j", job, "-o", "%M").stdout.strip()
    elapsed = sum(60**place * int(part) for place, part in enumerate(clock.split(":")[::-1])) // 60
    change = ("scontrol", "update", f"JobId={job}", f"TimeLimit={elapsed + minutes + 1}")
    waiting.wait_for(lambda: slurm.run(*change).returncode == 0, "change of the limit")


def wait_for_steps(site: Path, job: int) -> None:
    """Wait until the job of this number, from 1, has trained for a while."""
    wait_for(site, lambda: outcome(site).get("tries") == job, "start of a job")
    begin = len(records(site))
    wait_for(site, lambda: len(records(site)) > begin + 40, "steps")


def wait_for_end(site: Path, tries: int) -> None:
    wait_for(site, lambda: outcome(site).get("code") == 0, "end of the run")
    assert outcome(site)["tries"] == tries


def test_a_job_that_is_stopped_requeues_itself(
    slurm_lab: Any, site: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """Only the batch shell gets the signal; it hands it on, and asks for another start. The next
    time somebody else asks for it, and Slurm ends the job as it stands."""
    (job,) = submit(slurm_lab, site, "--gpus-per-node", "2")
    wait_for_steps(site, 1)
    slurm_lab.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(site, lambda: outcome(site)["code"] == 75, "stop")
    wait_for_steps(site, 2)
    slurm_lab.run("scontrol", "requeue", job)
    wait_for_end(site, 3)
    assert outcome(site)["job"] == f"slurm {job}.2"
    assert records(site) == undisturbed


def test_a_chain_continues_one_run(
    slurm_lab: Any, site: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """Each job but the last is ended in another way; all read their shards from node-local disk."""
    jobs = submit(slurm_lab, site, "--chain", "4", "data.stage=node-local")
    assert len(jobs) == 4
    ways = (["--signal=USR1"], ["--full", "--signal=USR1"], [])
    for number, options in enumerate(ways):
        wait_for_steps(site, number + 1)
        slurm_lab.run("scancel", *options, jobs[number])
    wait_for_end(site, 4)
    assert outcome(site)["job"] == f"slurm {jobs[3]}.0"
    assert records(site) == undisturbed
    assert "data.stage: 10 shards on the disk of n1" in logs(site)
    for node in NODES:
        assert not list((slurm_lab.folder / f"tmp.{node}").glob("hpctrain-*"))


def test_the_signal_before_the_limit_stops_in_time(
    slurm_lab: Any, limited: dict[str, Path], undisturbed: list[dict[str, Any]]
) -> None:
    site = limited["slow"]
    wait_for_end(site, 2)
    assert "stopped by SIGUSR1" in logs(site)
    assert records(site) == undisturbed


def test_a_job_killed_by_the_limit_loses_little(
    slurm_lab: Any, limited: dict[str, Path], undisturbed: list[dict[str, Any]]
) -> None:
    """Its last word is that it runs; the next one goes on from what was saved by the way."""
    site = limited["stuck"]
    wait_for(site, lambda: "DUE TO TIME LIMIT" in logs(site), "the limit")
    (site / "stuck").unlink()
    assert outcome(site)["code"] is None
    before = len(records(site))
    assert slurm_lab.run("sbatch", SCRIPT, cwd=site, env=environment(slurm_lab)).returncode == 0
    wait_for(site, lambda: outcome(site)["tries"] == 2, "next job")
    # Until it is resumed its record has the first step of the job before.
    near = range(before - 20, before + 1)
    wait_for(site, lambda: outcome(site)["first_step"] in near, "step near the last")
    wait_for(site, lambda: outcome(site)["code"] == 0, "end of the run")
    assert records(site) == undisturbed


OURS = """
name = "ours"
title = "The cluster of the tests"
scheduler = "slurm"
ranks_per_node = 1
cpus_per_rank = 1
gpus_per_node = 0
queue_option = "--partition"
queues = [{ name = "debug", limits = [{ hours = 10 }] }]
"""


def test_a_site_of_ones_own_a_module_and_a_budget(slurm_lab: Any, site: Path) -> None:
    """Python comes from a module alone; of three jobs that it takes, the budget is for two."""
    (site / "ours.toml").write_text(OURS, encoding="utf-8")
    python = Path(sys.executable).parent
    (site / "modules.sh").write_text(
        f"module() {{ [[ $* == 'load torch/2.8' ]] && PATH={python}:$PATH; }}\n", encoding="utf-8"
    )
    elsewhere = [part for part in os.environ["PATH"].split(":") if Path(part) != python]
    options = ["--site-file", "ours.toml", "--setup", "source ./modules.sh"]
    options += ["--module", "torch/2.8", "--max-node-hours", "40", "--time", "8:00:00"]
    (job,) = submit(slurm_lab, site, *options, PATH=":".join(elsewhere))
    for number in (1, 2):
        wait_for_steps(site, number)
        slurm_lab.run("scancel", "--batch", "--signal=USR1", job)
        wait_for(site, lambda: outcome(site)["code"] == 75, "stop")
    wait_for(site, lambda: "means that another job would be of no use" in logs(site), "the end")
    status = [sys.executable, "-m", "hpctrain", "status", "runs/digits"]
    found = slurm_lab.run(*status, "--json", cwd=site, env=environment(slurm_lab)).stdout
    told = json.loads(found)
    assert told["state"] == "budget"
    assert "2 jobs of up to 32 node-hours, and another of 16" in told["explanation"]
    assert 0 < told["node_hours"] < 32
    assert told["jobs_without_end"] == 0
    assert slurm_lab.run("squeue", "-h", "-j", job).stdout.strip() == ""


def pack_environment(site: Path) -> str:
    """Make an archive of an environment; what it brings is the Python of the tests."""
    (site / "bin").mkdir()
    (site / "bin" / "python").write_text(
        f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8"
    )
    (site / "bin" / "python").chmod(0o755)
    subprocess.run(["tar", "-czf", "packed.tar.gz", "bin"], cwd=site, check=True)
    return "packed.tar.gz"


def unpacked(slurm: Any) -> list[str]:
    """Return what is left of environments on the nodes' own disks."""
    return [
        str(path)
        for node in NODES
        for path in (slurm.folder / f"tmp.{node}").glob("hpctrain-*/bin/python")
    ]


def test_the_same_script_checks_and_trains_nothing(slurm_lab: Any, site: Path) -> None:
    """Cost, room, quota, the way between nodes and the image are in the report.

    Each node has a copy of the packed environment for as long as the job runs.
    """
    submit(slurm_lab, site, "--environment", pack_environment(site), HPCTRAIN_CHECK="1")
    wait_for(site, lambda: len(unpacked(slurm_lab)) == 2, "copies")
    wait_for(site, lambda: "\nready: " in logs(site), "report")
    assert not (site / "runs").exists()
    for name, fact in (
        ("cost", "all steps on 2 nodes: about .* node-hours"),
        ("disk space", ".* free"),
        ("quota", ""),
        ("transport", "gloo, over sockets of "),
        ("image", "(no container|.*; in it MPI)"),
    ):
        assert re.search(rf"^(pass|warn|skip) +{name} +{fact}", logs(site), re.MULTILINE), name
    wait_for(site, lambda: not unpacked(slurm_lab), "end of the copies")
    assert "may still be" not in logs(site)
