"""exit.json: how a run ended, for job scripts; launchers mix the exit codes of their ranks."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hpctrain.errors import CheckpointError, ConfigError, ExitCode

NAME = "exit.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended, or that it has not.

    Attributes:
        code: exit code; None while a job runs, and for ever if it was killed.
        reason: in words.
        step: the last one that is saved.
        tries: jobs of this run so far.
    """

    code: int | None
    reason: str
    step: int
    tries: int
    time: str = ""


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write exit.json, whole or not at all.

    Raises:
        CheckpointError: if it cannot be written.
    """
    temporary = folder / f".{NAME}.tmp"
    content = asdict(outcome) | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / NAME)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder / NAME}: {error.strerror}") from error


def read_outcome(folder: Path) -> Outcome | None:
    """Return the last outcome, None where there is none.

    Raises:
        CheckpointError: if exit.json is damaged.
    """
    path = folder / NAME
    try:
        return Outcome(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; remove it to go on") from error


def status_text(folder: Path) -> str:
    """Return what is known of a run, for `python -m hpctrain status`.

    Raises:
        ConfigError: if the folder is not there or holds no run.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    outcome = read_outcome(folder)
    if outcome is None:
        raise ConfigError(f"{folder} holds no run: there is no {NAME} in it")
    if outcome.code is None:
        state = "running, or was killed"
    elif outcome.code == ExitCode.DONE:
        state = "complete"
    elif outcome.code == ExitCode.STOPPED:
        state = "stopped and saved: submit again"
    else:
        state = "failed"
    latest = folder / "latest"
    checkpoint = latest.read_text(encoding="utf-8").strip() if latest.is_file() else "none"
    rows = [
        ("state", f"{state} ({outcome.reason})"),
        ("exit code", "none yet" if outcome.code is None else str(outcome.code)),
        ("step", str(outcome.step)),
        ("tries", str(outcome.tries)),
        ("checkpoint", checkpoint),
        ("since", outcome.time),
    ]
    return f"run {folder}\n" + "".join(f"  {label:<12}{value}\n" for label, value in rows)
