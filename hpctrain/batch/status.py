"""What is known of a run, for people and for job scripts: where it stands, and what to do next."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.batch.outcome import NAME, Outcome, newest_saved, read_outcome
from hpctrain.errors import ConfigError, ExitCode
from hpctrain.utils.batch_job import job_identity
from hpctrain.utils.run_folder import STOP_FILE_NAME
from hpctrain.utils.text import metric, printable

DO_NOT_SUBMIT = 1
"""Exit code of `status --exit-code` where nothing failed, but another job would be of no use."""


class State(enum.Enum):
    """What a run needs now."""

    COMPLETE = "complete"
    RUNNING = "running"
    RESUBMIT = "submit again"
    HELD = "held"
    NO_PROGRESS = "no progress"
    TOO_MANY_TRIES = "too many tries"
    NOT_REACHED = "not reached"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A run, as its folder tells it.

    Attributes:
        exit_code: that `status --exit-code` ends with; 0, 75, 1, or the failure's own.
        code: exit code of the last job; None while one runs, and for ever if it was killed.
        step: the newest one that is saved.
        gained: steps that the last job has added to what was saved.
        skipped_steps: steps of the run that were not applied.
        checkpoint: name of the newest one.
        metrics: newest records of metrics.jsonl, by "train" or the name of the data evaluated.
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
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_status(
    folder: Path,
    environ: Mapping[str, str],
    max_tries: int | None = None,
    *,
    lives: bool | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
) -> Status:
    """Return what is known of a run.

    Args:
        folder: of the run.
        environ: of the caller; a job script asks about its own job.
        max_tries: jobs after which the run is given up; None: no bound.
        lives: whether the process that holds the folder does; None: that cannot be told from here.
        metrics: see `Status`.

    Raises:
        ConfigError: if the folder is not there or holds no run.
        CheckpointError: if exit.json is damaged.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    outcome = read_outcome(folder)
    if outcome is None:
        raise ConfigError(f"{folder} holds no run: there is no {NAME} in it")
    checkpoint, saved = newest_saved(folder)
    # A killed job has saved more than it could say.
    step = max(outcome.step, saved)
    state, exit_code, explanation = judge(
        outcome,
        gained=step - outcome.first_step,
        held=(folder / STOP_FILE_NAME).exists(),
        job=job_identity(environ),
        max_tries=max_tries,
        lives=lives,
    )
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
        metrics=metrics or {},
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
    """Return what a run needs now, the exit code that says so, and both in words.

    Args:
        outcome: the last word of its last job.
        gained: steps which that job has added to what is saved.
        held: a file STOP is in the folder.
        job: the caller, if it is a batch job; the last word has to be from it.
        max_tries: jobs after which the run is given up.
        lives: whether the process that holds the folder does; None: that cannot be told from here.
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
    ):
        if obstacle:
            return state, DO_NOT_SUBMIT, f"{how}; {words}"
    return State.RESUBMIT, ExitCode.STOPPED, f"{how}: submit again"


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
    }
    return how + why_held.get(state, "")


def to_text(folder: Path, status: Status, *, for_script: bool = False) -> str:
    """Return a status for people; the last row of one for a script is for the end of its log."""
    # What a job says of itself while it runs, or once it is complete, is in the state already.
    known = status.reason in (State.RUNNING.value, State.COMPLETE.value)
    rows = [
        ("state", status.explanation if known else f"{status.explanation} ({status.reason})"),
        ("exit code", "none yet" if status.code is None else str(status.code)),
        ("step", f"{status.step}, {status.gained} of them gained by the last job"),
        *([("not applied", f"{status.skipped_steps} steps")] if status.skipped_steps else []),
        ("tries", str(status.tries)),
        ("checkpoint", status.checkpoint or "none"),
        *((name, _metrics(record)) for name, record in status.metrics.items()),
        ("since", status.since),
        *([("ending", ending(status))] if for_script else []),
    ]
    lines = (f"  {printable(label):<11} {printable(value)}\n" for label, value in rows)
    return f"run {folder}\n" + "".join(lines)


def _metrics(record: Mapping[str, Any]) -> str:
    """Return the place and the numbers of a record of metrics.jsonl."""
    left_out = ("kind", "split", "step", "epoch", "samples_seen", "samples_per_second")
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
