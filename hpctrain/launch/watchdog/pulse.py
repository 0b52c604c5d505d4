"""Signs of life: three integers per rank, in memory that its watchdog reads."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_FIELDS = 3
_PROGRESS, _UNHURRIED, _STEP = range(_FIELDS)
ROW_BYTES = 8 * _FIELDS


@dataclass(frozen=True, slots=True)
class Reading:
    """What a rank has last said of itself.

    Attributes:
        progress: grows with every heartbeat; 0: none yet.
        unhurried: it is in something that may take long, such as its first step.
        step: the last one that it finished.
    """

    progress: int
    unhurried: bool
    step: int


class Pulse:
    """A rank's heartbeats. Writing one costs as much as an assignment: no call, no lock."""

    def __init__(self) -> None:
        # Its own until there is a watchdog.
        self._row = memoryview(bytearray(ROW_BYTES)).cast("q")
        self._row[_UNHURRIED] = 1

    def tick(self) -> None:
        """Say that this rank makes progress."""
        self._row[_PROGRESS] += 1

    def step_done(self, step: int) -> None:
        """Say that a whole step is done; from the first one on the shorter limit holds."""
        self._row[_STEP] = step
        self._row[_UNHURRIED] = 0
        self._row[_PROGRESS] += 1

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Have the longer limit hold in the body."""
        before = self._row[_UNHURRIED]
        self._row[_UNHURRIED] = 1
        try:
            yield
        finally:
            self._row[_UNHURRIED] = before
            self._row[_PROGRESS] += 1

    def share(self, memory: mmap.mmap, index: int) -> None:
        """Go on in row `index` of memory that the watchdog sees."""
        row = memoryview(memory).cast("q")[_FIELDS * index : _FIELDS * (index + 1)]
        row[:] = self._row
        self._row = row

    @property
    def step(self) -> int:
        return self._row[_STEP]


def read_row(memory: mmap.mmap, index: int) -> Reading:
    """Return what the rank of row `index` has written."""
    with memoryview(memory) as view, view.cast("q") as rows:
        progress, unhurried, step = rows[_FIELDS * index : _FIELDS * (index + 1)].tolist()
    return Reading(progress, bool(unhurried), step)
