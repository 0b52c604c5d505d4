"""Consecutive rows of one field, from the files into memory that the caller keeps.

Where the rows lie in a file as they do in memory, they are read by `preadv` at their offset.
Compressed chunks are read in the same way and decompressed by several threads. HDF5, and the lock
that it holds over all threads, are in neither path; it reads what is left.
"""

from __future__ import annotations

import functools
import logging
import os

import numpy as np

from hpctrain.data.arrays import Bytes, Int64s, Pieces
from hpctrain.data.dataset import Dataset, Field, Shard
from hpctrain.data.files.storage import HDF5_FAILURES, INSTALL, read_box
from hpctrain.data.reading.chunk_index import ChunkedField
from hpctrain.data.reading.chunked import (
    ChunkJob,
    ChunkReader,
    DamagedRowsError,
    SoundChunks,
    checking_jobs,
    chunk_jobs,
    in_plain_chunks,
)
from hpctrain.data.reading.contiguous import ExtentReader, Extents
from hpctrain.data.reading.damage import DamagedChunkError, damaged_rows
from hpctrain.data.reading.handles import (
    Locate,
    OpenFiles,
    OpenShard,
    key_of_shard,
    open_shard,
    where_it_is,
)
from hpctrain.data.reading.scatter import Destinations, InRuns, Output, Scattered
from hpctrain.data.reading.threads import Helpers, ThreadMemory
from hpctrain.errors import DatasetError
from hpctrain.utils.text import printable

LARGEST_READ = 2**30
"""Bytes of one system call: Linux moves at most 2**31 - 4096."""

logger = logging.getLogger(__name__)


class ShardReader:
    """Reads rows of a dataset. For one thread at a time, with others to help it."""

    def __init__(
        self, dataset: Dataset, locate: Locate = where_it_is, helpers: Helpers | None = None
    ) -> None:
        """Prepare; no file is opened yet.

        Args:
            dataset: whose rows.
            locate: returns which file to read for a shard's path: itself, or an equal copy. It
                is asked again and again, and may change its mind.
            helpers: threads that share the work; None: the caller does all itself.
        """
        self.dataset = dataset
        self._locate = locate
        self.helpers = helpers or Helpers(1)
        self._stops = dataset.shard_stops
        self._starts = np.concatenate(([0], self._stops[:-1]))
        # Of every field, where row 0 of each shard is in its file; -1 where it is elsewhere.
        self._offsets = {name: _offsets(dataset, name) for name in dataset.fields}
        self._extents = ExtentReader(self.helpers)
        self._chunks = ChunkReader(self.helpers)
        self._sound = SoundChunks()
        self._staging = ThreadMemory()
        self._warned: set[str] = set()
        open_ = functools.partial(open_shard, dataset.fields)
        self._files = OpenFiles(open_, OpenShard.close, locate, key_of_shard)

    @property
    def files_opened(self) -> int:
        """How often a file was opened; at best once for each."""
        return self._files.opened

    def read_runs(
        self, name: str, rows: Int64s, counts: Int64s, out: Bytes, places: Int64s
    ) -> None:
        """Read runs of consecutive rows, as `RowReader.read_runs` does."""
        self._read_all(name, rows, counts, places, InRuns(out))

    def scatter_runs(
        self, name: str, rows: Int64s, counts: Int64s, into: Destinations, places: Int64s
    ) -> None:
        """Read runs of consecutive rows, each to its place, as `RowReader.scatter_runs` does."""
        firsts = np.cumsum(counts) - counts
        self._read_all(name, rows, counts, firsts, Scattered(into, places, self._staging))

    def close(self) -> None:
        """Close all files. Reading on opens them again."""
        self._files.close()
        self.helpers.close()

    def _pieces(self, rows: Int64s, counts: Int64s, places: Int64s) -> Pieces:
        """Cut runs where a shard ends."""
        shards = np.searchsorted(self._stops, rows, side="right")
        while True:
            over = rows + counts - self._stops[shards]
            crossing = np.flatnonzero(over > 0)
            if not len(crossing):
                return Pieces(shards, rows - self._starts[shards], counts, places)
            fitting = counts[crossing] - over[crossing]
            rows = np.append(rows, rows[crossing] + fitting)
            places = np.append(places, places[crossing] + fitting)
            counts = np.append(counts, over[crossing])
            counts[crossing] = fitting
            shards = np.append(shards, shards[crossing] + 1)

    def _read_all(
        self, name: str, rows: Int64s, counts: Int64s, places: Int64s, output: Output
    ) -> None:
        """Read runs of rows, each from a place of the output on.

        Raises:
            DatasetError: naming file, field and row, if the file is not there, not what it was
                when the dataset was opened, or cannot be read.
        """
        pieces = self._pieces(rows, counts, places)
        shards = np.unique(pieces.shards)
        # No file is closed while a thread of the helpers may read it.
        most = self._files.shards.most
        for start in range(0, len(shards), most):
            some = shards[start : start + most]
            part = pieces if len(shards) <= most else pieces.only(np.isin(pieces.shards, some))
            self._read(name, part, some, output)

    def _read(self, name: str, pieces: Pieces, shards: Int64s, output: Output) -> None:
        """Read rows of so few shards that all of them may be open."""
        field = self.dataset.fields[name]
        opened = {}
        for index in shards.tolist():
            # Who reads it row by row meets the failure again, and says where.
            opened[index] = self._try_open(self.dataset.shards[index])
        by_offset = self._offsets[name][pieces.shards] >= 0
        left = [
            self._read_extents(field, pieces.only(by_offset), self._offsets[name], opened, output)
        ]
        if not by_offset.all():
            left.append(self._read_chunks(name, pieces.only(~by_offset), opened, output))
        for part in left:
            for index, first, count, place in part.listed():
                with output.rows(field, place, count) as rows:
                    self._read_rows(name, index, first, rows)

    def _try_open(self, shard: Shard) -> OpenShard | None:
        try:
            return self._files.shards.get(shard)
        except HDF5_FAILURES:
            return None

    def _read_extents(
        self,
        field: Field,
        pieces: Pieces,
        offsets: Int64s,
        opened: dict[int, OpenShard | None],
        output: Output,
    ) -> Pieces:
        """Read rows that lie in the files as in memory, and return those that could not be."""
        offsets = offsets[pieces.shards] + pieces.firsts * field.row_bytes
        descriptors = self._descriptors(opened)[pieces.shards]
        return self._read_bytes(field, pieces, descriptors, offsets, output)

    def _read_bytes(
        self, field: Field, pieces: Pieces, descriptors: Int64s, offsets: Int64s, output: Output
    ) -> Pieces:
        """Read rows from these offsets, and return those that could not be read."""
        if not len(pieces.shards):
            return pieces
        target = output.target(field, pieces)
        sizes = pieces.counts * field.row_bytes
        failed = self._extents.read(Extents(descriptors, offsets, sizes), target)
        read = np.ones(len(sizes), bool)
        read[failed] = False
        output.make_native(field, pieces.only(read))
        return pieces.only(~read)

    def _read_chunks(
        self, name: str, pieces: Pieces, opened: dict[int, OpenShard | None], output: Output
    ) -> Pieces:
        """Read rows of chunks without HDF5, and return those that only it can read."""
        field = self.dataset.fields[name]
        pieces = pieces.only(np.argsort(pieces.shards, kind="stable"))
        left = [pieces.only(slice(0))]
        plain: list[tuple[ChunkedField, Pieces]] = []
        jobs: list[ChunkJob] = []
        for index in np.unique(pieces.shards).tolist():
            of_shard = pieces.only(slice(*np.searchsorted(pieces.shards, (index, index + 1))))
            shard = opened[index]
            chunks = None if shard is None else shard.chunked.get(name)
            if shard is None or chunks is None:
                if shard is not None and name in shard.reasons:
                    self._warn_slow(name, self.dataset.shards[index], shard.reasons[name])
                left.append(of_shard)
            elif chunks.is_plain:
                plain.append((chunks, of_shard))
            else:
                singly = of_shard.singly()
                written = chunks.is_written(singly.firsts)
                left.append(singly.only(~written))
                rows, places = singly.firsts[written], singly.places[written]
                jobs += chunk_jobs(index, shard.descriptor, chunks, rows, places)
                jobs += checking_jobs(index, shard.descriptor, chunks, singly.firsts[~written])
        left += self._read_jobs(name, jobs, output)
        if plain:
            pieces, offsets = in_plain_chunks(plain)
            left.append(pieces.only(offsets < 0))
            pieces, offsets = pieces.only(offsets >= 0), offsets[offsets >= 0]
            descriptors = self._descriptors(opened)[pieces.shards]
            left.append(self._read_bytes(field, pieces, descriptors, offsets, output))
        return Pieces.joined(left).merged()

    def _read_jobs(self, name: str, jobs: list[ChunkJob], output: Output) -> list[Pieces]:
        """Read and decode chunks, and return the rows that only HDF5 can read."""
        try:
            return self._chunks.read(jobs, output)
        except DamagedRowsError as error:
            path = self._locate(self.dataset.shards[error.shard].path)
            raise damaged_rows(path, name, (error.first, error.last), error) from error

    def _descriptors(self, opened: dict[int, OpenShard | None]) -> Int64s:
        """Return the descriptor of every shard, -1 for those that are not open."""
        descriptors = np.full(len(self._stops), -1, np.int64)
        for index, shard in opened.items():
            if shard is not None:
                descriptors[index] = shard.descriptor
        return descriptors

    def _warn_slow(self, name: str, shard: Shard, reason: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning(
                'field "%s" is read through HDF5, which is slower: %s: %s',
                printable(name),
                printable(shard.path),
                reason,
            )

    def _read_rows(self, name: str, index: int, first: int, out: Bytes) -> None:
        """Read consecutive rows of one shard, with all that can go wrong."""
        shard, field = self.dataset.shards[index], self.dataset.fields[name]
        try:
            self._read_part(shard, name, field, first, out)
        except DamagedChunkError as error:
            path = self._locate(shard.path)
            raise damaged_rows(path, name, (first, first + len(out) - 1), error) from error
        except HDF5_FAILURES as error:
            # Those of h5py have no number, and are not always OSErrors.
            what = getattr(error, "strerror", None) or error
            path = self._locate(shard.path)
            raise DatasetError(
                f'{path}: field "{shard.inside(name)}", row {first}: {what}{_hint(error)}'
            ) from error

    def _read_part(self, shard: Shard, name: str, field: Field, first: int, out: Bytes) -> None:
        """Fill `out` with rows of one shard."""
        offset = shard.layouts[name].offset
        if offset is None:
            self._read_by_hdf5(shard, name, field, first, out)
            return
        descriptor = self._files.shards.get(shard).descriptor
        place = offset + first * field.row_bytes
        left = memoryview(out.data).cast("B")
        while left:
            count = os.preadv(descriptor, [left[:LARGEST_READ]], place)
            if count == 0:
                row = first + (len(out) * field.row_bytes - len(left)) // field.row_bytes
                raise DatasetError(
                    f'{shard.path}: field "{name}", row {row}: the file ends here, at byte '
                    f"{place}; it was truncated. Bring the whole file back"
                )
            left = left[count:]
            place += count
        if not field.dtype.isnative:
            out.view(field.dtype).byteswap(inplace=True)

    def _read_by_hdf5(self, shard: Shard, name: str, field: Field, first: int, out: Bytes) -> None:
        """Fill `out` through h5py, which converts to the native byte order as it reads."""
        rows = out.view(field.dtype.newbyteorder("=")).reshape(len(out), *field.shape)
        dataset = self._files.in_hdf5.get(shard)[shard.inside(name)]
        if dataset.shape == field.shape:  # all of it is the one row
            self._sound.require(dataset, {})
            rows[0] = dataset[()]
            return
        self._sound.require(dataset, {0: (first, first + len(out))})
        read_box(dataset, rows, (slice(first, first + len(out)),))


def _offsets(dataset: Dataset, name: str) -> Int64s:
    """Return the offset of a field in every shard, -1 for none, (shards,) int64."""
    offsets = [shard.layouts[name].offset for shard in dataset.shards]
    return np.array([-1 if offset is None else offset for offset in offsets], np.int64)


def _hint(error: Exception) -> str:
    """Return what to do about an error of HDF5, as far as its text says."""
    if "filter" in str(error) and "plugin" in str(error):
        return f". A filter is missing: {INSTALL}"
    return ""
