"""Signals set a flag. Nothing else happens in a handler: saving there is what deadlocks jobs."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGURG")
    if hasattr(signal, name)
)
"""Slurm, LSF (URG) and PBS warn by these, a terminal by INT and HUP, a CPU limit by XCPU."""

_FORCE_AFTER_SECONDS = 2.0
_STDIN = 0


class SignalFlag:
    """Collects stop signals in a bit set; a context manager for the main thread.

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


def bit(number: int) -> int:
    """Return the bit of a signal in the set."""
    return 1 << STOP_SIGNALS.index(signal.Signals(number))
