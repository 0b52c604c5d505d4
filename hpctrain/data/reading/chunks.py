"""Where the chunks of a field lie in one shard, and which of them hold which rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Field
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.order.ragged import within
from hpctrain.data.reading.filters import Pipeline, UndecodableError
from hpctrain.data.reading.outputs import Output
from hpctrain.data.reading.pieces import Bytes, Piece, Pieces
from hpctrain.data.storage import filters_of, is_stored_as_in_memory

MOST_CHUNKS = 2**18
"""Of one field in one shard: to list more takes longer, and more memory, than it saves."""
RUN_BYTES = 2**20
"""Neighbouring chunks are read in one go, but no more than this for one thread to undo."""


class Part(NamedTuple):
    """Consecutive rows within one row of chunks, and where they go.

    Attributes:
        first: the first of them in the chunks.
        rows: how many.
        place: of the first in the output.
    """

    first: int
    rows: int
    place: int


class ChunkRun(NamedTuple):
    """Chunks that lie one after the other in a file, to be read in one go.

    Attributes:
        start: bytes from the start of the file.
        chunks: number of each in the grid.
    """

    start: int
    chunks: list[int]


class ChunkedField:
    """The chunks of one field in one shard.

    Attributes:
        rows: that each chunk has room for.
        pipeline: undoes the filters.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        """Ask HDF5 for all chunks, once.

        Raises:
            UndecodableError: saying why they cannot be read without HDF5.
        """
        if not hasattr(dataset.id, "chunk_iter"):
            raise UndecodableError("this h5py cannot list chunks: update h5py")
        if dataset.file.userblock_size:
            raise UndecodableError("the file begins with a user block")
        if not is_stored_as_in_memory(dataset):
            raise UndecodableError("in a number format that only HDF5 converts")
        self._shape: tuple[int, ...] = dataset.shape
        self._chunk: tuple[int, ...] = dataset.chunks
        self._dtype = dataset.dtype
        self._field = Field(self._shape[1:], self._dtype)
        self.rows = self._chunk[0]
        self._grid = [-(-a // b) for a, b in zip(self._shape, self._chunk, strict=True)]
        self._row_chunks = math.prod(self._grid[1:])
        if math.prod(self._grid) > MOST_CHUNKS:
            raise UndecodableError(f"in {math.prod(self._grid):,} chunks; `data repack` helps")
        self._bytes = math.prod(self._chunk) * self._dtype.itemsize
        self.pipeline = Pipeline(filters_of(dataset), self._bytes)
        # Chunks that were never written have no place: -1.
        self._table = np.full((math.prod(self._grid), 3), -1, np.int64)
        self._fill(dataset)

    @property
    def is_plain(self) -> bool:
        """Whether every chunk holds whole rows as memory does."""
        return (
            self.pipeline.is_plain and self._row_chunks == 1 and self._chunk[1:] == self._shape[1:]
        )

    def parts(self, firsts: Int64s, counts: Int64s, places: Int64s) -> dict[int, list[Part]]:
        """Return what of runs of rows each row of chunks holds.

        Args:
            firsts: (runs,) int64, rows of the shard.
            counts: (runs,) int64, rows.
            places: (runs,) int64, where each goes.
        """
        found: dict[int, list[Part]] = {}
        runs = zip(firsts.tolist(), counts.tolist(), places.tolist(), strict=True)
        for first, count, place in runs:
            done = 0
            while done < count:
                index, inside = divmod(first + done, self.rows)
                some = min(count - done, self.rows - inside)
                found.setdefault(index, []).append(Part(inside, some, place + done))
                done += some
        return found

    def pieces(self, shard: int, row: int, parts: list[Part]) -> list[Piece]:
        """Return parts of a row of chunks as rows of the shard."""
        return [(shard, row * self.rows + part.first, part.rows, part.place) for part in parts]

    def cut(self, pieces: Pieces) -> tuple[Pieces, Int64s]:
        """Cut runs of rows where chunks end, and find them in the file: for plain chunks.

        Returns:
            The pieces, and where each begins, (pieces,) int64: bytes from the start of the file,
            or -1 if its chunk was never written.
        """
        first_chunks = pieces.firsts // self.rows
        counts = (pieces.firsts + pieces.counts - 1) // self.rows - first_chunks + 1
        owners = np.repeat(np.arange(len(counts)), counts)
        chunks = first_chunks[owners] + within(counts)
        firsts = np.maximum(pieces.firsts[owners], chunks * self.rows)
        stops = (pieces.firsts + pieces.counts)[owners]
        rows = np.minimum(stops, (chunks + 1) * self.rows) - firsts
        places = pieces.places[owners] + firsts - pieces.firsts[owners]
        starts = self._table[chunks, 0]
        row_bytes = self._bytes // self.rows
        at = np.where(starts < 0, -1, starts + (firsts - chunks * self.rows) * row_bytes)
        return Pieces(pieces.shards[owners], firsts, rows, places), at

    def is_written(self, row: int) -> bool:
        """Tell whether all chunks of a row of chunks are in the file."""
        return bool((self._of_row(row)[:, 0] >= 0).all())

    def runs(self, rows: Sequence[int]) -> Iterator[ChunkRun]:
        """Yield the chunks of these rows of chunks as they lie in the file."""
        first = np.array(rows, np.int64) * self._row_chunks
        chunks = (first[:, None] + np.arange(self._row_chunks)).ravel()
        chunks = chunks[np.argsort(self._table[chunks, 0], kind="stable")]
        run: ChunkRun | None = None
        stop = -1
        for chunk, (start, size, _) in zip(
            chunks.tolist(), self._table[chunks].tolist(), strict=True
        ):
            if run is None or start != stop or start + size - run.start > RUN_BYTES:
                if run is not None:
                    yield run
                run = ChunkRun(start, [])
            run.chunks.append(chunk)
            stop = start + size
        if run is not None:
            yield run

    def rows_of(self, run: ChunkRun) -> list[int]:
        """Return the rows of chunks that a run holds some of."""
        return sorted({chunk // self._row_chunks for chunk in run.chunks})

    def run_bytes(self, run: ChunkRun) -> int:
        """Return the bytes of a run in the file."""
        return int(self._table[run.chunks, 1].sum())

    def undo(self, run: ChunkRun, raw: Bytes, parts: dict[int, list[Part]], output: Output) -> None:
        """Decode the chunks of a run and copy their rows to their places.

        Args:
            run: which chunks.
            raw: (run_bytes,) uint8, as in the file.
            parts: by row of chunks.
            output: takes the rows.

        Raises:
            UndecodableError: if the bytes are damaged.
        """
        begin = 0
        for chunk, (_, size, skipped) in zip(
            run.chunks, self._table[run.chunks].tolist(), strict=True
        ):
            content = self.pipeline.decode(raw[begin : begin + size], skipped)
            begin += size
            cell = content.view(self._dtype).reshape(self._chunk)
            row, inner = divmod(chunk, self._row_chunks)
            there, inside = self._box(inner)
            for part in parts[row]:
                origin = (slice(part.first, part.first + part.rows), *inside)
                output.put(self._field, part.place, cell[origin], there)

    def _box(self, inner: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return where in a row a chunk lies, and what of the chunk lies in the row."""
        there: list[slice] = []
        for axis in range(len(self._grid) - 1, 0, -1):
            inner, index = divmod(inner, self._grid[axis])
            begin = index * self._chunk[axis]
            there.insert(0, slice(begin, min(begin + self._chunk[axis], self._shape[axis])))
        return tuple(there), tuple(slice(0, each.stop - each.start) for each in there)

    def _of_row(self, row: int) -> Int64s:
        return self._table[row * self._row_chunks : (row + 1) * self._row_chunks]

    def _fill(self, dataset: h5py.Dataset) -> None:
        found: list[Any] = []
        dataset.id.chunk_iter(found.append)
        if not found:
            return
        places = np.array([each.chunk_offset for each in found]) // self._chunk
        try:
            numbers: npt.NDArray[Any] = np.ravel_multi_index(tuple(places.T), self._grid)
        except ValueError as error:
            raise UndecodableError(f"a chunk lies outside the data: {error}") from error
        size = Path(dataset.file.filename).stat().st_size
        if any(each.byte_offset + each.size > size for each in found):
            raise UndecodableError("a chunk lies past the end of the file")
        self._table[numbers] = [(each.byte_offset, each.size, each.filter_mask) for each in found]
