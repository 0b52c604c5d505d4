"""Host memory for reading ahead: how much of what, and using it again."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hpctrain.data.dataset import Field
from hpctrain.data.reading.access import Bytes

logger = logging.getLogger(__name__)

GROUP_BYTES = 16 * 2**20
MOST_GROUP_BATCHES = 64
"""Small batches are read, and copied to the device, several at a time up to these limits."""
MOST_GROUPS_AHEAD = 4
GROUPS_IN_USE = 3
"""Groups in memory besides those that wait: one filled, one handed over, one consumed."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How the host memory of reading ahead is spent.

    Attributes:
        windows_fit: whether the windows of all lanes stay resident.
        group_batches: batches that are read in one go.
        depth: groups that wait for the consumer.
        total: bytes of all of it.
    """

    windows_fit: bool
    group_batches: int
    depth: int
    total: int

    @classmethod
    def make(cls, windows: int, share: int, buffer_mb: float, *, staging: int = 0) -> MemoryPlan:
        """Spend `buffer_mb` MB on windows first, then on shares of batches.

        Args:
            windows: bytes of the windows of all lanes.
            share: bytes of this rank's part of a batch.
            buffer_mb: of it all.
            staging: bytes that each batch of a group takes besides, before it is one.
        """
        budget = int(buffer_mb * 1e6)
        least = share * (GROUPS_IN_USE + 1) + staging
        fit = windows + least <= budget
        if windows and not fit:
            logger.warning(
                "data.buffer_mb = %g holds no window of every lane (%.0f MB needed): rows are "
                "read one by one, in the same order but slower",
                buffer_mb,
                (windows + least) / 1e6,
            )
        if least > budget:
            logger.warning(
                "data.buffer_mb = %g is less than the batches in flight take: %.0f MB",
                buffer_mb,
                least / 1e6,
            )
        windows = windows if fit else 0
        left = max(least, budget - windows)
        wanted = max(1, min(MOST_GROUP_BATCHES, GROUP_BYTES // share))
        group_batches = min(wanted, left // least)
        shares = (left - staging * group_batches) // share
        depth = min(MOST_GROUPS_AHEAD, shares // group_batches - GROUPS_IN_USE)
        total = windows + group_batches * (share * (depth + GROUPS_IN_USE) + staging)
        return cls(fit, group_batches, depth, total)


class BufferPool:
    """Host memory that is used again as soon as nobody refers to it.

    A batch is handed out as a view; when the view and all that was made from it (tensors, what
    autograd saved of them) are gone, its memory comes back. So a consumer may keep a batch as
    long as it likes, and one that does not never pays for fresh pages.
    """

    def __init__(
        self, fields: Mapping[str, Field], rows: int, allocate: Callable[[int], Bytes]
    ) -> None:
        """Keep buffers for up to `rows` rows of each field, made by `allocate(bytes)`."""
        self._sizes = {name: max(1, rows * field.row_bytes) for name, field in fields.items()}
        self._free: dict[str, deque[Bytes]] = {name: deque() for name in fields}
        self._allocate = allocate

    def take(self, name: str, size: int) -> Bytes:
        """Return `size` bytes of memory for a field.

        Returns:
            (size,) uint8: an array object of its own, so that its end can be watched.
        """
        free = self._free[name]
        try:
            whole = free.pop()
        except IndexError:
            whole = self._allocate(self._sizes[name])
        view = whole[:size]
        weakref.finalize(view, free.append, whole).atexit = False
        return view
