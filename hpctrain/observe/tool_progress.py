"""How far a tool is: a bar where a person watches, else a plain line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from hpctrain.observe.bar import Bar
from hpctrain.observe.progress import BAR_SECONDS
from hpctrain.observe.terminal import terminal_columns
from hpctrain.utils import text

EVERY_SECONDS = 30.0
"""Time between two plain lines; a tool that is done before writes none."""


class ToolProgress:
    """The progress of one command, told on stderr. Call it; `close` ends the bar's line.

    Args:
        what: is done, such as "verify".
        clock: seconds, monotonic.
        stream: where it is told; None is stderr.
        columns: width of the terminal; None: nobody watches.
    """

    def __init__(
        self,
        what: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
        columns: int | None = None,
    ) -> None:
        self._what = what
        self._clock = clock
        self._stream = stream or sys.stderr
        self._columns = columns
        self._start = clock()
        self._due = self._start + (BAR_SECONDS if columns else EVERY_SECONDS)
        self._bar: Bar | None = None

    @classmethod
    def of_job(cls, what: str) -> ToolProgress:
        """Return a bar if a person watches this job, else plain lines."""
        return cls(what, columns=terminal_columns())

    def __call__(self, done: int, total: int) -> None:
        """Note that so much is done, and tell it if it is time."""
        now = self._clock()
        if now < self._due:
            return
        line = self._line(done, total, now - self._start)
        try:
            if self._columns is None:
                self._due = now + EVERY_SECONDS
                self._stream.write(f"{line}\n")
                self._stream.flush()
            else:
                self._due = now + BAR_SECONDS
                if self._bar is None:
                    self._bar = Bar(total, 0, self._columns, self._stream)
                self._bar.show(done, line)
        except OSError:  # nobody listens any more: the work goes on
            self._due = math.inf

    def close(self) -> None:
        """End the line of the bar."""
        self._due = math.inf
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()

    def _line(self, done: int, total: int, elapsed: float) -> str:
        left = f"  {text.duration(elapsed * (total - done) / done)} left" if done else ""
        return f"{self._what} {done:,}/{total:,}  {text.percent(done, total)}{left}"
