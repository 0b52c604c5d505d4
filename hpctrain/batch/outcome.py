"""exit.json: how a run ended, for job scripts; launchers mix the exit codes of their ranks."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hpctrain.errors import CheckpointError
from hpctrain.utils.files import replace_file

NAME = "exit.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended, or that it has not.

    Attributes:
        code: exit code; None while a job runs, and for ever if it was killed.
        reason: in words.
        step: the last one that is saved.
        tries: jobs of this run so far.
        first_step: the step at which the last of them began.
        job: the last of them, as its batch system names it.
        save_seconds: what a save takes here, 0 if unknown.
    """

    code: int | None
    reason: str
    step: int
    tries: int
    first_step: int = 0
    job: str | None = None
    save_seconds: float = 0.0
    time: str = ""


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write exit.json, whole or not at all.

    Raises:
        CheckpointError: if it cannot be written.
    """
    content = asdict(outcome) | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        replace_file(folder / NAME, json.dumps(content, indent=1).encode())
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


def newest_saved(folder: Path) -> tuple[str | None, int]:
    """Return name and step of the newest checkpoint, by a run folder's `latest`; None and 0."""
    try:
        name = (folder / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        return None, 0
    match = re.fullmatch(r"step-(\d+)", name)
    return name or None, int(match[1]) if match else 0
