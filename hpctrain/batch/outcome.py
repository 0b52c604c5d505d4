"""exit.json: how a run ended, for job scripts; launchers mix the exit codes of their ranks.

Several write it: rank 0, ranks that fail, watchdogs of any node. What it says in the end does not
depend on who comes last. In this order:

1. what all ranks agreed on, as rank 0 says it: complete, or stopped and saved;
2. of all failures the one that was told first: what follows is mostly an echo of it;
3. that the job runs.

Whoever ends a job writes its word to a file of its own kind first, which the first of a kind does,
then looks which words there are, and writes the best to exit.json until no better one has come.
Standard library only: the watchdog uses it.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hpctrain.errors import CheckpointError, ExitCode
from hpctrain.utils.files import create_file, replace_file
from hpctrain.utils.json_files import SMALL, parse_json, read_name, read_whole
from hpctrain.utils.permissions import explained

NAME = "exit.json"
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
        reason: in words.
        step: the last one that is saved.
        tries: jobs of this run so far.
        first_step: the step at which the last of them began.
        job: the last of them, as its batch system names it.
        save_seconds: what a save takes here, 0 if unknown.
        token: names the chain of jobs that the last one belongs to, None outside of any.
        skipped_steps: steps of the run up to the last job's end that were not applied.
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
    time: str = ""


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write exit.json, whole or not at all; for the one that holds the folder, as a job begins.

    Raises:
        CheckpointError: if it cannot be written.
    """
    with _told(folder):
        replace_file(folder / NAME, _content(outcome))


def conclude(folder: Path, outcome: Outcome) -> None:
    """Write into exit.json how a job ended, unless there is a better word of it; see above.

    Raises:
        CheckpointError: if it cannot be written.
    """
    words = [folder / f".{NAME}.{outcome.tries}.{kind}" for kind in _KINDS]
    own = _content(outcome)
    is_agreed = outcome.code in (ExitCode.DONE, ExitCode.STOPPED)
    with _told(folder):
        word = words[0 if is_agreed else 1]
        if not word.exists():
            create_file(word, own)
        path = folder / NAME
        while (best := next(filter(None, map(_word, words)), own)) != _bytes(path):
            replace_file(path, best)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _word(path: Path) -> bytes | None:
    """Return a word that is whole, None if there is none."""
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
    """Remove the words of jobs before; for the one that holds the folder."""
    for word in folder.glob(f".{NAME}.*"):
        if word.suffix.removeprefix(".") in _KINDS:
            with suppress(OSError):
                word.unlink()


def _content(outcome: Outcome) -> bytes:
    content = asdict(outcome) | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return json.dumps(content, indent=1).encode()


@contextmanager
def _told(folder: Path) -> Iterator[None]:
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
    for field in fields(Outcome):
        kind, fits = _FITTING[str(field.type)]
        if field.name in document:
            value = values[field.name] = document[field.name]
            if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
                raise ValueError(f"{field.name} is {value!r:.60}, expected {field.type}")
        elif field.default is MISSING:
            raise ValueError(f"{field.name} is missing")
    return Outcome(**values)


def newest_saved(folder: Path) -> tuple[str | None, int]:
    """Return name and step of the newest checkpoint, by a run folder's `latest`; None and 0.

    Raises:
        CheckpointError: if `latest` is damaged.
    """
    path = folder / "latest"
    try:
        name = read_name(path)
    except FileNotFoundError:
        return None, 0
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; remove it, the next save writes it anew"
        ) from error
    match = re.fullmatch(r"step-(\d+)", name)
    return name, int(match[1]) if match else 0
