"""Where the chunks of a field lie in one shard, and which of them hold which rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Bytes, Int64s, as_slice
from hpctrain.data.dataset import Field
from hpctrain.data.files.storage import dtype_of, filters_of, is_stored_as_in_memory
from hpctrain.data.reading.damage import DamagedChunkError, UndecodableError
from hpctrain.data.reading.filter_libraries import leaves_partial_chunks_unfiltered
from hpctrain.data.reading.filters import Pipeline
from hpctrain.data.reading.scatter import Output
from hpctrain.data.reading.threads import ThreadMemory

NO_FILTER = 2**32 - 1
"""The mask of a chunk that went through none of its filters."""
MOST_CHUNKS = 2**18
"""Of one field in one shard: to list more takes longer, and more memory, than it saves."""
DECODED_BYTES = 2 * 2**20
"""Chunks are decoded together up to about so many bytes, which are still in the cache when their
rows are copied."""


def list_chunks(
    dataset: h5py.Dataset, grid: Sequence[int], pipeline: Pipeline, chunk_bytes: int
) -> Int64s:
    """Return what is known of every chunk.

    Args:
        dataset: in chunks.
        grid: how many chunks there are along every axis.
        pipeline: of its filters.
        chunk_bytes: of the values of one chunk.

    Returns:
        (chunks, 3) int64, in the order of the grid: offset in the file, bytes there, mask of the
        filters that it skipped. The offset is -1 of chunks that were never written, and of those
        that are for HDF5 to read.

    Raises:
        UndecodableError: if HDF5 names a place that cannot be.
    """
    table = np.full((math.prod(grid), 3), -1, np.int64)
    found: list[Any] = []
    dataset.id.chunk_iter(found.append)
    if not found:
        return table
    places = np.array([each.chunk_offset for each in found], np.int64) // dataset.chunks
    try:
        numbers: npt.NDArray[Any] = np.ravel_multi_index(tuple(places.T), grid)
    except ValueError as error:
        raise UndecodableError(f"a chunk lies outside the data: {error}") from error
    size = Path(dataset.file.filename).stat().st_size
    if any(each.byte_offset + each.size > size for each in found):
        raise UndecodableError("a chunk lies past the end of the file")
    facts = np.array([(each.byte_offset, each.size, each.filter_mask) for each in found], np.int64)
    table[numbers] = _corrected(dataset, places, facts, pipeline, chunk_bytes)
    return table


def _corrected(
    dataset: h5py.Dataset, places: Int64s, facts: Int64s, pipeline: Pipeline, chunk_bytes: int
) -> Int64s:
    """Correct what HDF5 says of chunks, (chunks, 3), by what it does not say.

    Args:
        dataset: whose chunks they are.
        places: (chunks, axes) int64, in the grid.
        facts: offset, size, mask of the filters that each skipped.
        pipeline: of its filters.
        chunk_bytes: of the values of one chunk.
    """
    is_whole = facts[:, 1] == chunk_bytes
    if pipeline.is_plain:
        facts[~is_whole, 0] = -1
        return facts
    unfiltered = leaves_partial_chunks_unfiltered(dataset.id.get_create_plist())
    is_partial = ((places + 1) * dataset.chunks > dataset.shape).any(axis=1)
    if unfiltered:
        facts[is_partial, 2] = NO_FILTER
    elif unfiltered is None:
        # Such a chunk has the size of its values. Few that went through filters do.
        facts[is_partial & is_whole, 0] = -1
    return facts


class ChunkGroup(NamedTuple):
    """Chunks of one shard that are read and decoded together.

    Attributes:
        chunks: (chunks,) int64, the number of each in the grid, ascending.
        sizes: bytes of each in the file.
        skipped: of each, the mask of the filters that it did not go through.
        extents: bytes from the start of the file, and how many: neighbours in one.
    """

    chunks: Int64s
    sizes: list[int]
    skipped: list[int]
    extents: list[tuple[int, int]]


class BoxPart(NamedTuple):
    """What one chunk holds of a box.

    Attributes:
        number: of the chunk in the grid.
        facts: where it begins in the file, -1 if nowhere; its bytes; the filters that it skipped.
        source: where in the chunk the values are.
        target: where in the box.
    """

    number: int
    facts: tuple[int, int, int]
    source: tuple[slice, ...]
    target: tuple[slice, ...]


class ChunkedField:
    """The chunks of one field in one shard.

    Attributes:
        field: what a row is.
        samples: rows in all.
        chunk: shape of each.
        rows: that each chunk has room for.
        pipeline: decodes the filters.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        """Ask HDF5 for all chunks, once.

        Raises:
            UndecodableError: saying why they cannot be read without HDF5.
        """
        if dataset.chunks is None:
            raise UndecodableError("not in chunks")
        if not hasattr(dataset.id, "chunk_iter"):
            raise UndecodableError("this h5py cannot list chunks: update h5py")
        if dataset.file.userblock_size:
            raise UndecodableError("the file begins with a user block")
        if not is_stored_as_in_memory(dataset):
            raise UndecodableError("in a number format that only HDF5 converts")
        self._shape: tuple[int, ...] = dataset.shape
        self.chunk: tuple[int, ...] = dataset.chunks
        self._dtype = dtype_of(dataset)
        self.field = Field(self._shape[1:], self._dtype)
        self.samples = self._shape[0]
        self.rows = self.chunk[0]
        self._grid = [-(-a // b) for a, b in zip(self._shape, self.chunk, strict=True)]
        self._row_chunks = math.prod(self._grid[1:])
        if math.prod(self._grid) > MOST_CHUNKS:
            raise UndecodableError(f"in {math.prod(self._grid):,} chunks; `data repack` helps")
        self._bytes = math.prod(self.chunk) * self._dtype.itemsize
        self.pipeline = Pipeline(filters_of(dataset), self._bytes)
        self._table = list_chunks(dataset, self._grid, self.pipeline, self._bytes)
        starts: Int64s = self._table[:, 0].reshape(-1, self._row_chunks)
        self._is_written = starts.min(axis=1) >= 0

    @property
    def is_plain(self) -> bool:
        """Whether every chunk holds whole rows as memory does."""
        return (
            self.pipeline.is_plain and self._row_chunks == 1 and self.chunk[1:] == self._shape[1:]
        )

    def offsets(self, rows: Int64s) -> Int64s:
        """Return where rows of plain chunks begin in the file.

        Args:
            rows: (count,) int64, of the shard.

        Returns:
            (count,) int64, bytes from the start of the file; -1 if the chunk was never written.
        """
        chunks, inside = np.divmod(rows, self.rows)
        starts = self._table[chunks, 0]
        return np.where(starts < 0, -1, starts + inside * (self._bytes // self.rows))

    def is_written(self, rows: Int64s) -> npt.NDArray[np.bool_]:
        """Return which rows of the shard have all the chunks that hold them in the file."""
        written: npt.NDArray[np.bool_] = self._is_written[rows // self.rows]
        return written

    def groups(self, rows: Int64s) -> list[ChunkGroup]:
        """Return the chunks in the file that hold rows of the shard, (rows,) int64, ascending."""
        rows_of_chunks = np.unique(rows // self.rows)
        inner = np.arange(self._row_chunks)
        chunks = (rows_of_chunks[:, None] * self._row_chunks + inner).ravel()
        chunks = chunks[self._table[chunks, 0] >= 0]
        if not len(chunks):
            return []
        starts, sizes, skipped = self._table[chunks].T
        most = max(1, DECODED_BYTES // self._bytes)
        begins = np.ones(len(chunks), bool)
        begins[1:] = starts[1:] != (starts + sizes)[:-1]
        begins[::most] = True
        firsts = np.flatnonzero(begins)
        totals = np.add.reduceat(sizes, firsts)
        extents = list(zip(starts[firsts].tolist(), totals.tolist(), strict=True))
        groups = range(0, len(chunks), most)
        bounds = np.searchsorted(firsts, [*groups, len(chunks)]).tolist()
        return [
            ChunkGroup(
                chunks[first : first + most],
                sizes[first : first + most].tolist(),
                skipped[first : first + most].tolist(),
                extents[start:stop],
            )
            for first, start, stop in zip(groups, bounds[:-1], bounds[1:], strict=True)
        ]

    def rows_of(self, group: ChunkGroup) -> tuple[int, int]:
        """Return the first row of the shard that a group holds some of, and one past the last."""
        first, last = (int(group.chunks[i]) // self._row_chunks for i in (0, -1))
        return first * self.rows, (last + 1) * self.rows

    def rows_of_chunk(self, chunk: int) -> tuple[int, int]:
        """Return the first and the last row of the shard that a chunk holds some of."""
        first = chunk // self._row_chunks * self.rows
        return first, min(first + self.rows, self._shape[0]) - 1

    def decode_rows(
        self,
        group: ChunkGroup,
        raw: Bytes,
        rows: Int64s,
        places: Int64s,
        output: Output,
        memory: ThreadMemory,
    ) -> None:
        """Decode the chunks of a group and copy rows to their places.

        Args:
            group: which chunks.
            raw: (sum of group.sizes,) uint8: one after the other, as in the file.
            rows: (count,) int64, of the shard, ascending: those wanted that need these chunks.
            places: (count,) int64, where each goes.
            output: takes the rows.
            memory: to decode to.

        Raises:
            DamagedChunkError: if a chunk is not as large as its shape and dtype are.
            UndecodableError: if the bytes are damaged otherwise.
        """
        content = self.pipeline.decode(raw, group.sizes, group.skipped, memory)
        if not len(rows):
            return
        cells = content.view(self._dtype).reshape(-1, *self.chunk[1:])
        if self._row_chunks == 1:  # rows follow each other
            picked = np.searchsorted(group.chunks, rows // self.rows) * self.rows
            self._put(cells, 0, picked + rows % self.rows, places, output)
            return
        for i, chunk in enumerate(group.chunks.tolist()):
            row, inner = divmod(chunk, self._row_chunks)
            some = slice(*np.searchsorted(rows, (row * self.rows, (row + 1) * self.rows)))
            picked = rows[some] + (i - row) * self.rows
            self._put(cells, inner, picked, places[some], output)

    def _put(
        self,
        cells: npt.NDArray[Any],
        inner: int,
        picked: Int64s,
        places: Int64s,
        output: Output,
    ) -> None:
        """Copy some rows of chunks that all hold the same part of a row."""
        there, inside = self._box(inner)
        origin = (as_slice(picked), *inside)
        output.put(self.field, places, cells[origin], there)

    def _box(self, inner: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return where in a row a chunk lies, and what of the chunk lies in the row."""
        there: list[slice] = []
        for axis in range(len(self._grid) - 1, 0, -1):
            inner, index = divmod(inner, self._grid[axis])
            begin = index * self.chunk[axis]
            there.insert(0, slice(begin, min(begin + self.chunk[axis], self._shape[axis])))
        return tuple(there), tuple(slice(0, each.stop - each.start) for each in there)

    def in_box(self, box: Sequence[tuple[int, int]]) -> Iterator[BoxPart]:
        """Yield the chunks that hold some of the values within these bounds of every axis."""
        sides = [
            range(first // size, -(-stop // size))
            for (first, stop), size in zip(box, self.chunk, strict=True)
        ]
        for place in itertools.product(*sides):
            source, target = [], []
            for index, size, (first, stop) in zip(place, self.chunk, box, strict=True):
                begin, end = max(first, index * size), min(stop, (index + 1) * size)
                source.append(slice(begin - index * size, end - index * size))
                target.append(slice(begin - first, end - first))
            number = int(np.ravel_multi_index(place, self._grid))
            facts = tuple(self._table[number].tolist())
            yield BoxPart(number, facts, tuple(source), tuple(target))

    def decoded(self, part: BoxPart, raw: Bytes, memory: ThreadMemory) -> npt.NDArray[Any]:
        """Return the values of a part of a box, for as long as `memory` is.

        Raises:
            DamagedChunkError: if a chunk is not as large as its shape and dtype are.
            UndecodableError: if the bytes are damaged otherwise.
        """
        _, size, skipped = part.facts
        content = self.pipeline.decode(raw, [size], [skipped], memory)
        cells: npt.NDArray[Any] = content.view(self._dtype).reshape(self.chunk)[part.source]
        return cells

    def require_sizes(self, group: ChunkGroup) -> None:
        """Check that no chunk of a group takes more of the file than it can.

        Raises:
            DamagedChunkError: if one does.
        """
        for number, size in enumerate(group.sizes):
            try:
                self.require_size(size)
            except DamagedChunkError as error:
                error.number = number
                raise

    def require_size(self, size: int) -> None:
        """Check that a chunk takes no more of the file than it can.

        Raises:
            DamagedChunkError: if it does.
        """
        if size > self.pipeline.most_stored:
            raise DamagedChunkError(f"it is {size:,} bytes, and would become {self._bytes:,}")
