"""A stop that all ranks make at the same boundary, whoever was asked, at no cost a step."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable

from hpctrain.batch.reasons import NUM_BITS
from hpctrain.topology import Communicator, Pending


class Boundary(enum.IntEnum):
    """What has just ended; all ranks come to the same boundaries in the same order."""

    STEP = 0
    EVALUATION_BATCH = 1


class StopAgreement:
    """All ranks post their reasons now and then, and read the result one interval later.

    Whoever polled and acted early would leave the others waiting in the next step; so what was
    posted at one agreement is looked at, by all ranks, at the next and not before.

    An interval is `every_seconds` long, counted in boundaries: each weighs what its kind was last
    agreed to take, so that all ranks meet at the same one. A slow-down makes the running interval
    longer, and the next one shorter. Boundaries of a second and more agree at once: against them
    waiting for the others costs nothing.

    Args:
        communicator: all ranks.
        reasons: of this rank to stop, as bits of `hpctrain.batch.reasons`; 0 is none.
        every_seconds: between two agreements; the same on all ranks.
        clock: seconds, monotonic.

    Attributes:
        reaction_seconds: from a request until all ranks act on it, at most, as measured of late.
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

    def settle(self) -> int:
        """Return the agreed reasons to stop, by now. Collective: all ranks.

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


_SLOW_SECONDS = 1.0
_FORGET = 0.9
