"""How far training or a tool is: a bar where a person watches, else a plain line now and then.

Every step calls `Progress.update`, so it only notes two numbers and looks at the clock; text is
made when some is due. Plain lines keep to an allowance of bytes that grows with time, so that a log
stays small whatever the interval: many lines in the first minutes, when somebody looks, and
fewer and fewer in a job that runs for days.

Whether a person watches, a rank's own streams do not tell. MPICH gives its ranks pipes also where
the job was started at a terminal; Open MPI gives them pipes and a pseudo-terminal as stdout, also
where all its output goes to a file. What decides is the stderr of the launcher itself, further up
among the ancestors.
"""

from __future__ import annotations

import logging
import math
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TextIO

from tqdm import tqdm

from hpctrain.utils import proc, text

Mode = Literal["auto", "bar", "lines", "none"]

BAR_SECONDS = 0.2
"""Time between two states of the bar."""

FIRST_LINE_SECONDS = 5.0
"""The first plain line comes after this, or after the interval if that is shorter."""

TOOL_LINE_SECONDS = 30.0
"""Time between two plain lines of a tool; one that is done before writes none."""

DAY_SECONDS = 86_400.0

DAY_BYTES = 70_000
"""Progress and notes of any one day. The log may hold 100 kB: the rest is left to others."""

BURST_BYTES = 6_000
"""The part of it that is there from the start."""

STAMP_BYTES = 32
"""What a log file adds to a line: time, level, line feed."""

_MAX_COLUMNS = 100

_DEFAULT_COLUMNS = 80

STDERR = 2

LAUNCHERS = frozenset({"mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun", "prun"})
"""Programs that carry the output of their ranks to wherever their own goes."""

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
    """The progress of one run, shown by the rank that reports.

    `close` shows the last state and, on a terminal, ends the bar's line.

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
        self._shown_step = start_step
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
            loss: shown from now on; None: the last one stays.
            samples_per_second: shown from now on; None: the last one stays.
        """
        self._step = step
        self._epoch = epoch
        if loss is not None:
            self._loss = loss
        if samples_per_second is not None:
            self._samples_per_second = samples_per_second
        if self._clock() >= self._due:
            self._report()

    def note(self, line: str) -> None:
        """Write a line between the others, such as the result of an evaluation.

        It is left out where the allowance is spent; what it says is in the metrics as well.
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
        elif self._step != self._shown_step:
            self._write(self._line())

    def _report(self) -> None:
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
                self._shown_step = self._step
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


class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """tqdm's bar, drawn when asked to and at no other time.

    Args:
        total: steps of a whole bar.
        initial: steps that it starts with.
        columns: width of the terminal.
        stream: where to draw; None is stderr.
    """

    # tqdm would start a thread that looks after bars that are not updated.
    monitor_interval: ClassVar[int] = 0
    # tqdm's own lock takes semaphores from /dev/shm, for worker processes. There are none here.
    _lock: ClassVar[Any] = threading.RLock()

    def __init__(self, total: int, initial: int, columns: int, stream: TextIO | None) -> None:
        super().__init__(
            total=total,
            initial=initial,
            ncols=min(columns, _MAX_COLUMNS),
            file=stream,
            bar_format="{percentage:3.0f}%|{bar}| {desc}",
            miniters=total + 1,
            mininterval=math.inf,
        )

    def show(self, step: int, line: str) -> None:
        """Draw the bar at `step`, with a line of text beside it."""
        self.n = step
        self.desc = line
        self.refresh()


class AboveBar:
    """A stream for log handlers: where a bar stands on it, text goes above the bar."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write whole lines, line feeds included."""
        Bar.write(text, file=self._stream, end="")

    def flush(self) -> None:
        self._stream.flush()


@dataclass(frozen=True, slots=True)
class Process:
    """One ancestor: its id, and the name of its executable, or as it is called."""

    pid: int
    name: str


def columns_watched(
    own: int | None, ancestors: Iterable[Process], columns_of: Callable[[int], int | None]
) -> int | None:
    """Return the width of the terminal at which a person watches, None if nobody does.

    Args:
        own: width of this process's own terminal; None: its stderr is none.
        ancestors: from the parent upwards; read no further than needed.
        columns_of: width of the terminal that a process writes to, None if it is none.
    """
    for process in ancestors:
        if process.name in LAUNCHERS:
            return columns_of(process.pid)
    return own


def terminal_columns() -> int | None:
    """Return the width of the terminal at which a person watches this job, None if nobody does."""
    if os.environ.get("TERM") == "dumb":
        return None
    return columns_watched(_columns(STDERR), _ancestors(), _columns_of)


def _ancestors() -> Iterator[Process]:
    """Walk up from the parent, as far as /proc shows."""
    for pid in proc.ancestors():
        # mpirun may be a link to what has another name, or a script.
        executable = proc.executable_of(pid)
        yield Process(pid, executable if executable in LAUNCHERS else proc.name_of(pid))


def _columns_of(pid: int) -> int | None:
    """Return the width of the terminal that a process's stderr leads to, None if to none.

    A process of another user keeps its streams to itself, which counts as none.
    """
    path = Path(f"/proc/{pid}/fd/{STDERR}")
    try:
        if not stat.S_ISCHR(path.stat().st_mode):  # opening a pipe would make us one of its ends
            return None
        # Must not become this process's controlling terminal: it would get its signals.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _columns(descriptor)
    finally:
        os.close(descriptor)


def _columns(descriptor: int) -> int | None:
    """Return the width of a terminal, None if the descriptor is of something else."""
    try:
        return os.get_terminal_size(descriptor).columns or 80  # 0 where none was ever set
    except OSError:
        return None


class ToolProgress:
    """The progress of one command, shown on stderr. Call it; `close` ends the bar's line.

    Args:
        what: is done, such as "verify".
        clock: seconds, monotonic.
        stream: where it is shown; None is stderr.
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
        self._due = self._start + (BAR_SECONDS if columns else TOOL_LINE_SECONDS)
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
                self._due = now + TOOL_LINE_SECONDS
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
