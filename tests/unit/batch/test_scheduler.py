"""The time left and whether a job is gone: what schedulers print, who is asked and how often."""

from __future__ import annotations

import json
import math
import os
import stat
import time
from pathlib import Path

import pytest

from hpctrain.batch.scheduler import (
    ASK_AGAIN_SECONDS,
    ASK_EVERY_SECONDS,
    SCHEDULERS,
    Deadline,
    ask,
    end_of_user,
    job_is_gone,
    time_left_of_bjobs,
    time_left_of_flux,
    time_left_of_qstat,
    time_left_of_squeue,
)
from hpctrain.errors import ConfigError
from hpctrain.utils.batch_job import batch_job


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-02:03:04\n", 93784),
        ("23:59:59\n", 86399),
        ("59:58", 3598),
        ("0:07", 7),
        ("0:00", 0),
        ("10-00:00:00", 864000),
        ("UNLIMITED\n", math.inf),
        ("INVALID", None),
        ("NOT_SET", None),
        ("", None),
        ("1:00\n2:00\n", None),
    ],
)
def test_squeue(text: str, seconds: float | None) -> None:
    assert time_left_of_squeue(text) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1:59 L\n", 7140),
        ("0:0 L\n", 0),
        ("00:05 L", 300),
        ("120:00 L", 432000),
        ("01:59:30 L\n", 7170),
        ("0:30", 1800),
        ("-\n", math.inf),
        ("0:10 E\n", None),  # estimates end no job
        ("0:10 X\n", None),
        ("Job <123> is not found\n", None),
        ("", None),
    ],
)
def test_bjobs(text: str, seconds: float | None) -> None:
    assert time_left_of_bjobs(text) == seconds


def qstat(**job: object) -> str:
    """What OpenPBS 23 prints for a job, in its order."""
    content = {
        "timestamp": 1795000000,
        "pbs_version": "23.06.06",
        "pbs_server": "head",
        "Jobs": {
            "12.head": {
                "Job_Name": "digits",
                "job_state": "R",
                **job,
                "Variable_List": {"PBS_O_HOME": "/home/me"},
            }
        },
    }
    return json.dumps(content, indent=4)


NOW = time.mktime((2026, 11, 21, 12, 0, 0, 0, 0, -1))
STARTED = "Sat Nov 21 11:30:00 2026"
LIMIT = {"walltime": "02:00:00", "select": "2:mpiprocs=4"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (qstat(Resource_List=LIMIT, stime=STARTED), 5400),
        # What is used is minutes old: the start says more.
        (qstat(Resource_List=LIMIT, stime=STARTED, resources_used={"walltime": "00:28:10"}), 5400),
        (qstat(Resource_List=LIMIT, resources_used={"walltime": "00:28:10"}), 5510),
        (qstat(Resource_List={"walltime": "100:00:00"}, stime=STARTED), 358200),
        (qstat(Resource_List={"select": "1"}, stime=STARTED), None),
        (qstat(Resource_List=LIMIT), None),
        ("qstat: illegal option -- F", None),
        ("", None),
        ("{}", None),
        ('{"Jobs": {}}', None),
        ('{"Jobs": null}', None),
        # A variable of the job that PBS does not quote as JSON wants it.
        (
            qstat(resources_used={"walltime": "00:10:00"}, Resource_List=LIMIT).replace(
                "/home/me", r"\e[0m"
            ),
            6600,
        ),
    ],
)
def test_qstat(text: str, seconds: float | None) -> None:
    assert time_left_of_qstat(text, NOW) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3599\n", 3599),
        ("0\n", 0),
        ("4294967295\n", math.inf),
        ("flux-job: job has no timelimit\n", None),
        ("-1", None),
        ("", None),
    ],
)
def test_flux(text: str, seconds: float | None) -> None:
    assert time_left_of_flux(text) == seconds


def test_a_script_of_flux_and_what_it_runs_are_one_job() -> None:
    script = batch_job({"FLUX_ENCLOSING_ID": "f1"})
    rank = batch_job({"FLUX_ENCLOSING_ID": "f1", "FLUX_JOB_ID": "f2"})
    alone = batch_job({"FLUX_JOB_ID": "f3"})
    assert script == rank
    assert alone is not None
    assert (alone.scheduler, alone.id) == ("flux", "f3")


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("3600", 1_700_003_600),
        ("0.5", 1_700_000_000.5),
        ("1.8e9", 1_800_000_000),
        ("1800000000", 1_800_000_000),
        ("2026-11-21T12:00:00", NOW),
        ("2026-11-21 12:00", NOW),
        ("2027-01-15T08:00:00Z", 1_800_000_000),
        ("2027-01-15T09:00:00+01:00", 1_800_000_000),
    ],
)
def test_what_users_say(text: str, end: float) -> None:
    assert end_of_user(text, began=1_700_000_000) == end


@pytest.mark.parametrize("text", ["", "soon", "-5", "nan", "inf", "2:00:00", "2026-13-01T00:00"])
def test_what_users_say_wrongly(text: str) -> None:
    with pytest.raises(ConfigError, match="HPCTRAIN_DEADLINE"):
        end_of_user(text, began=0)


@pytest.mark.parametrize(
    ("environ", "question"),
    [
        ({"SLURM_JOB_ID": "7"}, "squeue -h -j 7 -o %L"),
        ({"LSB_JOBID": "8"}, "bjobs -noheader -o time_left 8"),
        ({"LSB_JOBID": "8", "LSB_JOBINDEX": "3"}, "bjobs -noheader -o time_left 8[3]"),
        ({"PBS_JOBID": "9.head"}, "qstat -f -F json 9.head"),
        ({"FLUX_JOB_ID": "f2Abc", "FLUX_ENCLOSING_ID": "f1"}, "flux job timeleft"),
    ],
)
def test_what_the_schedulers_are_asked(environ: dict[str, str], question: str) -> None:
    job = batch_job(environ)
    assert job is not None
    (scheduler,) = (item for item in SCHEDULERS if item.name == job.scheduler)
    assert " ".join(scheduler.question(job)) == question


class Site:
    """A folder of commands, a clock, and what was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 1_700_000_000.0
        self.told: list[str] = []

    def install(self, name: str, script: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\necho >>{self.folder}/calls\n{script}\n", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self) -> int:
        path = self.folder / "calls"
        return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0

    def deadline(self, max_seconds: float | None = None, **environ: str) -> Deadline:
        return Deadline(
            max_seconds=max_seconds,
            environ={"PATH": f"{self.folder}", **environ},
            began=self.now - 60,
            warn=self.told.append,
            clock=lambda: self.now,
        )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("PATH", str(tmp_path))
    return Site(tmp_path)


def test_nobody_knows_and_nobody_is_asked(site: Site) -> None:
    deadline = site.deadline()
    deadline.refresh()
    assert deadline.seconds_left() == math.inf
    assert site.told == []


def test_the_scheduler_is_asked_seldom(site: Site) -> None:
    site.install("squeue", "echo 10:00")
    deadline = site.deadline(SLURM_JOB_ID="7")
    assert deadline.seconds_left() == math.inf
    for _ in range(5):
        deadline.refresh()
    assert deadline.seconds_left() == 600
    site.now += 100
    deadline.refresh()
    assert deadline.seconds_left() == 500
    assert site.calls == 1
    site.install("squeue", "echo 1:00:00")  # somebody gave it more time
    site.now += ASK_EVERY_SECONDS
    deadline.refresh()
    assert deadline.seconds_left() == 3600
    assert site.calls == 2
    assert site.told == []


def test_the_end_in_the_environment_needs_no_command(site: Site) -> None:
    deadline = site.deadline(SLURM_JOB_ID="7", SLURM_JOB_END_TIME=f"{site.now + 900:.0f}")
    deadline.refresh()
    assert deadline.seconds_left() == 900
    assert site.calls == 0


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "is not installed here"),
        ("echo slurm_load_jobs error: Unable to contact >&2; exit 1", "Unable to contact"),
        ("echo gibberish", "says 'gibberish'"),
    ],
)
def test_what_is_unknown_is_told_once(site: Site, script: str | None, words: str) -> None:
    if script is not None:
        site.install("squeue", script)
    deadline = site.deadline(SLURM_JOB_ID="7")
    for _ in range(4):
        deadline.refresh()
        site.now += ASK_AGAIN_SECONDS
    assert deadline.seconds_left() == math.inf
    assert len(site.told) == 1
    assert words in site.told[0]
    assert "HPCTRAIN_DEADLINE" in site.told[0]
    site.install("squeue", "echo 5:00")
    deadline.refresh()
    assert deadline.seconds_left() == 300


def test_a_command_that_hangs_has_a_limit(site: Site) -> None:
    site.install("qstat", "exec /bin/sleep 3600")
    text, problem = ask(("qstat",), {"PATH": str(site.folder)}, longest_seconds=0.3)
    assert (text, problem) == ("", "has not answered within 0.3 s")


def test_the_users_word_comes_before_the_scheduler(site: Site) -> None:
    deadline = site.deadline(SLURM_JOB_ID="7", HPCTRAIN_DEADLINE="600")
    deadline.refresh()
    assert deadline.seconds_left() == 540  # began a minute ago
    assert site.told == []


def test_the_earliest_end_counts(site: Site) -> None:
    site.install("bjobs", "echo 1:00 L")
    assert site.deadline(100, HPCTRAIN_DEADLINE="600").seconds_left() == 40
    deadline = site.deadline(100, LSB_JOBID="7")
    deadline.refresh()
    assert deadline.seconds_left() == 40
    site.now += 100
    assert deadline.seconds_left() == -60


SLURM = {"SLURM_JOB_ID": "9", "SLURM_CLUSTER_NAME": "alps"}
PBS = {"PBS_JOBID": "9.head"}
LSF = {"LSB_JOBID": "9"}
INVALID = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
UNREACHABLE = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"


@pytest.mark.parametrize(
    ("environ", "job", "cluster", "prints", "gone"),
    [
        (SLURM, "7", "alps", "echo RUNNING", False),
        (SLURM, "7", "alps", "echo COMPLETING", False),
        (SLURM, "7", "alps", "echo PENDING", False),
        (SLURM, "7", "alps", "true", True),
        (SLURM, "7", "alps", INVALID, True),
        (SLURM, "7", "alps", UNREACHABLE, None),
        # A number of another cluster, or of nobody knows which.
        (SLURM, "7", "jura", INVALID, None),
        (SLURM, "7", "", INVALID, None),
        ({"SLURM_JOB_ID": "9"}, "7", "", INVALID, None),
        # No option is made of what a file says.
        (SLURM, "--help", "alps", "true", None),
        (SLURM, "7 --help", "alps", "true", None),
        (PBS, "7.head", "head", """echo '{"Jobs":{"7.head":{"job_state":"R"}}}'""", False),
        (PBS, "7.head", "head", """echo '{"Jobs":{"7.head":{"job_state":"E"}}}'""", False),
        (PBS, "7.head", "head", """echo '{"Jobs":{"7.head":{"job_state":"F"}}}'""", True),
        (PBS, "7.head", "head", "echo 'qstat: Unknown Job Id 7.head' >&2; exit 153", True),
        (PBS, "7.head", "head", "echo 'qstat: 7.head Job has finished, use' >&2; exit 35", True),
        (PBS, "7.head", "head", "echo 'qstat: cannot connect to server' >&2; exit 111", None),
        (PBS, "7.head", "head", "echo nonsense", None),
        (PBS, "7.other", "other", "exit 153", None),
        (LSF, "7", "", "echo RUN^4*n1:4*n2", False),
        (LSF, "7", "", "echo SSUSP^n1", False),
        (LSF, "7", "", "echo EXIT^4*n1:n2", True),
        (LSF, "7[3]", "", "echo DONE^n2.cluster.org:4*n1.cluster.org", True),
        # A number of another cluster, hosts that do not answer, a job that has not begun.
        (LSF, "7", "", "echo DONE^n7", None),
        (LSF, "7", "", "echo ZOMBI^n1", False),
        (LSF, "7", "", "echo UNKWN^n1", False),
        (LSF, "7", "", "echo PEND^-", None),
        (LSF, "7", "", "echo 'Job <7> is not found' >&2; exit 255", None),
        (LSF, "7", "", "echo 'Job <7> is not found' >&2", None),
        (LSF, "7", "", "printf 'RUN^n1\\nDONE^n1\\n'", None),  # an array
        ({}, "7", "alps", "true", None),
    ],
)
def test_whether_another_job_is_gone(
    tmp_path: Path,
    environ: dict[str, str],
    job: str,
    cluster: str,
    prints: str,
    gone: bool | None,
) -> None:
    for name in ("squeue", "qstat", "bjobs"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{prints}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path["PATH"])
        assert job_is_gone(job, cluster, "n1.other.domain", environ | path) is gone
