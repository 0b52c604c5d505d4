"""exit.json: how a run ended, and what that means; launchers mix the exit codes of their ranks.

Several write it: rank 0, ranks that fail, watchdogs of any node. What it says in the end does not
depend on who comes last. In this order:

1. what all ranks agreed on, as rank 0 says it: complete, or stopped and saved;
2. of all failures the one that was reported first: what follows is mostly an echo of it;
3. that the job runs.

Whoever ends a job writes its report to a file of its own kind first, which the first of a kind
does, then looks which reports there are, and writes the best to exit.json until no better one has
come. `status` reads it, for people and for job scripts: where a run stands, and what to do next.
Standard library only: the watchdog uses it.
"""

from __future__ import annotations

import enum
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hpctrain.errors import CheckpointError, ConfigError, ExitCode
from hpctrain.utils.batch_job import job_identity
from hpctrain.utils.files import create_file, replace_file
from hpctrain.utils.json_files import SMALL, parse_json, read_whole
from hpctrain.utils.permissions import explained
from hpctrain.utils.run_folder import STOP_FILE_NAME, read_latest, step_of
from hpctrain.utils.text import metric, plural, printable

NAME = "exit.json"
DO_NOT_SUBMIT = 1
"""Exit code of `status --exit-code` where nothing failed, but another job would be of no use."""

_KINDS = ("agreed", "failed")
_READS = 20
_READ_AGAIN_SECONDS = 0.02

_FITTING: dict[str, tuple[tuple[type, ...], Callable[[Any], bool]]] = {
    # The system cuts an exit code to a byte: 256 would be none.
    "int | None": ((int, type(None)), lambda code: code is None or 0 <= code < 256),
    "int": ((int,), lambda count: 0 <= count < 2**63),
    "float": ((int, float), lambda seconds: 0 <= seconds < math.inf),
    "str": ((str,), lambda _: True),
    "str | None": ((str, type(None)), lambda _: True),
}
"""By annotation: what JSON gives for it, and which of these values make sense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended, or that it has not.

    Attributes:
        code: exit code; None while a job runs, and for ever if it was killed.
        reason: cause, for people.
        step: last step that is saved.
        tries: number of jobs of this run so far.
        first_step: the step at which the last of them began.
        job: the last of them, as its batch system names it.
        save_seconds: seconds that a save takes here, 0 if unknown.
        token: name of the chain of jobs that the last one belongs to, None outside of any.
        skipped_steps: steps of the run up to the last job's end that were not applied.
        max_tries: jobs that the script of the last of them allows for, 0: any number.
        node_hours: what the last of them may take; 0: nobody counts.
        asked_node_hours: what all of them together may have taken, each at its limit.
        max_node_hours: bound of that; 0: none.
    """

    code: int | None
    reason: str
    step: int
    tries: int
    first_step: int = 0
    job: str | None = None
    save_seconds: float = 0.0
    token: str | None = None
    skipped_steps: int = 0
    max_tries: int = 0
    node_hours: float = 0.0
    asked_node_hours: float = 0.0
    max_node_hours: float = 0.0
    time: str = ""

    @property
    def is_beyond_budget(self) -> bool:
        """Whether one more job like the last could take the run beyond its node-hours."""
        # Sums of decimals: 0.1 three times is within 0.3.
        return 0 < self.max_node_hours < (self.asked_node_hours + self.node_hours) * (1 - 1e-9)


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write exit.json, whole or not at all; for the one that holds the folder, as a job begins.

    Raises:
        CheckpointError: if it cannot be written.
    """
    with _writing(folder):
        replace_file(folder / NAME, _content(outcome))


def conclude(folder: Path, outcome: Outcome) -> None:
    """Write into exit.json how a job ended, unless there is a better report of it; see above.

    Raises:
        CheckpointError: if it cannot be written.
    """
    reports = [folder / f".{NAME}.{outcome.tries}.{kind}" for kind in _KINDS]
    own = _content(outcome)
    is_agreed = outcome.code in (ExitCode.DONE, ExitCode.STOPPED)
    with _writing(folder):
        report = reports[0 if is_agreed else 1]
        if not report.exists():
            create_file(report, own)
        path = folder / NAME
        while (best := next(filter(None, map(_report, reports)), own)) != _bytes(path):
            replace_file(path, best)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _report(path: Path) -> bytes | None:
    """Return a report that is whole, None if there is none."""
    for _ in range(_READS):
        try:
            content = path.read_bytes()
            parse_json(content)
            return content
        except FileNotFoundError:
            return None
        except ValueError:  # where there are no links it is not whole for a moment
            time.sleep(_READ_AGAIN_SECONDS)
    return None


def forget_endings(folder: Path) -> None:
    """Remove the reports of jobs before; for the one that holds the folder."""
    for report in folder.glob(f".{NAME}.*"):
        if report.suffix.removeprefix(".") in _KINDS:
            with suppress(OSError):
                report.unlink()


def _content(outcome: Outcome) -> bytes:
    content = asdict(outcome) | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return json.dumps(content, indent=1).encode()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = explained(error, folder)
        raise CheckpointError(f"cannot write {folder / NAME}: {problem}") from error


def read_outcome(folder: Path) -> Outcome | None:
    """Return the last outcome, None where there is none.

    Raises:
        CheckpointError: if exit.json is damaged.
    """
    path = folder / NAME
    try:
        return _outcome(parse_json(read_whole(path, SMALL)))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {explained(error, path)}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; remove it to go on") from error


def _outcome(document: object) -> Outcome:
    """Return what a parsed exit.json says.

    By hand, for the watchdog has no packages to check it with.

    Raises:
        ValueError: if something in it is of another type, naming the key.
    """
    if not isinstance(document, dict):
        raise ValueError(f"it is {type(document).__name__}, not an object")
    values = {}
    for item in fields(Outcome):
        kind, fits = _FITTING[str(item.type)]
        if item.name in document:
            value = values[item.name] = document[item.name]
            if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
                raise ValueError(f"{item.name} is {value!r:.60}, expected {item.type}")
        elif item.default is MISSING:
            raise ValueError(f"{item.name} is missing")
    return Outcome(**values)


def newest_saved(folder: Path) -> tuple[str | None, int]:
    """Return name and step of the newest checkpoint, by a run folder's `latest`; None and 0.

    Raises:
        CheckpointError: if `latest` is damaged.
    """
    name = read_latest(folder)
    return name, 0 if name is None else step_of(name) or 0


class State(enum.Enum):
    """What a run needs now."""

    COMPLETE = "complete"
    RUNNING = "running"
    RESUBMIT = "submit again"
    HELD = "held"
    NO_PROGRESS = "no progress"
    TOO_MANY_TRIES = "too many tries"
    BUDGET = "budget"
    NOT_REACHED = "not reached"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A run, as its folder tells it.

    Attributes:
        exit_code: code of `status --exit-code`: 0, 75, 1, or the failure's own.
        code: exit code of the last job; None while one runs, and for ever if it was killed.
        step: newest step that is saved.
        gained: steps that the last job has added to what was saved.
        skipped_steps: steps of the run that were not applied.
        checkpoint: name of the newest one.
        node_hours: used by the jobs whose beginning and end are known.
        jobs_without_end: number of the others, which run, or were killed.
        energy: "kwh" that were measured, their "scope", "source" and "coverage", and the "jobs" by
            number; None: none was.
        metrics: newest records of metrics.jsonl, by "train" or the name of the data evaluated.
        goodput: seconds since the run's first job, by what came of them; None: unknown.
    """

    state: str
    exit_code: int
    explanation: str
    code: int | None
    reason: str
    step: int
    gained: int
    tries: int
    skipped_steps: int
    checkpoint: str | None
    job: str | None
    since: str
    node_hours: float | None = None
    jobs_without_end: int = 0
    energy: Mapping[str, Any] | None = None
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    goodput: Mapping[str, float] | None = None


def read_status(
    folder: Path,
    environ: Mapping[str, str],
    max_tries: int | None = None,
    *,
    lives: bool | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    goodput: Mapping[str, float] | None = None,
    used: tuple[float, int] | None = None,
    energy: Mapping[str, Any] | None = None,
) -> Status:
    """Return what is known of a run.

    Args:
        folder: the run's folder.
        environ: the caller's environment; a job script asks about its own job.
        max_tries: jobs after which the run is given up; None: as the last job's script has it.
        lives: whether the process that holds the folder lives; None: that is not known from here.
        metrics: see `Status`.
        goodput: see `Status`.
        used: node-hours, and the number of jobs without an end.
        energy: see `Status`.

    Raises:
        ConfigError: if the folder is not there or holds no run.
        CheckpointError: if exit.json is damaged.
    """
    try:
        is_there = folder.is_dir()
    except PermissionError as error:
        raise ConfigError(f"{folder}: {explained(error, folder)}") from error
    if not is_there:
        raise ConfigError(f"{folder}: no such folder")
    outcome = read_outcome(folder)
    if outcome is None:
        more = f"there is no {NAME} in it"
        if (folder / "sweep.json").exists():
            more = f"but a sweep, whose points `python -m hpctrain runs {folder}` lists"
        raise ConfigError(f"{folder} holds no run: {more}")
    checkpoint, saved = newest_saved(folder)
    # A killed job has saved more than it could say.
    step = max(outcome.step, saved)
    state, exit_code, explanation = judge(
        outcome,
        gained=step - outcome.first_step,
        held=(folder / STOP_FILE_NAME).exists(),
        job=job_identity(environ),
        max_tries=max_tries or outcome.max_tries or None,
        lives=lives,
    )
    node_hours, jobs_without_end = (None, 0) if used is None else used
    return Status(
        state=state.value,
        exit_code=exit_code,
        explanation=explanation,
        code=outcome.code,
        reason=outcome.reason,
        step=step,
        gained=step - outcome.first_step,
        tries=outcome.tries,
        skipped_steps=outcome.skipped_steps,
        checkpoint=checkpoint,
        job=outcome.job,
        since=outcome.time,
        node_hours=node_hours,
        jobs_without_end=jobs_without_end,
        energy=energy,
        metrics=metrics or {},
        goodput=goodput,
    )


def judge(
    outcome: Outcome,
    *,
    gained: int,
    held: bool,
    job: str | None,
    max_tries: int | None,
    lives: bool | None = None,
) -> tuple[State, int, str]:
    """Return what a run needs now, its exit code, and an explanation of both.

    Args:
        outcome: the last report of its last job.
        gained: steps which that job has added to what is saved.
        held: a file STOP is in the folder.
        job: the caller, if it is a batch job; the last report has to be from it.
        max_tries: jobs after which the run is given up.
        lives: whether the process that holds the folder lives; None: that is not known from here.
    """
    if job is not None and outcome.job != job:
        why = f"the job that asks ({job}) has not come as far as this folder: see its own messages"
        return State.NOT_REACHED, ExitCode.LAUNCH, why
    if outcome.code == ExitCode.DONE:
        return State.COMPLETE, ExitCode.DONE, "complete"
    if outcome.code not in (None, ExitCode.STOPPED):
        return State.FAILED, outcome.code, "failed"
    how = "stopped and saved"
    if outcome.code is None:
        if lives:
            return State.RUNNING, DO_NOT_SUBMIT, "running"
        how = "running, or was killed" if lives is None else "was killed"
    for obstacle, state, words in (
        (held, State.HELD, f"held by the file {STOP_FILE_NAME}: remove it to go on"),
        (gained <= 0, State.NO_PROGRESS, "no step was gained by the last job"),
        (
            max_tries is not None and outcome.tries >= max_tries,
            State.TOO_MANY_TRIES,
            f"given up after {outcome.tries} jobs",
        ),
        (outcome.is_beyond_budget, State.BUDGET, _budget(outcome)),
    ):
        if obstacle:
            return state, DO_NOT_SUBMIT, f"{how}; {words}"
    return State.RESUBMIT, ExitCode.STOPPED, f"{how}: submit again"


def _budget(outcome: Outcome) -> str:
    """Return why another job is not within the node-hours of a run."""
    jobs, hours = plural(outcome.tries, "job"), f"{outcome.asked_node_hours:.6g}"
    return (
        f"{jobs} of up to {hours} node-hours, and another of {outcome.node_hours:.6g} could exceed "
        f"the budget of {outcome.max_node_hours:.6g} (job --max-node-hours)"
    )


_FAILURES: Mapping[int, str] = {
    ExitCode.USAGE: "usage",
    ExitCode.DATA: "data",
    ExitCode.LAUNCH: "launch",
    ExitCode.BUG: "a bug or diverged training",
    ExitCode.CHECKPOINT_IO: "checkpoint I/O",
    ExitCode.CONFIG: "config",
}


def ending(status: Status) -> str:
    """Return in a line how the last job ended, for the end of its script's log."""
    state, step = State(status.state), f"step {status.step:,}"
    whole = {
        State.COMPLETE: f"complete at {step}",
        State.NOT_REACHED: "this job did not come as far as the run folder: see above",
        State.RUNNING: "the run's process still lives, though its launcher has ended: see above",
    }
    if state in whole:
        return whole[state]
    reason = printable(status.reason)
    if state is State.FAILED:
        meaning = _FAILURES.get(status.exit_code, "not one of hpctrain's")
        return f"failed with code {status.code} ({meaning}): {reason}. Saved is {step}"
    how = f"stopped and saved at {step}, {reason.removeprefix('stopped ')}"
    if status.code is None:
        how = f"was killed, and {step} is saved"
    why_held = {
        State.HELD: f"; held by the file {STOP_FILE_NAME}: remove it to go on",
        State.NO_PROGRESS: "; no step was gained, so it is not submitted again",
        State.TOO_MANY_TRIES: f"; given up after {status.tries} jobs",
        State.BUDGET: "; " + status.explanation.partition("; ")[2],
    }
    return how + why_held.get(state, "")


def to_text(
    folder: Path,
    status: Status,
    *,
    for_script: bool = False,
    goodput: str | None = None,
    energy: str | None = None,
) -> str:
    """Return a status for people; the last row of one for a script is for the end of its log.

    Args:
        folder: of the run.
        status: of it.
        for_script: whether a job script asks.
        goodput: its goodput in a line, None where it is unknown.
        energy: its energy in a line.
    """
    # What a job says of itself while it runs, or once it is complete, is in the state already.
    known = status.reason in (State.RUNNING.value, State.COMPLETE.value)
    rows = [
        ("state", status.explanation if known else f"{status.explanation} ({status.reason})"),
        ("exit code", "none yet" if status.code is None else str(status.code)),
        ("step", f"{status.step}, {status.gained} of them gained by the last job"),
        *([("not applied", f"{status.skipped_steps} steps")] if status.skipped_steps else []),
        ("tries", str(status.tries)),
        *_node_hours(status),
        *([("energy", energy)] if energy else []),
        ("checkpoint", status.checkpoint or "none"),
        *((name, _metrics(record)) for name, record in status.metrics.items()),
        *([("goodput", goodput)] if goodput else []),
        ("since", status.since),
        *([("ending", ending(status))] if for_script else []),
    ]
    lines = (f"  {printable(label):<11} {printable(value)}\n" for label, value in rows)
    return f"run {folder}\n" + "".join(lines)


def _node_hours(status: Status) -> list[tuple[str, str]]:
    if status.node_hours is None:
        return []
    missing = status.jobs_without_end
    more = f", and {plural(missing, 'job')} whose end is not known" if missing else ""
    return [("node-hours", f"{status.node_hours:.3f}{more}")]


def _metrics(record: Mapping[str, Any]) -> str:
    """Return the place and the numbers of a record of metrics.jsonl."""
    left_out = ("kind", "split", "step", "epoch", "wall_time", "samples_seen", "samples_per_second")
    numbers = [
        f"{name} {value if isinstance(value, str) else metric(value)}"
        for name, value in record.items()
        if name not in left_out
        and not name.startswith("seconds.")
        and isinstance(value, int | float | str)
    ]
    return ", ".join([f"step {record['step']:,}", f"epoch {record.get('epoch')}", *numbers])


def to_json(status: Status) -> str:
    """Return a status for programs."""
    return json.dumps(asdict(status), indent=1) + "\n"
