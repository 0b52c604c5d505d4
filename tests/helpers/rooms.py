"""Which tests a worker of pytest collects, where several run all of them.

To import all of them, with what they compare with, is half a minute of CPU for every worker. Some
workers run the unit tests, which compute; the others those that start jobs, which mostly wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

WORKERS_PER_CALCULATOR = 4
"""Of so many workers one runs the unit tests."""

_TESTS = Path(__file__).absolute().parents[1]
_UNIT = _TESTS / "unit"


def calculates(worker: str) -> bool:
    """Return whether a worker, such as "gw3", is one for unit tests."""
    return _number(worker) % WORKERS_PER_CALCULATOR == 0


def room_of(worker: str, arguments: Sequence[str], workers: int) -> str | None:
    """Return which tests a worker collects: "unit", "jobs", or None for all that are asked for.

    Args:
        worker: such as "gw3"; one that takes the place of a crashed one has a number above theirs.
        arguments: what pytest was told to run.
        workers: how many there were at the begin.
    """
    asked = [Path(each.partition("::")[0]).absolute() for each in arguments]
    if workers < WORKERS_PER_CALCULATOR or _number(worker) >= workers or _TESTS not in asked:
        return None
    return "unit" if calculates(worker) else "jobs"


def belongs(path: Path, room: str | None) -> bool:
    """Return whether a folder or file of tests may have tests of a room."""
    if room is None or path == _TESTS or path.parent != _TESTS or not path.is_dir():
        return True
    return (path == _UNIT) == (room == "unit")


def _number(worker: str) -> int:
    return int(worker.removeprefix("gw"))
