"""Rows along another axis than the first: their pieces are collected, by HDF5 or without it."""

from __future__ import annotations

import math
import os
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Bytes, Int64s
from hpctrain.data.dataset import Field, Shard
from hpctrain.data.files.storage import HDF5_FAILURES, read_box
from hpctrain.data.reading.chunked import SoundChunks
from hpctrain.data.reading.damage import DamagedChunkError, UndecodableError, damaged_rows
from hpctrain.data.reading.handles import Handles, Locate, OpenShard, open_hdf5, where_it_is
from hpctrain.data.reading.scatter import MOST_VECTORS, Destinations, scatter_by_runs
from hpctrain.data.reading.shards import MOST_OPEN_IN_HDF5, most_open_files
from hpctrain.data.reading.threads import ThreadMemory
from hpctrain.data.view import Part
from hpctrain.errors import DatasetError

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
        self._shards: Handles[OpenShard] = Handles(
            _open, OpenShard.close, locate, most_open_files()
        )
        self._files: Handles[h5py.File] = Handles(
            open_hdf5, h5py.File.close, locate, MOST_OPEN_IN_HDF5
        )

    @property
    def files_opened(self) -> int:
        """How often a file was opened; at best once for each."""
        return self._shards.opened + self._files.opened

    def read_runs(
        self, name: str, rows: Int64s, counts: Int64s, out: Bytes, places: Int64s
    ) -> None:
        """Read runs of consecutive rows, as `ShardReader.read_runs` does."""
        field, stops = self.dataset.fields[name], self.dataset.shard_stops
        for row, count, place in zip(rows.tolist(), counts.tolist(), places.tolist(), strict=True):
            done = 0
            while done < count:
                index = int(np.searchsorted(stops, row + done, side="right"))
                shard = self.dataset.shards[index]
                first = row + done - int(stops[index]) + shard.samples
                most = max(1, READ_BYTES // field.row_bytes)
                size = min(count - done, shard.samples - first, most)
                self._read(shard, name, field, first, out[place + done : place + done + size])
                done += size

    def scatter_runs(
        self, name: str, rows: Int64s, counts: Int64s, into: Destinations, places: Int64s
    ) -> None:
        """Read runs of consecutive rows, each to its place, as `RowReader.scatter_runs` does."""
        scatter_by_runs(self, self._staging, name, rows, counts, into, places)

    def close(self) -> None:
        """Close all files. Reading on opens them again."""
        self._shards.close()
        self._files.close()

    def _read(self, shard: Shard, name: str, field: Field, first: int, out: Bytes) -> None:
        base = shard.layouts[name].base
        try:
            if base is not None:
                self._read_pieces(shard, name, field, base, first, out)
                return
            before, after = field.shape[: self._axis], field.shape[self._axis :]
            values = np.empty((*before, len(out), *after), field.dtype.newbyteorder("="))
            if not self._read_chunks(shard, name, field, first, values):
                self._read_by_hdf5(shard, name, first, values)
            target = out.view(values.dtype).reshape(len(out), math.prod(field.shape))
            target[:] = np.moveaxis(values, self._axis, 0).reshape(target.shape)
        except DamagedChunkError as error:
            last = first + len(out) - 1
            raise damaged_rows(shard.path, name, (first, last), error) from error
        except HDF5_FAILURES as error:
            what = getattr(error, "strerror", None) or error
            raise DatasetError(f'{shard.path}: field "{name}", row {first}: {what}') from error

    def _read_pieces(
        self, shard: Shard, name: str, field: Field, base: int, first: int, out: Bytes
    ) -> None:
        """Read, for each index of the axes before, the pieces of all rows to their places."""
        descriptor = self._shards.get(shard).descriptor
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

    def _read_chunks(
        self, shard: Shard, name: str, field: Field, first: int, values: npt.NDArray[Any]
    ) -> bool:
        """Fill `values` from compressed chunks, each decoded to its own size and no more.

        Returns:
            False if that is for HDF5 to do.

        Raises:
            DamagedChunkError: if a chunk becomes other than its shape and dtype say.
        """
        opened = self._shards.get(shard)
        chunks = opened.chunked.get(name)
        if chunks is None or chunks.pipeline.is_plain:
            return False  # HDF5 reads no more of plain chunks than it is asked for
        box = [(0, size) for size in values.shape]
        box[self._axis] = first, first + values.shape[self._axis]
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

    def _read_by_hdf5(self, shard: Shard, name: str, first: int, values: npt.NDArray[Any]) -> None:
        dataset = self._files.get(shard)[shard.inside(name)]
        last = first + values.shape[self._axis]
        self._sound.require(dataset, self._axis, first, last)
        read_box(dataset, values, (*(slice(None),) * self._axis, slice(first, last)))


def _open(shard: Shard, path: str) -> OpenShard:
    """Open a shard, and list the chunks of the fields that do not lie in it as in memory."""
    return OpenShard(
        shard, path, [name for name, layout in shard.layouts.items() if layout.base is None]
    )
