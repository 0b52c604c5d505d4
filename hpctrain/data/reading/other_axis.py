"""Boxes of arrays, within bounds of every axis: rows along another axis than the first, selections.

Their pieces are collected by HDF5 or without it, and no chunk is read that holds none of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Bytes, Int64s
from hpctrain.data.dataset import Field, Shard
from hpctrain.data.files.storage import HDF5_FAILURES, read_box
from hpctrain.data.reading.chunked import SoundChunks
from hpctrain.data.reading.damage import DamagedChunkError, UndecodableError, damaged_rows
from hpctrain.data.reading.handles import Locate, OpenFiles, OpenShard, where_it_is
from hpctrain.data.reading.scatter import MOST_VECTORS, Destinations, scatter_by_runs
from hpctrain.data.reading.threads import ThreadMemory
from hpctrain.data.view import Part
from hpctrain.errors import DatasetError

Box = Sequence[tuple[int, int]]
"""First and stop along each axis."""
Values = npt.NDArray[Any]
READ_BYTES = 32 * 2**20
"""Values that are read at once before they are put in the order of the rows."""


class OtherAxisReader:
    """Reads rows of a part whose rows are not counted by the first axis. For one thread."""

    def __init__(self, part: Part, locate: Locate = where_it_is) -> None:
        """Prepare; no file is opened yet. `locate` is as ShardReader takes it."""
        self.dataset = part.dataset
        self._axis = part.axis
        self._sound = SoundChunks()
        self._staging = ThreadMemory()
        self._raw, self._decoded = ThreadMemory(), ThreadMemory()
        self._files = OpenFiles(_open, OpenShard.close, locate)

    @property
    def files_opened(self) -> int:
        """How often a file was opened; at best once for each."""
        return self._files.opened

    def read_runs(
        self, name: str, rows: Int64s, counts: Int64s, out: Bytes, places: Int64s
    ) -> None:
        """Read runs of consecutive rows, as `ShardReader.read_runs` does."""
        field = self.dataset.fields[name]
        most = max(1, READ_BYTES // field.row_bytes)
        for row, count, place in zip(rows.tolist(), counts.tolist(), places.tolist(), strict=True):
            begin = place
            for shard, first, size in self.dataset.in_shards(row, count):
                for done in range(0, size, most):
                    stop = min(done + most, size)
                    own = out[begin + done : begin + stop]
                    self._read(shard, name, field, first + done, own)
                begin += size

    def scatter_runs(
        self, name: str, rows: Int64s, counts: Int64s, into: Destinations, places: Int64s
    ) -> None:
        """Read runs of consecutive rows, each to its place, as `RowReader.scatter_runs` does."""
        scatter_by_runs(self, self._staging, name, rows, counts, into, places)

    def close(self) -> None:
        """Close all files. Reading on opens them again."""
        self._files.close()

    def read_box(self, shard: Shard, name: str, first: int, count: int, bounds: Box) -> Values:
        """Return rows of a shard within bounds of each axis of a row, (rows, *box)."""
        field = self.dataset.fields[name]
        box = (*bounds[: self._axis], (first, first + count), *bounds[self._axis :])
        values = np.empty([stop - start for start, stop in box], field.dtype.newbyteorder("="))
        layout = shard.layouts[name]
        start = layout.base if layout.offset is None else layout.offset
        with _located(shard, name, first, count):
            if start is not None:
                self._read_plain(shard, name, box, start, values)
            elif not self._read_chunks(shard, name, box, values):
                self._read_by_hdf5(shard, name, box, values)
        return np.moveaxis(values, self._axis, 0)

    def chunk_shape(self, shard: Shard, name: str) -> tuple[int, ...] | None:
        """Return the shape of a row in chunks; None: it is in none, or they are for HDF5 alone."""
        try:
            chunks = self._files.shards.get(shard).chunked.get(name)
        except HDF5_FAILURES:
            return None  # who reads it says why
        if chunks is None:
            return None
        return (*chunks.chunk[: self._axis], *chunks.chunk[self._axis + 1 :])

    def _read(self, shard: Shard, name: str, field: Field, first: int, out: Bytes) -> None:
        base = shard.layouts[name].base
        if base is not None:
            with _located(shard, name, first, len(out)):
                self._read_pieces(shard, name, field, base, first, out)
            return
        values = self.read_box(shard, name, first, len(out), [(0, size) for size in field.shape])
        target = out.view(values.dtype).reshape(len(out), math.prod(field.shape))
        target[:] = values.reshape(target.shape)

    def _read_plain(self, shard: Shard, name: str, box: Box, start: int, values: Values) -> None:
        """Fill `values` from an array that lies in the file as in memory: HDF5 reads more of it."""
        field, descriptor = self.dataset.fields[name], self._files.shards.get(shard).descriptor
        shape = (*field.shape[: self._axis], shard.samples, *field.shape[self._axis :])
        steps = [math.prod(shape[axis + 1 :]) * field.dtype.itemsize for axis in range(len(shape))]
        # What is behind the last axis that is cut follows each other.
        cut = max(axis for axis, size in enumerate(shape) if box[axis] != (0, size) or not axis)
        begins = np.array([start + box[cut][0] * steps[cut]])
        for axis in range(cut):
            begins = np.add.outer(begins, np.arange(*box[axis]) * steps[axis])
        size = (box[cut][1] - box[cut][0]) * steps[cut]
        target, place = values.reshape(-1).data.cast("B"), f'{shard.path}: field "{name}"'
        for number, offset in enumerate(begins.ravel().tolist()):
            piece = target[number * size : (number + 1) * size]
            self._read_rest(descriptor, [piece], offset, place)
        if not field.dtype.isnative:
            values.byteswap(inplace=True)

    def _read_pieces(
        self, shard: Shard, name: str, field: Field, base: int, first: int, out: Bytes
    ) -> None:
        """Read, for each index of the axes before, the pieces of all rows to their places."""
        descriptor = self._files.shards.get(shard).descriptor
        pieces = math.prod(field.shape[: self._axis])
        size = field.row_bytes // pieces
        target = memoryview(out.data).cast("B")
        for piece in range(pieces):
            for begin in range(0, len(out), MOST_VECTORS):
                rows = range(begin, min(begin + MOST_VECTORS, len(out)))
                places = [(row * pieces + piece) * size for row in rows]
                into = [target[place : place + size] for place in places]
                offset = base + (piece * shard.samples + first + begin) * size
                wanted = len(rows) * size
                if os.preadv(descriptor, into, offset) != wanted:
                    # Few bytes at once are no failure; what is missing is asked for, or reported.
                    self._read_rest(descriptor, into, offset, f'{shard.path}: field "{name}"')
        if not field.dtype.isnative:
            out.view(field.dtype).byteswap(inplace=True)

    @staticmethod
    def _read_rest(descriptor: int, into: list[memoryview], offset: int, place: str) -> None:
        for piece in into:
            done = 0
            while done < len(piece):
                count = os.preadv(descriptor, [piece[done:]], offset + done)
                if count == 0:
                    raise DatasetError(
                        f"{place}: the file ends at byte {offset + done}; it was truncated. Bring "
                        "the whole file back"
                    )
                done += count
            offset += done

    def _read_chunks(self, shard: Shard, name: str, box: Box, values: npt.NDArray[Any]) -> bool:
        """Fill `values` from compressed chunks, each decoded to its own size and no more.

        Returns:
            False if that is for HDF5 to do.

        Raises:
            DamagedChunkError: if a chunk becomes other than its shape and dtype say.
        """
        opened = self._files.shards.get(shard)
        chunks = opened.chunked.get(name)
        if chunks is None or chunks.pipeline.is_plain:
            return False  # HDF5 reads no more of plain chunks than it is asked for
        for part in chunks.in_box(box):
            start, size, _ = part.facts
            if start < 0:
                return False
            try:
                chunks.require_size(size)
                raw = self._raw.take(size)
                if os.preadv(opened.descriptor, [raw.data], start) != size:
                    return False
                values[part.target] = chunks.decoded(part, raw, self._decoded)
            except UndecodableError:
                return False  # HDF5 meets it again, and says what and where
        return True

    def _read_by_hdf5(self, shard: Shard, name: str, box: Box, values: npt.NDArray[Any]) -> None:
        dataset = self._files.in_hdf5.get(shard)[shard.inside(name)]
        self._sound.require(dataset, dict(enumerate(box)))
        read_box(dataset, values, tuple(slice(*each) for each in box))


@contextmanager
def _located(shard: Shard, name: str, first: int, count: int) -> Iterator[None]:
    """Say of what cannot be read where it is."""
    try:
        yield
    except DamagedChunkError as error:
        raise damaged_rows(shard.path, name, (first, first + count - 1), error) from error
    except HDF5_FAILURES as error:
        what = getattr(error, "strerror", None) or error
        raise DatasetError(f'{shard.path}: field "{name}", row {first}: {what}') from error


def _open(shard: Shard, path: str) -> OpenShard:
    """Open a shard, and list the chunks of the fields that do not lie in it as in memory."""
    layouts = shard.layouts.items()
    chunked = [name for name, each in layouts if each.base is None and each.offset is None]
    return OpenShard(shard, path, chunked)
