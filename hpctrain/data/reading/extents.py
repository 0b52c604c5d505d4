"""Byte ranges of files into one buffer: neighbours merged, the next ones announced."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from hpctrain.data.order.permutation import Int64s
from hpctrain.data.reading.helpers import LEAST_SHARED_BYTES, Helpers, parts

AHEAD = (2, 64)
"""At least and at most so many requests are announced to the system ahead of the one being read."""
AHEAD_BYTES = 8 * 2**20
"""About so many bytes are announced: they fill the page cache, none of our memory."""
WARM_BYTES_PER_SECOND = 2e9
"""Faster than this per thread, the data come from the page cache: to announce them is in vain."""
PIECE_BYTES = 4 * 2**20
"""Longer requests are cut for several threads."""
MOST_VECTORS = 512
"""Buffers of one system call. Source: IOV_MAX of Linux is 1024."""


class Extents(NamedTuple):
    """Byte ranges, each an array of int64 of the same length.

    Attributes:
        descriptors: of the open files.
        offsets: bytes from the start of the file.
        begins: where in the output each goes.
        ends: one past its last byte there.
    """

    descriptors: Int64s
    offsets: Int64s
    begins: Int64s
    ends: Int64s


class ExtentReader:
    """Reads byte ranges. For one thread at a time; the helpers helps it."""

    def __init__(self, helpers: Helpers) -> None:
        self._helpers = helpers
        self._is_cold = True

    def read(self, extents: Extents, target: memoryview) -> Int64s:
        """Read all, in their order as far as one thread can tell.

        Returns:
            Indices of those that could not be read whole, whatever the reason.
        """
        sizes = extents.ends - extents.begins
        total = int(sizes.sum())
        threads = self._helpers.size if total >= LEAST_SHARED_BYTES else 1
        owners = None
        if threads > 1 and int(sizes.max()) > 2 * PIECE_BYTES:
            extents, owners = _cut(extents)
            groups = np.arange(len(owners) + 1)
        else:
            groups = _neighbours(extents)
        ahead = min(max(AHEAD_BYTES * len(groups) // max(total, 1), AHEAD[0]), AHEAD[1])
        failed: list[int] = []
        job = _Job(extents, groups, target, ahead if self._is_cold else 0, failed)
        begin = time.perf_counter()
        self._helpers.each(job.read, parts(len(groups) - 1, threads))
        seconds = time.perf_counter() - begin
        if total >= LEAST_SHARED_BYTES:  # less takes its time for other reasons
            self._is_cold = total < WARM_BYTES_PER_SECOND * threads * seconds
        bad = np.array(failed, np.int64)
        return np.unique(bad if owners is None else owners[bad])


class _Job:
    """One call's requests; each is a group of neighbours."""

    def __init__(
        self, extents: Extents, groups: Int64s, target: memoryview, ahead: int, failed: list[int]
    ) -> None:
        firsts, lasts = groups[:-1], groups[1:] - 1
        self._groups: list[int] = groups.tolist()
        self._descriptors: list[int] = extents.descriptors[firsts].tolist()
        self._offsets: list[int] = extents.offsets[firsts].tolist()
        stops = extents.offsets + extents.ends - extents.begins
        self._sizes: list[int] = (stops[lasts] - extents.offsets[firsts]).tolist()
        self._begins: list[int] = extents.begins.tolist()
        self._ends: list[int] = extents.ends.tolist()
        self._target = target
        self._ahead = ahead
        self._failed = failed

    def read(self, part: slice) -> None:
        preadv, target, ahead = os.preadv, self._target, self._ahead
        begins, ends, groups = self._begins, self._ends, self._groups
        requests = zip(self._descriptors[part], self._offsets[part], self._sizes[part], strict=True)
        if ahead:
            self._announce(part.start, min(part.start + ahead, part.stop))
        for i, (descriptor, offset, size) in enumerate(requests, part.start):
            if ahead and i + ahead < part.stop:
                self._announce(i + ahead, i + ahead + 1)
            first, stop = groups[i], groups[i + 1]
            if stop - first == 1:
                into = [target[begins[first] : ends[first]]]
            else:
                into = [target[begins[k] : ends[k]] for k in range(first, stop)]
            try:
                if preadv(descriptor, into, offset) == size:
                    continue
            except OSError:
                pass  # who reads it again meets it again, and says where
            self._failed.extend(range(first, stop))

    def _announce(self, first: int, stop: int) -> None:
        for i in range(first, stop):
            announce(self._descriptors[i], self._offsets[i], self._sizes[i])


def announce(descriptor: int, offset: int, size: int) -> None:
    """Tell the system that these bytes are wanted soon, so that it reads them meanwhile."""
    with suppress(OSError):  # advice: a file system may refuse it
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)


def _neighbours(extents: Extents) -> Int64s:
    """Return where groups begin that lie one after the other in a file, and the end."""
    count = len(extents.offsets)
    begins = np.ones(count, bool)
    stops = extents.offsets + extents.ends - extents.begins
    begins[1:] = (extents.descriptors[1:] != extents.descriptors[:-1]) | (
        extents.offsets[1:] != stops[:-1]
    )
    begins[::MOST_VECTORS] = True
    return np.append(np.flatnonzero(begins), count)


def _cut(extents: Extents) -> tuple[Extents, Int64s]:
    """Return pieces of at most PIECE_BYTES, and which of the extents each is of."""
    sizes = extents.ends - extents.begins
    counts = -(-sizes // PIECE_BYTES)
    owners = np.repeat(np.arange(len(sizes)), counts)
    within = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = extents.begins[owners] + within * PIECE_BYTES
    pieces = Extents(
        extents.descriptors[owners],
        extents.offsets[owners] + within * PIECE_BYTES,
        begins,
        np.minimum(extents.ends[owners], begins + PIECE_BYTES),
    )
    return pieces, owners
