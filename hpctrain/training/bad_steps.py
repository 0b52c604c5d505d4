"""Counts of the steps that could not be applied, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

_SLOTS = 64
RECENT_STEPS = 256
"""So many steps are remembered one by one."""
BAD, FORGIVEN = 1.0, 0.5
"""Flags of steps that were not applied: one whose gradient was not finite; and one that overflowed
in float16, which a smaller loss scale may cure."""


class BadSteps:
    """Takes one flag a step, and counts them many steps at a time.

    Counting is a dozen small operations: noticeable if done in every step of a small model.
    """

    def __init__(self, device: torch.device) -> None:
        self._flags = torch.zeros(_SLOTS, device=device)
        self._slots = self._flags.unbind()
        self._used = 0
        self._positions = torch.arange(_SLOTS, device=device, dtype=torch.float32)
        self._counts = torch.zeros(3, device=device)
        self._before = torch.zeros(0, device=device)

    def next_flag(self) -> Tensor:
        """Return where the next step is to write its flag: (), float32, BAD, FORGIVEN or 0."""
        if self._used == _SLOTS:
            self._count()
        self._used += 1
        return self._slots[self._used - 1]

    def counts(self) -> Tensor:
        """Return the counts, (3,) float32, to read or to overwrite.

        In this order: bad steps in a row, up to the newest; the most in a row since `look_anew`;
        and all that were not applied, the forgiven ones too.
        """
        self._count()
        return self._counts

    def recent(self) -> Tensor:
        """Return the flags of the newest steps, oldest first, (at most RECENT_STEPS,) float32."""
        self._count()
        return self._before

    def look_anew(self) -> None:
        """Begin to look for the most bad steps in a row anew."""
        in_a_row, longest, _ = self.counts()
        longest.copy_(in_a_row)

    def _count(self) -> None:
        if self._used == 0:
            return
        flags, positions = self._flags[: self._used], self._positions[: self._used]
        in_a_row, longest, total = self._counts
        # Where the newest good step up to here was; before the first slot, if none was.
        good = torch.where(flags != BAD, positions, -1 - in_a_row).cummax(0).values
        runs = positions - good
        in_a_row.copy_(runs[-1])
        torch.maximum(longest, runs.max(), out=longest)
        total.add_(torch.count_nonzero(flags))
        self._before = torch.cat([self._before, flags])[-RECENT_STEPS:]
        self._used = 0
