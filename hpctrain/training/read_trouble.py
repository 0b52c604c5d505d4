"""A save while there is still time, when a rank cannot read its data any more."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from hpctrain.batch.stop import SAVE_DUE

LEAST_SECONDS = 60.0
"""Between two saves for this reason: trouble that comes and goes is not to fill the disk."""


class FailingReads(Protocol):
    """What counts them."""

    @property
    def failed_reads(self) -> int:
        """How often a read failed so far, whatever came of it."""
        ...


class ReadTrouble:
    """Asks for a save as soon as a read fails.

    Reading runs ahead of the steps. So between the read that fails and the step that would need it
    there are batches left, and waits before the retries: time for all ranks to save together.
    Once the failing rank has nothing left to compute with, it is too late for that.
    """

    def __init__(self, reads: FailingReads, clock: Callable[[], float] = time.monotonic) -> None:
        self._reads = reads
        self._clock = clock
        self._known = 0
        self._next = 0.0

    def bit(self) -> int:
        """Return SAVE_DUE if reads have failed since the last time, else 0."""
        failed = self._reads.failed_reads
        if failed == self._known:
            return 0
        self._known = failed
        now = self._clock()
        if now < self._next:
            return 0
        self._next = now + LEAST_SECONDS
        return SAVE_DUE
