"""Life in a batch system: asked to stop at any time, by anybody, and back bit for bit."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import Job, here, train_in_turn, undisturbed_metrics
from helpers.launching import ROOT
from helpers.runs import last_step, metrics, outcome
from helpers.slow_sites import make_slow_site
from helpers.waiting import wait_for

pytestmark = pytest.mark.ranks(2)


@pytest.fixture
def site(tmp_path: Path, digits: Path) -> Path:
    """A directory to start jobs in."""
    return make_slow_site(tmp_path, digits)


def status(site: Path, *, code: int) -> None:
    """Check what a script hears of the run."""
    here(site, "status", "runs/digits", "--exit-code", code=code)


def test_a_stop_in_a_long_evaluation(site: Path, start: Callable[..., Job]) -> None:
    """Only the last rank is told. The evaluation is left, and is what the next job begins with;
    also where it was the last of the run. All metrics are those of an uninterrupted run."""
    # The ranks have unequal numbers of batches to evaluate: 180 and 179 samples, one by one. They
    # train on the same few, in 6 steps an epoch.
    common = ["training.max_epochs=2", "data.micro_batch_size=1", "training.clip_norm=0.5"]
    common += ["data.train=data/digits/validation"]
    epoch_steps = 6
    run = site / "runs" / "stopped"
    slow = site / "slow-evaluation"
    slow.write_text("0.1")
    for number in (1, 2):
        job = start(2, *common, "run.name=stopped")
        if number == 2:
            # The one that is owed, in the way of those that come after.
            wait_for(lambda: "running" in outcome(run).get("reason", ""))
            slow.write_text("0.01")
            wait_for(lambda: len(metrics(run, "evaluation")) == 1)
            slow.write_text("0.1")
        wait_for(lambda steps=number * epoch_steps: last_step(run) == steps)
        (site / "evaluating").unlink(missing_ok=True)
        wait_for((site / "evaluating").exists)
        job.signal_rank(1, signal.SIGUSR1)
        code, output = job.wait()
        assert code == 75, output
        assert outcome(run)["step"] == number * epoch_steps
        assert outcome(run)["reason"] == "stopped by SIGUSR1"
        assert len(metrics(run, "evaluation")) == number - 1
    slow.unlink()
    train_in_turn(site, 2, [*common, "run.name=whole"], [*common, "run.name=stopped"])
    assert metrics(run) == metrics(site / "runs" / "whole")
    assert (run / "latest").read_text() == (site / "runs" / "whole" / "latest").read_text()


def test_a_stop_in_start_up_and_in_the_first_step(site: Path, start: Callable[..., Job]) -> None:
    run = site / "runs" / "digits"
    (site / "slow-step").write_text("2")
    job = start(2)
    wait_for((run / "exit.json").exists)
    job.signal_rank(1, signal.SIGTERM)
    code, output = job.wait()
    assert code == 75, output
    assert outcome(run)["step"] <= 2
    status(site, code=75 if outcome(run)["step"] else 1)

    stopped_at = outcome(run)["step"]
    job = start(2)
    wait_for(lambda: last_step(run) > stopped_at)
    job.signal_rank(1, signal.SIGUSR2)  # in the second step of this job
    code, output = job.wait()
    assert code == 75, output
    assert 1 <= outcome(run)["step"] - stopped_at <= 3
    status(site, code=75)


def test_the_file_stop_holds_a_run_until_it_is_removed(
    site: Path, start: Callable[..., Job]
) -> None:
    run = site / "runs" / "digits"
    long = ["training.max_epochs=10000", "checkpoint.every_steps=7"]
    job = start(2, *long)
    wait_for(lambda: last_step(run) > 20)
    (run / "STOP").touch()
    code, output = job.wait()
    assert code == 75, output
    assert outcome(run)["reason"] == "stopped by the file STOP"
    status(site, code=1)
    stopped_at = outcome(run)["step"]
    output = here(site, "run.toml", *long, code=75)
    assert "before the first step" in output
    assert outcome(run)["step"] == stopped_at
    (run / "STOP").unlink()
    status(site, code=1)  # the last job has gained nothing
    here(site, "run.toml", f"training.max_steps={stopped_at + 5}")


def test_the_time_limit(site: Path, start: Callable[..., Job]) -> None:
    """Counted from the start of the job; a margin for the last save is kept."""
    run = site / "runs" / "digits"
    began = time.monotonic()
    # Less time than an end takes: stopped at once, and scripts learn that nothing was gained.
    code, output = start(2, "training.max_epochs=100000", "run.max_seconds=5").wait()
    assert code == 75, output
    assert "before the first step" in output
    status(site, code=1)
    # As long as it takes here to start, several times, beside the margin; the cores are for others.
    (site / "slow-step").write_text("0.5")
    limit = 12 + 3 * (time.monotonic() - began)
    code, output = start(2, "training.max_epochs=100000", f"run.max_seconds={limit}").wait()
    assert code == 75, output
    assert outcome(run)["reason"] == "stopped by the time limit"
    assert outcome(run)["step"] > 0
    status(site, code=75)


# No answer in time is asked for again, however long a machine takes to come to that step; the job
# waits for it a little later.
WAIT_UNTIL_STEP = """\
for _ in $(seq 200); do
  grep -qs '"step": 30,' runs/digits/metrics.jsonl && rm -f held && break
  sleep 0.1
done
[[ ! -e held ]] || exit 1
"""
HELD = """

passes = 0


class Held(Slow):
    def loss(self, model, fields):
        global passes
        passes += 1
        while passes > 200 and Path("held").exists():
            time.sleep(0.05)
        return super().loss(model, fields)
"""

# The commands of LSF, PBS and Flux, with their output and what they set for a job. Real are the
# script, the ranks, and that one job follows another. The first job is told that its time is nearly
# over once it has come to step 30; from the second on there is time for all.
FLUX = Path(__file__).parent / "shims" / "flux"
SHIMS = {
    "flux": f"""\
[[ $1 != --parent ]] || {{ shift; FLUX_DEPTH=; }}
case "${{FLUX_DEPTH:-}} $1 $2" in
  " batch "*)
    while [[ $2 == --*=* ]]; do
      case $2 in
        --dependency=afterany:f*) ;;  # the lock below sees to it
        --env=*) export "${{2#*=}}" ;;
        *) exit 2 ;;
      esac
      shift
    done
    id=$(($(cat jobs-so-far 2>/dev/null || echo 0) + 1)); echo $id >jobs-so-far
    cp "$2" spool.$id
    FLUX_DEPTH=1 FLUX_ENCLOSING_ID=ƒ$id setsid flock -o lock bash spool.$id >log.$id 2>&1 &
    echo ƒ$id
    ;;
  "1 getattr size") echo 1 ;;
  "1 getattr jobid") echo $FLUX_ENCLOSING_ID ;;
  "1 job timeleft")
    [[ $FLUX_ENCLOSING_ID == ƒ1 ]] || {{ echo 7200; exit; }}
{WAIT_UNTIL_STEP}
    echo 5
    ;;
  *) exec {FLUX} "$@" ;;
esac
""",
    "bsub": """\
id=$(($(cat jobs-so-far 2>/dev/null || echo 0) + 1)); echo $id >jobs-so-far
cat >spool.$id
LSB_JOBID=$id LSB_DJOB_NUMPROC=2 setsid flock -o lock bash spool.$id >log.$id 2>&1 &
echo "Job <$id> is submitted to default queue <normal>."
""",
    "bjobs": f"""\
[[ "$*" == "-noheader -o time_left $LSB_JOBID" ]] || exit 255
[[ $LSB_JOBID == 1 ]] || {{ echo "2:00 L"; exit; }}
{WAIT_UNTIL_STEP}
echo "00:00:05 L"
""",
    "qsub": """\
id=$(($(cat jobs-so-far 2>/dev/null || echo 0) + 1)); echo $id >jobs-so-far
cp "${@: -1}" spool.$id; { hostname; hostname; } >nodes
cd / && PBS_JOBID=$id.head PBS_O_WORKDIR=$OLDPWD PBS_NODEFILE=$OLDPWD/nodes OMP_NUM_THREADS=2 \\
  setsid flock -o "$OLDPWD/lock" bash "$OLDPWD/spool.$id" >"$OLDPWD/log.$id" 2>&1 &
echo $id.head
""",
    "qstat": f"""\
[[ "$*" == "-f -F json $PBS_JOBID" ]] || exit 2
used=00:00:10
if [[ $PBS_JOBID == 1.head ]]; then
{WAIT_UNTIL_STEP}
used=00:59:55
fi
cat <<END
{{
    "timestamp":1795000000,
    "pbs_version":"23.06.06",
    "pbs_server":"head",
    "Jobs":{{
        "$PBS_JOBID":{{
            "Job_Name":"digits",
            "resources_used":{{
                "cpupercent":98,
                "ncpus":2,
                "walltime":"$used"
            }},
            "job_state":"R",
            "Resource_List":{{
                "mpiprocs":2,
                "nodect":1,
                "select":"1:ncpus=2:mpiprocs=2",
                "walltime":"01:00:00"
            }}
        }}
    }}
}}
END
""",
}


SCRIPTED = ["training.max_epochs=5", "data.micro_batch_size=8"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> list[dict[str, Any]]:
    """What to compare the runs of job scripts with."""
    site = make_slow_site(tmp_path_factory.mktemp("undisturbed"), digits)
    return undisturbed_metrics(site, *SCRIPTED)


@pytest.mark.parametrize(
    ("scheduler", "submits", "job"),
    [("lsf", "bsub", "1"), ("pbs", "qsub", "1.head"), ("flux", "flux", "f1")],
)
def test_the_script_of_a_scheduler_brings_a_run_to_its_end(
    site: Path,
    undisturbed: list[dict[str, Any]],
    scheduler: str,
    submits: str,
    job: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (site / "held").touch()
    with (site / "tasks.py").open("a", encoding="utf-8") as file:
        file.write(HELD)
    commands = site / "commands"
    commands.mkdir()
    for name, body in SHIMS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}", encoding="utf-8")
        (commands / name).chmod(0o755)
    python = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{commands}:{python}:{os.environ['PATH']}")
    submitted = subprocess.run(
        [
            *("python", "-m", "hpctrain", "job", "run.toml", *SCRIPTED, "task.use=tasks:Held"),
            *("--scheduler", scheduler),
            *("--nodes", "1", "--ranks-per-node", "2", "--cpus-per-rank", "1", "--time", "1:00:00"),
            *("--gpus-per-node", "0", "--output", "job.sh", "--submit"),
        ],
        cwd=site,
        capture_output=True,
        text=True,
        check=False,
    )
    assert submitted.stdout == f"{job}\n", submitted.stderr
    run = site / "runs" / "digits"

    def logs() -> str:
        return "".join(path.read_text(encoding="utf-8") for path in sorted(site.glob("log.*")))

    try:
        wait_for(lambda: (run / "exit.json").exists() and outcome(run)["code"] == 0)
        wait_for(lambda: "state       complete" in logs())
    except TimeoutError:
        pytest.fail(logs())
    assert (site / "jobs-so-far").read_text(encoding="utf-8") == "2\n"
    assert "stopped by the time limit" in (site / "log.1").read_text(encoding="utf-8")
    assert outcome(run)["tries"] == 2
    assert metrics(run) == undisturbed
    assert re.search(r"resumes from step \d+", logs())
    assert shutil.which(submits) == str(commands / submits)


def test_killed_at_a_random_moment(tmp_path: Path) -> None:
    """The short form of benchmarks/kill.py."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kill.py"), "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kills" in result.stdout
    assert "0 problems" in result.stdout
