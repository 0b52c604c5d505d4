"""What Slurm, LSF, PBS and Flux are asked: the time left of a job, and whether a job is gone."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hpctrain.errors import ConfigError
from hpctrain.utils.batch_job import BatchJob, ascii_id, batch_job

_DEADLINE_VARIABLE = "HPCTRAIN_DEADLINE"
ASK_EVERY_SECONDS = 600.0
"""Limits are changed while jobs run, but schedulers serve thousands of jobs."""
ASK_AGAIN_SECONDS = 60.0
"""After no answer: a busy scheduler may answer the next time."""

_LONGEST_ANSWER_SECONDS = 30.0
_LONGEST_ANSWER_ON_A_JOB_SECONDS = 10.0

Answer = float | None
"""Seconds left, infinite where a job has no limit; None where the text does not tell."""

_SLURM = re.compile(r"(?:(?P<days>\d+)-)?(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)")
_LSF = re.compile(r"(?P<hours>\d+):(?P<minutes>\d+)(?::(?P<seconds>\d+))?(?:\s*(?P<status>[LEX]))?")
_CLOCK = re.compile(r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)")
_PBS_STATE = re.compile(r'"job_state"\s*:\s*"(\w+)"')

_FLUX_UNLIMITED = 2**32 - 1

_FIRST_UNIX_TIME = 1e9
"""September 2001: a larger number is a date, a smaller one a length of time."""


def time_left_of_squeue(text: str, _now: float = 0.0) -> Answer:
    """Read `squeue -h -o %L`: "1-02:03:04", "59:58", "UNLIMITED", "INVALID"."""
    word = text.strip()
    if word == "UNLIMITED":
        return math.inf
    return _seconds(_SLURM.fullmatch(word))


def time_left_of_bjobs(text: str, _now: float = 0.0) -> Answer:
    """Read `bjobs -noheader -o time_left`: "1:59 L", or "01:59:59 L" under LSB_HMS_TIME_FORMAT.

    L is a limit, E an estimate that LSF enforces no more than X, one that is exceeded; "-" is a job
    without any.

    Source: IBM Spectrum LSF 10.1, command reference, bjobs -WL.
    """
    word = text.strip()
    if word == "-":
        return math.inf
    match = _LSF.fullmatch(word)
    return None if match is None or match["status"] in ("E", "X") else _seconds(match)


def time_left_of_qstat(text: str, now: float) -> Answer:
    """Read `qstat -f -F json JOB`: the limit, less the time since the start.

    `resources_used.walltime` is some minutes old on many sites and does not count suspensions;
    `stime` is exact. The one that leaves less time counts.
    """
    try:
        # OpenPBS 19 writes numbers such as 007 and control characters into values of -v.
        job = next(iter(json.loads(text, strict=False)["Jobs"].values()))
        limit = _seconds(_CLOCK.fullmatch(job["Resource_List"]["walltime"]))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
        return _time_left_of_damaged_qstat(text)
    if limit is None:
        return None
    used = _seconds(_CLOCK.fullmatch(str(_walltime_used(job))))
    since = _since(str(job.get("stime", "")), now)
    known = [value for value in (used, since) if value is not None]
    return limit - max(known) if known else None


def time_left_of_flux(text: str, _now: float = 0.0) -> Answer:
    """Read `flux job timeleft`: whole seconds of the job that asks; the largest number: no limit.

    Source: flux-core, doc/man1/flux-job.rst and src/cmd/job/timeleft.c of 2024; not seen on a
    cluster.
    """
    word = text.strip()
    if not re.fullmatch(r"\d{1,20}", word):
        return None
    return math.inf if int(word) >= _FLUX_UNLIMITED else float(word)


def _walltime_used(job: Mapping[str, Any]) -> object:
    used = job.get("resources_used")
    return used.get("walltime") if isinstance(used, dict) else None


def _time_left_of_damaged_qstat(text: str) -> Answer:
    """Read the two times alone: variables of the job can make PBS's JSON invalid."""
    times = re.findall(r'"walltime"\s*:\s*"(\d+:\d+:\d+)"', text)
    if len(times) != 2:
        return None
    # resources_used and Resource_List come in either order; the limit is the longer one.
    one, other = (_seconds(_CLOCK.fullmatch(item)) or 0.0 for item in times)
    return abs(one - other)


def _since(started: str, now: float) -> float | None:
    try:
        then = time.mktime(time.strptime(started, "%a %b %d %H:%M:%S %Y"))
    except (ValueError, OverflowError):
        return None
    return max(0.0, now - then)


def _seconds(match: re.Match[str] | None) -> Answer:
    if match is None:
        return None
    parts = {name: int(value or 0) for name, value in match.groupdict().items() if name != "status"}
    minutes = (parts.get("days", 0) * 24 + parts.get("hours", 0)) * 60 + parts["minutes"]
    return 60.0 * minutes + parts["seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """How one batch system is asked for the time that a job has left.

    Attributes:
        end: variable with the job's end in Unix time, where there is one.
        question: the command, as a function of the job.
        answer: reads what that command prints.
    """

    name: str
    end: str = ""
    question: Callable[[BatchJob], tuple[str, ...]]
    answer: Callable[[str, float], Answer]


SCHEDULERS = (
    Scheduler(
        name="slurm",
        end="SLURM_JOB_END_TIME",
        question=lambda job: ("squeue", "-h", "-j", job.name, "-o", "%L"),
        answer=time_left_of_squeue,
    ),
    Scheduler(
        name="lsf",
        question=lambda job: ("bjobs", "-noheader", "-o", "time_left", job.name),
        answer=time_left_of_bjobs,
    ),
    Scheduler(
        name="pbs",
        question=lambda job: ("qstat", "-f", "-F", "json", job.name),
        answer=time_left_of_qstat,
    ),
    Scheduler(
        name="flux",
        question=lambda _: ("flux", "job", "timeleft"),
        answer=time_left_of_flux,
    ),
)


class Deadline:
    """The earliest end that anybody names: the user, the config, or the scheduler.

    For rank 0 only. Nothing here communicates; `refresh` is the one method that may take long.

    Args:
        max_seconds: the config's own limit, from the beginning of the job; None: none.
        environ: variables that name the job; HPCTRAIN_DEADLINE among them counts before any
            scheduler, and works in containers without its commands.
        began: begin of this job, Unix time.
        warn: sink of one line if the scheduler does not say.
        clock: Unix time.

    Raises:
        ConfigError: if HPCTRAIN_DEADLINE is not a time.
    """

    def __init__(
        self,
        *,
        max_seconds: float | None,
        environ: Mapping[str, str],
        began: float,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._environ = environ
        self._warn = warn
        self._clock = clock
        self._own = math.inf if max_seconds is None else began + max_seconds
        self._job: BatchJob | None = None
        self._scheduled = math.inf
        self._ask_at = math.inf
        self._warned = False
        if environ.get(_DEADLINE_VARIABLE):
            self._own = min(self._own, end_of_user(environ[_DEADLINE_VARIABLE], began))
            return
        self._job = batch_job(environ)
        if self._job is None:
            return
        self._scheduler = next(item for item in SCHEDULERS if item.name == self._job.scheduler)
        self._ask_at = clock()
        end = environ.get(self._scheduler.end, "") if self._scheduler.end else ""
        if end.isdecimal():
            self._scheduled = float(end)
            self._ask_at += ASK_EVERY_SECONDS

    def seconds_left(self) -> float:
        """Return the seconds until the job has to be over; infinite where no end is known."""
        return min(self._own, self._scheduled) - self._clock()

    def refresh(self) -> None:
        """Ask the scheduler if it is time to. May wait for it: not for the training thread."""
        if self._job is None or self._clock() < self._ask_at:
            return
        question = self._scheduler.question(self._job)
        text, problem = ask(question, self._environ)
        now = self._clock()
        left = self._scheduler.answer(text, now) if problem is None else None
        if left is not None:
            self._scheduled = now + left
            self._ask_at = now + ASK_EVERY_SECONDS
            return
        self._ask_at = now + ASK_AGAIN_SECONDS
        if not self._warned:
            self._warned = True
            reason = problem or f"says {text.strip()[:80]!r}"
            known = "" if math.isinf(self._scheduled) else "; the limit known so far stays"
            self._warn(
                f"the time left is unknown: {' '.join(question)} {reason}{known}. Set "
                f"{_DEADLINE_VARIABLE} in the job script, or rely on its signal before the limit"
            )


def end_of_user(text: str, began: float) -> float:
    """Return the end in Unix time that HPCTRAIN_DEADLINE names.

    Args:
        text: an ISO time ("2026-11-21T18:00", local unless it has a zone), a Unix time, or the
            seconds that the job may take from its beginning.
        began: when this process began, Unix time.

    Raises:
        ConfigError: if it is none of these.
    """
    word = text.strip()
    try:
        number = float(word)
    except ValueError:
        pass
    else:
        if math.isfinite(number) and number > 0:
            return number if number >= _FIRST_UNIX_TIME else began + number
    try:
        # Python 3.10 reads no "Z".
        return datetime.fromisoformat(re.sub(r"Z$", "+00:00", word)).timestamp()
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"{_DEADLINE_VARIABLE}={text!r} is not a time: give an ISO time (2026-11-21T18:00), a "
            "Unix time, or seconds from the start of the job"
        ) from error


def job_is_gone(job: str, cluster: str, host: str, environ: Mapping[str, str]) -> bool | None:
    """Tell whether another job has ended, with all its processes; None if that is not known.

    Args:
        job: id of the other job, as its own environment had it.
        cluster: home of that id; the same number means another job on another cluster.
        host: one that the job has run on.
        environ: environment of the job that asks.
    """
    own = batch_job(environ)
    if own is None or not re.fullmatch(r"\w[\w.\[\]-]*", job):
        return None
    limit = _LONGEST_ANSWER_ON_A_JOB_SECONDS
    if own.scheduler == "lsf":
        question = ("bjobs", "-noheader", "-o", "stat exec_host delimiter='^'", job)
        return _gone_by_bjobs(*ask(question, environ, limit), host)
    if not cluster or cluster != own.cluster:
        return None  # also of Flux, whose ids name no cluster
    if own.scheduler == "slurm":
        return _gone_by_squeue(*ask(("squeue", "-h", "-j", job, "-o", "%T"), environ, limit))
    return _gone_by_qstat(*ask(("qstat", "-f", "-F", "json", job), environ, limit))


def _gone_by_squeue(text: str, problem: str | None) -> bool | None:
    """Read the state of a job that squeue shows while it waits, runs or completes."""
    if problem is not None:
        return True if "Invalid job id" in problem else None
    return not text.strip()


def _gone_by_bjobs(text: str, problem: str | None, host: str) -> bool | None:
    """Read the state of a job and its hosts: "DONE^4*n1:n2".

    LSF names its cluster neither in the id nor in the environment: the host tells whether it is the
    job that is meant. ZOMBI and UNKWN are jobs on hosts that do not answer. An hour after its end
    (CLEAN_PERIOD) a job is not found, as one of another cluster is.

    Source: IBM Spectrum LSF 10.1, command reference, bjobs; not seen on a cluster.
    """
    words = text.strip().split("^")
    if problem is not None or len(words) != 2:
        return None
    hosts = [entry.rpartition("*")[2].partition(".")[0] for entry in words[1].split(":")]
    return words[0] in ("DONE", "EXIT") if host.partition(".")[0] in hosts else None


def _gone_by_qstat(text: str, problem: str | None) -> bool | None:
    """Read the state of a job: F and X are finished, E still is about to."""
    if problem is not None:
        return True if re.search("Unknown Job Id|has finished", problem) else None
    found = _PBS_STATE.search(text)
    return None if found is None else found[1] in ("F", "X")


def live_jobs(scheduler: str, jobs: Iterable[str], environ: Mapping[str, str]) -> set[str] | None:
    """Return those of some jobs, elements of arrays by themselves, that wait or run.

    Args:
        scheduler: that has them.
        jobs: as submission or the job itself names them: "8", "8_3", "8[3]", "8[3].server".
        environ: of the caller.

    Returns:
        Their names; None: the scheduler does not say.
    """
    wanted = set(jobs)
    question, names = _LIVE[scheduler]
    whole = "[]" if scheduler == "pbs" else ""
    found: set[str] = set()
    for job in sorted({re.sub(r"_\d+$|\[\d+\]", whole, job) for job in wanted}):
        text, problem = ask((*question, job), environ)
        if problem is not None and not _GONE.search(problem):
            return None
        try:
            found.update(names(text))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    return found & wanted


def _live_by_bjobs(text: str) -> Iterator[str]:
    for line in text.split():
        number, index, state = line.split("^")
        if state not in ("DONE", "EXIT"):
            yield number if index in ("0", "-") else f"{number}[{index}]"


def _live_by_qstat(text: str) -> Iterator[str]:
    jobs = json.loads(text, strict=False)["Jobs"] if text.strip() else {}
    return (name for name, job in jobs.items() if job["job_state"] not in ("F", "X"))


def _live_by_flux(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        job, _, state = line.partition(" ")
        if state.strip() not in ("", "INACTIVE"):
            yield ascii_id(job)


_LIVE: dict[str, tuple[tuple[str, ...], Callable[[str], Iterable[str]]]] = {
    "slurm": (("squeue", "-h", "-r", "-o", "%i", "-j"), str.split),
    "lsf": (("bjobs", "-noheader", "-o", "jobid jobindex stat delimiter='^'"), _live_by_bjobs),
    "pbs": (("qstat", "-t", "-f", "-F", "json"), _live_by_qstat),
    # Of a job that it knows no more it says so beside the list, and ends with code 0.
    "flux": (("flux", "jobs", "-n", "-o", "{id.f58} {state}"), _live_by_flux),
}
"""How each is asked for the elements of a job that are not over, and how its answer is read."""

_GONE = re.compile("Invalid job id|is not found|Unknown Job Id|has finished|JobID .* unknown")
"""What schedulers answer on jobs that have been over for a while."""


def ask(
    command: tuple[str, ...],
    environ: Mapping[str, str],
    longest_seconds: float = _LONGEST_ANSWER_SECONDS,
    codes: Collection[int] = (0,),
) -> tuple[str, str | None]:
    """Return what a command prints, and what went wrong, None if nothing.

    Python starts it by vfork, which copies no page of this process: after MPI_Init, memory that
    the network has registered must not be copied on write.
    """
    try:
        result = subprocess.run(
            command,
            env={**environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=longest_seconds,
            check=False,
        )
    except FileNotFoundError:
        return "", "is not installed here"
    except subprocess.TimeoutExpired:
        return "", f"has not answered within {longest_seconds:g} s"
    except OSError as error:
        return "", f"cannot be run: {error.strerror}"
    if result.returncode not in codes:
        said = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[0]
        return "", f"fails with code {result.returncode}: {said[:120]}"
    return result.stdout, None
