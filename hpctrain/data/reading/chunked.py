"""Compressed chunks: read in groups and decoded by several threads.

Chunks that only HDF5 reads are checked before: it takes what they become, whatever that is.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Bytes, Int64s, Pieces
from hpctrain.data.files.storage import filters_of
from hpctrain.data.reading.chunk_index import NO_FILTER, ChunkedField, ChunkGroup
from hpctrain.data.reading.damage import DamagedChunkError, UndecodableError
from hpctrain.data.reading.filter_libraries import leaves_partial_chunks_unfiltered
from hpctrain.data.reading.filters import Pipeline
from hpctrain.data.reading.scatter import Output
from hpctrain.data.reading.threads import Coldness, Helpers, ThreadMemory, announce

GROUPS_AHEAD = 4
"""Groups of chunks that are announced to the system ahead of the one being read."""
MOST_CHECKED = 2**26
"""Chunks of one dataset of which it is noted, in a byte each, that they were checked."""


class ChunkJob(NamedTuple):
    """A group of chunks to read and to decode.

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
        """Advise the system that the chunks are wanted soon."""
        for start, size in self.group.extents:
            announce(self.descriptor, start, size)


def chunk_jobs(
    shard: int, descriptor: int, chunks: ChunkedField, rows: Int64s, places: Int64s
) -> list[ChunkJob]:
    """Return what is to be done for rows of one shard: each chunk is decoded once."""
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
    """Does jobs of chunks. For one thread at a time; the helpers take part."""

    def __init__(self, helpers: Helpers) -> None:
        self._helpers = helpers
        self._raw = ThreadMemory()
        self._decoded = ThreadMemory()
        self._coldness = Coldness()

    def read(self, jobs: list[ChunkJob], output: Output) -> list[Pieces]:
        """Read and decode chunks.

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
                job.chunks.decode_rows(job.group, raw, job.rows, job.places, output, self._decoded)
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


@dataclass(frozen=True, slots=True)
class _Checked:
    """What is known of the chunks of one dataset.

    Attributes:
        pipeline: decodes their filters.
        unfiltered: whether partial ones went through none; None: nobody knows.
        seen: by place in the grid, whether it was checked.
    """

    pipeline: Pipeline
    unfiltered: bool | None
    seen: npt.NDArray[np.bool_]


class SoundChunks:
    """Checks each chunk once, when it is first wanted. For one thread."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], _Checked | None] = {}
        self._memory = ThreadMemory()

    def require(self, dataset: h5py.Dataset, box: Mapping[int, tuple[int, int]]) -> None:
        """Check the chunks that hold some values within these bounds, by axis: first and stop.

        Raises:
            DamagedChunkError: if one becomes other than its shape and dtype say.
        """
        key = dataset.file.filename, dataset.name
        if key not in self._known:
            self._known[key] = _known(dataset)
        checked = self._known[key]
        if checked is None:
            return
        sides = [range(count) for count in checked.seen.shape]
        for axis, (first, stop) in box.items():
            sides[axis] = range(first // dataset.chunks[axis], -(-stop // dataset.chunks[axis]))
        for place in itertools.product(*sides):
            if not checked.seen[place]:
                self._check(dataset, checked, place)
                checked.seen[place] = True

    def _check(self, dataset: h5py.Dataset, checked: _Checked, place: tuple[int, ...]) -> None:
        pairs = list(zip(place, dataset.chunks, strict=True))
        corner = tuple(index * size for index, size in pairs)
        stored = dataset.id.get_chunk_info_by_coord(corner)
        if stored.byte_offset is None:
            return
        if stored.size > checked.pipeline.most_stored:
            raise DamagedChunkError(f"it is {stored.size:,} bytes in the file")
        mask, content = dataset.id.read_direct_chunk(corner)
        ends = zip(pairs, dataset.shape, strict=True)
        if any((index + 1) * size > end for (index, size), end in ends):
            if checked.unfiltered is None:
                return
            mask = NO_FILTER if checked.unfiltered else mask
        raw: Any = np.frombuffer(content, np.uint8)
        try:
            checked.pipeline.decode(raw, [len(raw)], [mask], self._memory)
        except UndecodableError:
            return  # HDF5 meets it again, and says what and where


def _known(dataset: h5py.Dataset) -> _Checked | None:
    """Return what it takes to check the chunks of a dataset; None: they are not to be checked."""
    if dataset.chunks is None or not hasattr(dataset.id, "get_chunk_info_by_coord"):
        return None
    grid = [-(-a // b) for a, b in zip(dataset.shape, dataset.chunks, strict=True)]
    # In the file a value may have another size than in memory.
    chunk_bytes = math.prod(dataset.chunks) * dataset.id.get_type().get_size()
    try:
        pipeline = Pipeline(filters_of(dataset), chunk_bytes)
    except UndecodableError:
        return None
    if pipeline.is_plain or math.prod(grid) > MOST_CHECKED:
        return None
    unfiltered = leaves_partial_chunks_unfiltered(dataset.id.get_create_plist())
    return _Checked(pipeline, unfiltered, np.zeros(grid, bool))
