"""Saves by the clock: one rank looks at it, and all save at the same step."""

from __future__ import annotations

import time
from collections.abc import Callable

from hpctrain.batch.stop import SAVE_DUE


class SaveClock:
    """Asks for a save once its time has come, and where the last one failed.

    A failed save is told by the next one: to ask for that ends the job soon, and not hours later.
    """

    def __init__(
        self,
        every_minutes: float,
        failed: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            every_minutes: between two saves; 0: no save by the clock.
            failed: whether the last save has failed.
            clock: seconds.
        """
        self._seconds = every_minutes * 60
        self._failed = failed
        self._clock = clock
        self._saved_at = clock()

    def saved(self) -> None:
        """Start anew: a save has begun, whatever for."""
        self._saved_at = self._clock()

    def bit(self) -> int:
        """Return SAVE_DUE if it is time, else 0."""
        due = self._seconds and self._clock() - self._saved_at >= self._seconds
        return SAVE_DUE if due or self._failed() else 0
