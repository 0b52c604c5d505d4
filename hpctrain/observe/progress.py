"""How far training is: one bar on a terminal, else a plain line now and then.

Every step calls `Progress.update`, so it only notes two numbers and looks at the clock; text is
made when some is due. Plain lines obey an allowance of bytes that grows with time, so that a log
stays small whatever the interval: many lines in the first minutes, when somebody looks, and
fewer and fewer in a job that runs for days.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, TextIO

from hpctrain.observe.bar import Bar
from hpctrain.observe.terminal import terminal_columns
from hpctrain.utils import text

Mode = Literal["auto", "bar", "lines", "none"]

BAR_SECONDS = 0.2
"""Time between two states of the bar."""

FIRST_LINE_SECONDS = 5.0
"""The first plain line comes after this, or after the interval if that is shorter."""

DAY_SECONDS = 86_400.0
DAY_BYTES = 70_000
"""Progress and notes of any one day. The log may hold 100 kB: the rest is left to others."""

BURST_BYTES = 6_000
"""The part of it that is there from the start."""

STAMP_BYTES = 32
"""What a log file adds to a line: time, level, line feed."""

_DEFAULT_COLUMNS = 80

_logger = logging.getLogger(__name__)


def allowance(elapsed_seconds: float) -> float:
    """Return how many bytes may have been written so long after the start.

    It grows with the root of the time for a day, then on in a straight line, and is concave: no
    other 24 hours have more than the first, which have DAY_BYTES.
    """
    days = max(0.0, elapsed_seconds) / DAY_SECONDS
    growth = math.sqrt(days) if days < 1 else (1 + days) / 2
    return BURST_BYTES + (DAY_BYTES - BURST_BYTES) * growth


def seconds_until_allowed(num_bytes: float) -> float:
    """Return how long after the start `num_bytes` may have been written: `allowance` inverted."""
    growth = max(0.0, num_bytes - BURST_BYTES) / (DAY_BYTES - BURST_BYTES)
    return DAY_SECONDS * (growth**2 if growth < 1 else 2 * growth - 1)


def progress_text(
    *,
    step: int,
    total_steps: int,
    epoch: int,
    total_epochs: int | None = None,
    loss: float | None = None,
    samples_per_second: float | None = None,
    seconds_left: float | None = None,
) -> str:
    """Return one line of progress; what is None is left out. Epochs count from 0 everywhere."""
    epochs = "" if total_epochs is None else f"/{total_epochs:,}"
    parts = [f"step {step:,}/{total_steps:,}", f"epoch {epoch:,}{epochs}"]
    if loss is not None:
        parts.append(f"loss {text.metric(loss)}")
    if samples_per_second is not None:
        parts.append(f"{text.number(samples_per_second)} samples/s")
    if seconds_left is not None:
        parts.append(f"{text.duration(seconds_left)} left")
    return "  ".join(parts)


class Progress:
    """The progress of one run, told by the rank that speaks.

    `close` tells the last state and, on a terminal, ends the bar's line.

    Args:
        total_steps: the step at which the run is complete.
        start_step: the step from which this job goes on.
        total_epochs: None where the run is not counted in epochs.
        mode: "auto" is a bar where a person watches, else lines.
        every_seconds: time between two lines; stretched where the allowance asks for it.
        write: takes a finished line; it goes to the log by default.
        clock: seconds, monotonic.
        stream: where the bar is drawn; None is stderr.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        total_epochs: int | None = None,
        mode: Mode = "auto",
        every_seconds: float = 30.0,
        write: Callable[[str], None] = _logger.info,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ) -> None:
        self._total_steps = total_steps
        self._total_epochs = total_epochs
        self._every_seconds = every_seconds
        self._write = write
        self._clock = clock
        self._step, self._epoch = start_step, 0
        self._loss: float | None = None
        self._samples_per_second: float | None = None
        self._told_step = start_step
        self._written_bytes = 0
        self._start = clock()
        # Time left is reckoned from the end of the first step, which is not like the others.
        self._first: tuple[int, float] | None = None

        columns = terminal_columns() if mode in ("auto", "bar") else None
        self._bar: Bar | None = None
        if mode == "bar" or columns is not None:
            self._bar = Bar(total_steps, start_step, columns or _DEFAULT_COLUMNS, stream)
        self._due = math.inf if mode == "none" else self._start

    def update(
        self,
        step: int,
        epoch: int,
        loss: float | None = None,
        samples_per_second: float | None = None,
    ) -> None:
        """Take note of a step that is done, and tell it if it is time.

        Args:
            step: steps done.
            epoch: the epoch that it belongs to, from 0.
            loss: told from now on; None: the last one stays.
            samples_per_second: told from now on; None: the last one stays.
        """
        self._step = step
        self._epoch = epoch
        if loss is not None:
            self._loss = loss
        if samples_per_second is not None:
            self._samples_per_second = samples_per_second
        if self._clock() >= self._due:
            self._tell()

    def note(self, line: str) -> None:
        """Write a line between the others, such as the result of an evaluation.

        It is left out where the allowance is spent; what it tells is in the metrics as well.
        """
        if self._due < math.inf and self._allowed(line):
            self._spend(line)

    def close(self) -> None:
        """Tell the last state, whatever the allowance, and nothing after it."""
        if self._due == math.inf:
            return
        self._due = math.inf
        if self._bar is not None:
            with suppress(OSError):
                self._bar.show(self._step, self._line())
                self._bar.close()
        elif self._step != self._told_step:
            self._write(self._line())

    def _tell(self) -> None:
        now = self._clock()
        if self._bar is not None:
            self._due = now + BAR_SECONDS
            try:
                self._bar.show(self._step, self._line())
            except OSError:  # the terminal is gone: training is not
                self._due = math.inf
        elif self._first is None:
            self._due = self._start + min(self._every_seconds, FIRST_LINE_SECONDS)
        else:
            line = self._line()
            if self._allowed(line):
                self._spend(line)
                self._told_step = self._step
            allowed = self._start + seconds_until_allowed(self._written_bytes + _cost(line))
            self._due = max(now + self._every_seconds, allowed)
        if self._first is None:
            self._first = (self._step, now)

    def _line(self) -> str:
        return progress_text(
            step=self._step,
            total_steps=self._total_steps,
            epoch=self._epoch,
            total_epochs=self._total_epochs,
            loss=self._loss,
            samples_per_second=self._samples_per_second,
            seconds_left=self._seconds_left(),
        )

    def _seconds_left(self) -> float | None:
        if self._first is None or self._step <= self._first[0]:
            return None
        first_step, then = self._first
        pace = (self._clock() - then) / (self._step - first_step)
        return pace * (self._total_steps - self._step)

    def _allowed(self, line: str) -> bool:
        elapsed = self._clock() - self._start
        return self._written_bytes + _cost(line) <= allowance(elapsed)

    def _spend(self, line: str) -> None:
        self._written_bytes += _cost(line)
        self._write(line)


def _cost(line: str) -> int:
    return len(line.encode()) + STAMP_BYTES
