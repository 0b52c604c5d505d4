"""The last line of a job script's log: how it ended, what the code means, what it has used."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.flux import write_flux
from helpers.limits import JOB_SECONDS

from hpctrain.batch.exit_status import Outcome, write_outcome
from hpctrain.cli import main

ROOT = Path(__file__).parents[3]
RUN = Path("runs", "digits")

# What each batch system sets for a job of two nodes, and the command that takes the next one.
JOBS = {
    "slurm": ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, "srun", "scontrol", ""),
    "lsf": (
        {"LSB_JOBID": "7", "LSB_DJOB_NUMPROC": "8", "LSB_MCPU_HOSTS": "n1 4 n2 4"},
        "mpirun",
        "bsub",
        "echo 'Job <8> is submitted to queue <q9>.'",
    ),
    "pbs": ({"PBS_JOBID": "7.head"}, "mpiexec", "qsub", "echo 8.head"),
    "flux": ({"FLUX_ENCLOSING_ID": "ƒ7"}, "flux-run", "flux-batch", "echo $* >again; echo ƒ8"),
}
TWO_NODES = r"Node-hours used: 0\.\d{3} \(2 x 0:00:\d\d\)\.$"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run.toml").write_bytes((ROOT / "configs" / "run.toml").read_bytes())
    for part in ("train", "validation"):
        (tmp_path / "data" / "digits" / part).mkdir(parents=True)
    (tmp_path / "nodes").write_text("n1\nn1\nn2\nn2\n", encoding="utf-8")
    return tmp_path


def command(here: Path, name: str, body: str) -> None:
    (here / "bin").mkdir(exist_ok=True)
    (here / "bin" / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    (here / "bin" / name).chmod(0o755)


def log_of(here: Path, scheduler: str, *, launcher: str, python: str | None = None) -> list[str]:
    """Return the lines of a job's log; its launcher does what is given."""
    variables, launches, submits, answer = JOBS[scheduler]
    command(here, launches, launcher)
    write_flux(here / "bin")
    command(here, submits, answer)
    command(here, "python", python or f'exec {sys.executable} "$@"')
    asked = ["--scheduler", scheduler, "--nodes", "2", "--time", "2:00:00", "--output", "job.sh"]
    assert main(["job", "configs/run.toml", *asked]) == 0
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    result = subprocess.run(
        ["bash", "job.sh"],
        env={
            **environ,
            **variables,
            "PATH": f"{here}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SLURM_CPUS_PER_TASK": "1",
            "PBS_NODEFILE": str(here / "nodes"),
            "PBS_O_WORKDIR": str(here),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=JOB_SECONDS,
    )
    lines = result.stdout.splitlines()
    said = re.search(r"Exit code (\d+)", lines[-1])
    assert said is not None, result.stdout
    assert int(said[1]) == result.returncode
    return lines


def leave(code: int | None, reason: str, job: str, **changes: int) -> None:
    RUN.mkdir(parents=True, exist_ok=True)
    facts = {"step": 1200, "first_step": 100, "tries": 2} | changes
    write_outcome(RUN, Outcome(code=code, reason=reason, job=job, **facts))


@pytest.mark.parametrize(
    ("scheduler", "name", "known_as"),
    [
        ("slurm", "slurm 7.0", "7"),
        ("lsf", "lsf 7.0", "8"),
        ("pbs", "pbs 7.head.0", "8.head"),
        ("flux", "flux f7.0", "ƒ8"),
    ],
)
def test_a_healthy_stop_reads_as_one(here: Path, scheduler: str, name: str, known_as: str) -> None:
    leave(75, "stopped by the time limit", name)
    lines = log_of(here, scheduler, launcher="exit 143")
    assert re.fullmatch(
        r"hpctrain: stopped and saved at step 1,200, by the time limit, submitted again as "
        rf"{re.escape(known_as)}\. Exit code 75 is no failure\. {TWO_NODES}",
        lines[-1],
    )
    if scheduler == "flux":
        assert (here / "again").read_text(encoding="utf-8") == "--dependency=afterany:f7 job.sh\n"


@pytest.mark.parametrize("name", ["USR1", "HUP"])
def test_a_signal_to_the_script_alone_goes_to_the_ranks_by_flux(here: Path, name: str) -> None:
    """`flux run` of before 2025 would have died of it. HUP is a job that is canceled."""
    leave(75, "stopped by SIGUSR1", "flux f7.0")
    command(here, "flux-job", 'echo "$*" >asked')
    waits = "until [[ -e asked ]]; do sleep 0.05; done; exit 75"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup no script could catch it
    try:
        last = log_of(here, "flux", launcher=f"kill -s {name} $PPID; {waits}")[-1]
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (here / "asked").read_text(encoding="utf-8") == "killall --force --signal=SIGUSR1\n"
    assert ("somebody has ended this job" in last) == (name == "HUP")


@pytest.mark.parametrize(
    ("left", "launcher", "line"),
    [
        ((0, "complete"), "exit 0", r"complete at step 1,200\. Exit code 0\."),
        (
            (70, "rank 3 on n2 failed: see crash-rank-3.json"),
            "exit 1",
            r"failed with code 70 \(a bug or .*\): rank 3 on n2 failed: see .*\. Exit code 70\.",
        ),
        (
            (70, "no progress for 300 s (hang timeout)"),
            "exit 1",
            r"failed with code 70 .*\(hang timeout\)\. Saved is step 1,200\. Exit code 70\.",
        ),
        (
            (None, "running"),
            "exit 137",
            r"was killed, and step 1,200 is saved, submitted again as 8\. Exit code 75 is no f",
        ),
        ((78, "[optimizer] lr: a\nb"), "exit 78", r"failed with code 78 \(config\): .*a\\nb\."),
        (None, "exit 78", r"the launcher ended with code 78: see above\. Exit code 78\."),
        (
            (75, "stopped by SIGTERM"),
            "kill -s TERM $PPID; exit 75",
            r"stopped and saved at step 1,200, by SIGTERM, not submitted again: somebody has ended",
        ),
    ],
    ids=["complete", "crash", "hang", "killed", "config", "no run", "cancelled"],
)
def test_each_end_says_what_it_is(
    here: Path, left: tuple[int | None, str] | None, launcher: str, line: str
) -> None:
    if left is not None:
        leave(*left, "lsf 7.0")
        # On another host: whether its process lives is not known.
    lines = log_of(here, "lsf", launcher=launcher)
    assert re.match(f"hpctrain: {line}", lines[-1]), lines
    assert re.search(TWO_NODES, lines[-1])


def test_without_a_python_the_code_of_the_launcher_is_told(here: Path) -> None:
    lines = log_of(here, "lsf", launcher="exit 75", python="exit 127")
    assert re.match(
        r"hpctrain: the launcher ended with code 75: see above, submitted again as 8\.", lines[-1]
    )


def test_what_cannot_be_submitted_again_is_told(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(75, "stopped by the time limit", "lsf 7.0")
    monkeypatch.setitem(JOBS, "lsf", (*JOBS["lsf"][:3], "echo 'no such project' >&2; exit 255"))
    lines = log_of(here, "lsf", launcher="exit 75")
    assert "no such project" in lines
    assert ", NOT submitted again: submit it by hand. Exit code 75 is no failure." in lines[-1]


def test_what_the_command_leaves_running_is_not_waited_for(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(75, "stopped by the time limit", "pbs 7.head.0")
    stays = "tail -f /dev/null 2>/dev/null & echo $! >stays; echo 8.head"
    monkeypatch.setitem(JOBS, "pbs", (*JOBS["pbs"][:3], stays))
    monkeypatch.setenv("TMPDIR", str(here / "bin"))
    try:
        lines = log_of(here, "pbs", launcher="exit 75")
    finally:
        os.kill(int((here / "stays").read_text(encoding="utf-8")), signal.SIGKILL)
    assert "submitted again as 8.head." in lines[-1]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"first_step": 1200}, "no step was gained, so it is not submitted again. Exit code 1 "),
        ({"tries": 50}, "given up after 50 jobs. Exit code 1 means that another job would be of"),
    ],
)
def test_what_would_be_of_no_use_says_so(here: Path, changes: dict[str, int], line: str) -> None:
    leave(75, "stopped by the time limit", "lsf 7.0", **changes)
    assert line in log_of(here, "lsf", launcher="exit 75")[-1]


@pytest.mark.parametrize(("code", "words"), [(0, "found everything ready"), (69, "wrong: see")])
def test_a_check_says_what_it_found(
    here: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    monkeypatch.setitem(JOBS["lsf"][0], "HPCTRAIN_CHECK", "1")
    assert words in log_of(here, "lsf", launcher=f"exit {code}")[-1]
