"""Stops: signals (SIGTERM, ...), the time limit, the file STOP; one boundary where all ranks act.

Signals set a flag, and rank 0 watches the time limit and its run folder; the reasons are bits, on
which all ranks agree now and then, at no cost a step. A save that is due is agreed on the same way.
"""

from __future__ import annotations

import enum
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

from hpctrain.batch.scheduler import Deadline
from hpctrain.topology import Communicator, Pending
from hpctrain.utils.run_folder import STOP_FILE_NAME

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGURG")
    if hasattr(signal, name)
)
"""Slurm, LSF (URG) and PBS warn by these, a terminal by INT and HUP, a CPU limit by XCPU."""

DEADLINE = 1 << len(STOP_SIGNALS)
STOP_FILE = DEADLINE << 1
SAVE_DUE = STOP_FILE << 1
"""No stop: a save, which all ranks have to make at the same step too."""

END_DUE = SAVE_DUE << 1
"""No stop: the run is to end here, complete, because its own code says so."""

NUM_BITS = len(STOP_SIGNALS) + 4

MARGIN_SECONDS = 10.0
"""For what nobody measures: leaving MPI, closing files, the launcher's own end."""

_SAFETY = 1.5
_LOOK_EVERY_SECONDS = 1.0
_FORCE_AFTER_SECONDS = 2.0
_STDIN = 0
_SLOW_SECONDS = 1.0
_FORGET = 0.9


def bit(number: int) -> int:
    """Return the bit of a signal among the reasons to stop."""
    return 1 << STOP_SIGNALS.index(signal.Signals(number))


def describe(reasons: int) -> str:
    """Return the reasons, such as "SIGTERM and the time limit"."""
    words = [item.name for item in STOP_SIGNALS if reasons & bit(item)]
    if reasons & DEADLINE:
        words.append("the time limit")
    if reasons & STOP_FILE:
        words.append(f"the file {STOP_FILE_NAME}")
    return " and ".join(words)


class SignalFlag:
    """Stop signals as bits; a context manager for the main thread.

    A handler sets a flag and does nothing else: saving in one is what deadlocks jobs.

    Repeated and different signals are one request: launchers forward them, and schedulers send
    several. Only a second SIGINT at a terminal, some time after the first, ends the process at
    once.
    """

    def __init__(self) -> None:
        self.value = 0
        self._previous: dict[int, object] = {}
        self._interrupted_at: float | None = None

    def __enter__(self) -> SignalFlag:
        for number in STOP_SIGNALS:
            if not _is_left_alone(number):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.value |= bit(number)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        elif now - self._interrupted_at >= _FORCE_AFTER_SECONDS and os.isatty(_STDIN):
            os._exit(128 + number)


def _is_left_alone(number: int) -> bool:
    """Return whether a signal is to have no effect: nohup has SIGHUP ignored from the beginning.

    SIGINT is not left alone: a shell that is no terminal's ignores it in all that it starts in the
    background, and schedulers send it there all the same.
    """
    is_hangup = number == getattr(signal, "SIGHUP", None)
    return is_hangup and signal.getsignal(number) == signal.SIG_IGN


def reserve_seconds(reaction_seconds: float, save_seconds: float) -> float:
    """Return how long before the end of a job its last save has to be asked for.

    Args:
        reaction_seconds: seconds from the request until all ranks act on it.
        save_seconds: seconds of one save, from its first copy until it is on disk. Another one
            may still be under way and is waited for.
    """
    return _SAFETY * (reaction_seconds + 2 * save_seconds) + MARGIN_SECONDS


class Watch:
    """The time limit and the file STOP, watched by a thread; a context manager, for rank 0.

    Args:
        folder: the run's folder, in which somebody may put a file named STOP.
        deadline: end of this job.
        reserve: seconds before the deadline at which to stop.
    """

    def __init__(self, folder: Path, deadline: Deadline, reserve: Callable[[], float]) -> None:
        self._file = folder / STOP_FILE_NAME
        self._deadline = deadline
        self._reserve = reserve
        self._file_seen = False
        self._ended = threading.Event()
        # A daemon: a scheduler or file system that does not answer must not keep the job alive.
        self._thread = threading.Thread(target=self._look, name="hpctrain-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()

    def reasons(self) -> int:
        """Return what is known at this moment, as bits; costs no system call but the clock."""
        found = STOP_FILE if self._file_seen else 0
        if self._deadline.seconds_left() < self._reserve():
            found |= DEADLINE
        return found

    def _look(self) -> None:
        while True:
            with suppress(OSError):  # a file system in trouble is no wish of the user
                self._file_seen = self._file.exists()
            self._deadline.refresh()
            if self._ended.wait(_LOOK_EVERY_SECONDS):
                return


class Boundary(enum.IntEnum):
    """What has just ended; all ranks come to the same boundaries in the same order."""

    STEP = 0
    EVALUATION_BATCH = 1


class StopAgreement:
    """All ranks post their reasons now and then, and read the result one interval later.

    Whoever polled and acted early would leave the others waiting in the next step; so what was
    posted at one agreement is read, by all ranks, at the next and not before.

    An interval is `every_seconds` long, counted in boundaries: each weighs what its kind was last
    agreed to take, so that all ranks meet at the same one. A slow-down makes the running interval
    longer, and the next one shorter. Boundaries of a second and more agree at once: against them
    waiting for the others costs nothing.

    Args:
        communicator: all ranks.
        reasons: this rank's reasons to stop, as bits; 0 is none.
        every_seconds: seconds between two agreements; the same on all ranks.
        clock: seconds, monotonic.

    Attributes:
        reaction_seconds: longest time of late from a request until all ranks acted on it.
        least: the smallest of all ranks' counts, see `count`, as they agreed last.
    """

    def __init__(
        self,
        communicator: Communicator,
        reasons: Callable[[], int],
        *,
        every_seconds: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.reaction_seconds = 0.0
        self._communicator = communicator
        self._sources = [reasons]
        self._every_seconds = every_seconds
        self._clock = clock
        # Until a kind has been measured, each of its boundaries is an agreement.
        self._weights = [every_seconds] * len(Boundary)
        self._progress = 0.0
        self._spent = [0.0] * len(Boundary)
        self._counts = [0] * len(Boundary)
        self._last_boundary = self._last_agreement = clock()
        self._pending: Pending | None = None
        self._count: Callable[[], int] = lambda: 0
        self.least = 0

    def add(self, reasons: Callable[[], int]) -> None:
        """Ask another source of this rank's reasons, from now on."""
        self._sources.append(reasons)

    def count(self, count: Callable[[], int]) -> None:
        """Have all ranks agree on the smallest of a count that never falls, from now on."""
        self._count = count

    def boundary(self, kind: Boundary = Boundary.STEP) -> int:
        """Return the agreed reasons to stop here, 0 for none. Collective: all ranks."""
        now = self._clock()
        self._spent[kind] += now - self._last_boundary
        self._last_boundary = now
        self._counts[kind] += 1
        self._progress += self._weights[kind]
        if self._progress < self._every_seconds:
            return 0
        self._progress = 0.0
        reasons = self.flush()
        if reasons:
            return reasons
        self._post()
        return self.flush() if self._weights[kind] >= _SLOW_SECONDS else 0

    def agree(self) -> int:
        """Agree now, and return the reasons to stop. Collective: all ranks.

        For the end of a phase, at which all ranks meet anyway.
        """
        reasons = self.flush()
        if not reasons:
            # How long a phase took says nothing about steps.
            self._last_agreement = self._clock()
            self._post()
            reasons = self.flush()
        self._last_boundary = self._last_agreement = self._clock()
        return reasons

    def flush(self) -> int:
        """Wait for what was posted, and return it. Collective: all ranks."""
        if self._pending is None:
            return 0
        values, self._pending = self._pending.wait(), None
        self.least = -values[-1]
        for kind, microseconds in enumerate(values[NUM_BITS:-1]):
            if microseconds:
                self._weights[kind] = microseconds * 1e-6
        return sum(value << index for index, value in enumerate(values[:NUM_BITS]))

    def _post(self) -> None:
        now = self._clock()
        interval, self._last_agreement = now - self._last_agreement, now
        # Twice: a request that comes right after one agreement is posted at the next.
        self.reaction_seconds = max(2 * interval, _FORGET * self.reaction_seconds)
        bits = 0
        for source in self._sources:
            bits |= source()
        means = [
            max(1, round(spent / count * 1e6)) if count else 0
            for spent, count in zip(self._spent, self._counts, strict=True)
        ]
        self._spent = [0.0] * len(Boundary)
        self._counts = [0] * len(Boundary)
        self._pending = self._communicator.start_max(
            [bits >> index & 1 for index in range(NUM_BITS)] + means + [-self._count()]
        )
