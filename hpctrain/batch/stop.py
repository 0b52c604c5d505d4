"""A stop that all ranks make at the same step, whoever got the signal, at no cost a step."""

from __future__ import annotations

from collections.abc import Callable

from hpctrain.topology import Communicator, Pending


class StopAgreement:
    """All ranks post their flag every `every` boundaries and read the result one interval later.

    Whoever polled and acted early would leave the others waiting in the next step; so the result of
    agreement n is looked at at boundary (n + 1) * every, by all ranks, and not before.

    Args:
        communicator: all ranks.
        every: boundaries between two agreements; the same on all ranks.
        flag: this rank's reasons to stop, as a bit set; 0 is none.
    """

    def __init__(self, communicator: Communicator, every: int, flag: Callable[[], int]) -> None:
        self._communicator = communicator
        self._every = every
        self._flag = flag
        self._boundaries = 0
        self._pending: Pending | None = None

    def boundary(self) -> int:
        """Return the agreed reasons to stop here, 0 for none. Collective: all ranks."""
        self._boundaries += 1
        if self._boundaries % self._every:
            return 0
        reasons = self.flush()
        if not reasons:
            bits = [self._flag() >> index & 1 for index in range(_BITS)]
            self._pending = self._communicator.start_max(bits)
        return reasons

    def flush(self) -> int:
        """Wait for what was posted, and return it. Collective: all ranks."""
        if self._pending is None:
            return 0
        bits, self._pending = self._pending.wait(), None
        return sum(value << index for index, value in enumerate(bits))


_BITS = 16
