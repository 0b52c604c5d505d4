"""Byte ranges of files into memory: neighbours merged, the next ones announced."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from hpctrain.data.arrays import Int64s, run_starts, within
from hpctrain.data.reading.scatter import MOST_VECTORS, InPieces, Target
from hpctrain.data.reading.threads import LEAST_SHARED_BYTES, Coldness, Helpers, announce, parts

AHEAD = (2, 64)
"""At least and at most so many requests are announced to the system ahead of the one being read."""
AHEAD_BYTES = 8 * 2**20
"""About so many bytes are announced: they fill the page cache, none of our memory."""
PIECE_BYTES = 4 * 2**20
"""Extents that are more than twice as long are cut for several threads."""
MERGED_BYTES = 2 * 2**20
"""Neighbours are merged up to about so much: no request is larger than is good for it."""
MERGED_VECTORS = MOST_VECTORS // 2
"""Neighbours go to so many pieces of memory, and those of the last of them, at most."""


class Extents(NamedTuple):
    """Byte ranges, each an array of int64 of the same length.

    Attributes:
        descriptors: of the open files.
        offsets: bytes from the start of the file.
        sizes: bytes.
    """

    descriptors: Int64s
    offsets: Int64s
    sizes: Int64s


class ExtentReader:
    """Reads byte ranges. For one thread at a time; the helpers take part."""

    def __init__(self, helpers: Helpers) -> None:
        self._helpers = helpers
        self._coldness = Coldness()

    def read(self, extents: Extents, target: Target) -> Int64s:
        """Read all, in their order as far as one thread can know.

        Returns:
            Indices of those that could not be read whole, whatever the reason.
        """
        total = int(extents.sizes.sum())
        threads = self._helpers.size if total >= LEAST_SHARED_BYTES else 1
        owners = None
        is_long = threads > 1 and int(extents.sizes.max()) > 2 * PIECE_BYTES
        if is_long and isinstance(target, InPieces):
            extents, owners, target = _cut(extents, target)
        groups = _neighbours(extents, target.vectors)
        ahead = min(max(AHEAD_BYTES * len(groups) // max(total, 1), AHEAD[0]), AHEAD[1])
        failed: list[int] = []
        job = _Job(extents, groups, target, ahead if self._coldness.is_cold else 0, failed)
        begin = time.perf_counter()
        self._helpers.each(job.read, parts(len(groups) - 1, threads))
        self._coldness.judge(total, threads * (time.perf_counter() - begin))
        bad = np.array(sorted(failed), np.int64)
        return bad if owners is None else np.unique(owners[bad])


class _Job:
    """One call's requests; each is a group of neighbours."""

    def __init__(
        self, extents: Extents, groups: Int64s, target: Target, ahead: int, failed: list[int]
    ) -> None:
        firsts = groups[:-1]
        self._groups: list[int] = groups.tolist()
        self._descriptors: list[int] = extents.descriptors[firsts].tolist()
        self._offsets: list[int] = extents.offsets[firsts].tolist()
        self._sizes: list[int] = np.add.reduceat(extents.sizes, firsts).tolist()
        self._target = target
        self._ahead = ahead
        self._failed = failed

    def read(self, part: slice) -> None:
        groups, ahead = self._groups, self._ahead
        requests = zip(self._descriptors[part], self._offsets[part], self._sizes[part], strict=True)
        if ahead:
            self._announce(part.start, min(part.start + ahead, part.stop))
        with self._target.open() as read:
            for i, (descriptor, offset, size) in enumerate(requests, part.start):
                if ahead and i + ahead < part.stop:
                    self._announce(i + ahead, i + ahead + 1)
                first, stop = groups[i], groups[i + 1]
                try:
                    if read(descriptor, offset, first, stop, size) == size:
                        continue
                except OSError:
                    pass  # who reads it again meets it again, and says where
                self._failed.extend(range(first, stop))

    def _announce(self, first: int, stop: int) -> None:
        for i in range(first, stop):
            announce(self._descriptors[i], self._offsets[i], self._sizes[i])


def _neighbours(extents: Extents, vectors: Int64s) -> Int64s:
    """Return where groups begin that lie one after the other in a file, and the end.

    Args:
        extents: to be read.
        vectors: (extents,) int64, pieces of memory that each goes to.
    """
    descriptors, offsets, sizes = extents
    begins = np.ones(len(offsets), bool)
    begins[1:] = (descriptors[1:] != descriptors[:-1]) | (offsets[1:] != (offsets + sizes)[:-1])
    begins = run_starts(begins, sizes, MERGED_BYTES) | run_starts(begins, vectors, MERGED_VECTORS)
    return np.append(np.flatnonzero(begins), len(offsets))


def _cut(extents: Extents, target: InPieces) -> tuple[Extents, Int64s, InPieces]:
    """Return extents of which none is long, which of those given each is of, and where they go."""
    longest = np.where(extents.sizes > 2 * PIECE_BYTES, PIECE_BYTES, extents.sizes)
    counts = -(-extents.sizes // longest)
    owners = np.repeat(np.arange(len(counts)), counts)
    done = within(counts) * longest[owners]
    sizes = np.minimum(longest[owners], extents.sizes[owners] - done)
    pieces = Extents(extents.descriptors[owners], extents.offsets[owners] + done, sizes)
    return pieces, owners, target.cut(owners, done, sizes)
