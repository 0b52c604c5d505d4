"""Compressed chunks: read in groups, undone by several threads."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hpctrain.data.order.permutation import Int64s
from hpctrain.data.reading.announcing import Coldness, announce
from hpctrain.data.reading.chunks import ChunkedField, ChunkGroup
from hpctrain.data.reading.damage import DamagedChunkError, UndecodableError
from hpctrain.data.reading.helpers import Helpers, ThreadMemory
from hpctrain.data.reading.outputs import Output
from hpctrain.data.reading.pieces import Bytes, Pieces

GROUPS_AHEAD = 4
"""Groups of chunks that are announced to the system ahead of the one being read."""


class ChunkJob(NamedTuple):
    """A group of chunks to read and to undo.

    Attributes:
        shard: index.
        descriptor: of the open file.
        chunks: of the field in the shard.
        group: which of them.
        rows: (count,) int64, of the shard, ascending: those wanted that need one of these chunks.
        places: (count,) int64, where in the output each goes.
    """

    shard: int
    descriptor: int
    chunks: ChunkedField
    group: ChunkGroup
    rows: Int64s
    places: Int64s

    def pieces(self) -> Pieces:
        """Return the rows as pieces."""
        counts = np.ones_like(self.rows)
        return Pieces(np.full_like(self.rows, self.shard), self.rows, counts, self.places)

    def announce(self) -> None:
        """Tell the system that the chunks are wanted soon."""
        for start, size in self.group.extents:
            announce(self.descriptor, start, size)


def chunk_jobs(
    shard: int, descriptor: int, chunks: ChunkedField, rows: Int64s, places: Int64s
) -> list[ChunkJob]:
    """Return what is to be done for rows of one shard: each chunk is undone once."""
    in_order = np.argsort(rows, kind="stable")
    rows, places = rows[in_order], places[in_order]
    groups = chunks.groups(rows)
    bounds = np.searchsorted(rows, [chunks.rows_of(group) for group in groups]).tolist()
    return [
        ChunkJob(shard, descriptor, chunks, group, rows[first:stop], places[first:stop])
        for group, (first, stop) in zip(groups, bounds, strict=True)
    ]


def checking_jobs(
    shard: int, descriptor: int, chunks: ChunkedField, rows: Int64s
) -> list[ChunkJob]:
    """Return jobs that put no rows: whether the chunks are sound is to be known before HDF5 reads.

    Args:
        shard: index.
        descriptor: of the open file.
        chunks: of the field in the shard.
        rows: (count,) int64, of the shard, that HDF5 will be asked for.
    """
    none = rows[:0]
    groups = chunks.groups(rows) if len(rows) else []
    return [ChunkJob(shard, descriptor, chunks, group, none, none) for group in groups]


def in_plain_chunks(plain: Sequence[tuple[ChunkedField, Pieces]]) -> tuple[Pieces, Int64s]:
    """Cut pieces where chunks end, and find them in the files.

    Args:
        plain: of shards in ascending order, their plain chunks and what is wanted of them.

    Returns:
        The pieces, and where each begins, as `ChunkedField.offsets` does.
    """
    rows = np.repeat([chunks.rows for chunks, _ in plain], [len(part.shards) for _, part in plain])
    cut = Pieces.joined([part for _, part in plain]).cut(rows)
    bounds = np.searchsorted(cut.shards, [part.shards[0] for _, part in plain]).tolist()
    ends = [*bounds[1:], len(cut.shards)]
    offsets = [
        chunks.offsets(cut.firsts[first:stop])
        for (chunks, _), first, stop in zip(plain, bounds, ends, strict=True)
    ]
    return cut, np.concatenate(offsets)


class DamagedRowsError(Exception):
    """Rows whose chunk HDF5 must not be asked for.

    Attributes:
        shard: index.
        first, last: rows of the shard that the chunk has room for.
    """

    def __init__(self, job: ChunkJob, error: DamagedChunkError) -> None:
        super().__init__(str(error))
        self.shard = job.shard
        self.first, self.last = job.chunks.rows_of_chunk(int(job.group.chunks[error.number]))


class ChunkReader:
    """Does such jobs. For one thread at a time; the helpers take part."""

    def __init__(self, helpers: Helpers) -> None:
        self._helpers = helpers
        self._raw = ThreadMemory()
        self._undone = ThreadMemory()
        self._coldness = Coldness()

    def read(self, jobs: list[ChunkJob], output: Output) -> list[Pieces]:
        """Read and undo chunks.

        Args:
            jobs: what to read.
            output: takes the rows.

        Returns:
            Rows where that failed: HDF5 is to say what is wrong with them.

        Raises:
            DamagedRowsError: if HDF5 would take memory out of proportion to say so.
        """
        failed: list[ChunkJob] = []
        damaged: list[DamagedRowsError] = []
        seconds: list[float] = []
        ahead = jobs if self._coldness.is_cold else []

        def read(number: int) -> None:
            for later in ahead[number + GROUPS_AHEAD : number + GROUPS_AHEAD + 1]:
                later.announce()
            job = jobs[number]
            begin = time.perf_counter()
            try:
                raw = self._read(job)
                seconds.append(time.perf_counter() - begin)
                job.chunks.undo(job.group, raw, job.rows, job.places, output, self._undone)
            except DamagedChunkError as error:
                damaged.append(DamagedRowsError(job, error))
            except (OSError, UndecodableError):  # HDF5 meets it again, and says what and where
                failed.append(job)

        for job in ahead[1:GROUPS_AHEAD]:
            job.announce()
        self._helpers.each(read, range(len(jobs)))
        self._coldness.judge(sum(sum(job.group.sizes) for job in jobs), sum(seconds))
        if damaged:
            raise min(damaged, key=lambda error: (error.shard, error.first))
        return [job.pieces() for job in failed]

    def _read(self, job: ChunkJob) -> Bytes:
        """Return the chunks of a job one after the other, in memory of the calling thread.

        Raises:
            DamagedChunkError: if one is larger than it can be.
            OSError: if they cannot be read.
            UndecodableError: if the file ends before they do.
        """
        job.chunks.require_sizes(job.group)
        raw = self._raw.take(sum(job.group.sizes))
        done = 0
        for start, size in job.group.extents:
            if os.preadv(job.descriptor, [raw[done : done + size].data], start) != size:
                raise UndecodableError("the file ends within a chunk")
            done += size
        return raw
