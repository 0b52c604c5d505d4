"""Variable-length HDF5 datasets: which values each row has, and reading them without HDF5.

A row is stored as the number of its values and where they are: a collection of the file's global
heap, and an object in it. That is looked at once, when the dataset is opened, 16 bytes a row; where
an object lies in its collection, a reader finds out as it goes, once for each collection.

Source: the HDF5 file format specification, III.E (global heaps) and IV.B (variable-length types).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Bytes, Int64s, within
from hpctrain.data.dataset import Dataset, Field, Shard
from hpctrain.data.files.global_heaps import require_sound_fill, require_sound_heap
from hpctrain.data.files.storage import HDF5_FAILURES, filters_of, open_hdf5_file
from hpctrain.data.files.walking import is_in
from hpctrain.data.reading.chunk_index import list_chunks
from hpctrain.data.reading.contiguous import ExtentReader, Extents
from hpctrain.data.reading.damage import DamagedChunkError, UndecodableError
from hpctrain.data.reading.filters import Pipeline
from hpctrain.data.reading.handles import Locate, OpenFiles, open_descriptor, where_it_is
from hpctrain.data.reading.scatter import (
    Destinations,
    InPieces,
    Read,
    Vectors,
    can_read_vectors,
    read_vectors,
    scatter_by_runs,
)
from hpctrain.data.reading.threads import Helpers, ThreadMemory
from hpctrain.data.view import Part
from hpctrain.errors import DatasetError

HEAD_BYTES = 2**16
"""Of a collection that are read to find its objects: all of it, unless an object is large."""
LARGEST_GAP_BYTES = 512
"""Neighbours with no more than this between them are read in one go."""
ROWS_AT_ONCE = 2**16
"""That HDF5 is asked for, where nobody else can read them."""

_DESCRIPTOR = np.dtype([("count", "<u4"), ("collection", "<u8"), ("object", "<u4")])
_COLLECTION = struct.Struct("<4sB3xQ")
_OBJECT = struct.Struct("<HH4xQ")
_UNKNOWN, _BY_HDF5 = -2, -1


class Rows(NamedTuple):
    """What the rows of a variable-length dataset of one file are.

    Attributes:
        counts: (rows,) int64, values.
        collections: (rows,) int64, as in `Heap`.
        objects: (rows,) uint32, as in `Heap`.
    """

    counts: Int64s
    collections: Int64s
    objects: npt.NDArray[np.uint32]


def find_rows(shards: Sequence[Shard], field: Field) -> list[Rows]:
    """Look at all rows of variable-length datasets, and not at their values.

    Args:
        shards: the files, or groups; a file whose groups follow each other is opened once.
        field: its values, with the form that says where it is.

    Raises:
        DatasetError: if it cannot be read, or a row says what cannot be.
    """
    found = []
    for path, own in groupby(shards, lambda shard: shard.path):
        try:
            with open_hdf5_file(path) as file:
                found += [_rows_in(file, shard, field) for shard in own]
        except HDF5_FAILURES as error:
            raise DatasetError(f"{path}: HDF5 cannot read this file: {error}") from error
    return found


def _rows_in(file: h5py.File, shard: Shard, field: Field) -> Rows:
    """Return what the rows of a dataset say of their values."""
    assert field.form is not None
    path, name = shard.path, shard.inside(field.form.path)
    try:
        dataset = file[name]
        stored, unknown = _descriptors(dataset, path, field)
        counts = stored["count"].astype(np.int64)
        collections = stored["collection"].astype(np.int64)
        _count_by_hdf5(dataset, counts, unknown)
        if unknown.any() and not field.dtype.isnative:
            raise ValueError(
                f"its values are {field.dtype.str}, and h5py does not swap their bytes: write "
                "them anew in the byte order of this machine"
            )
    except (*HDF5_FAILURES, DamagedChunkError) as error:
        raise DatasetError(f'{path}: field "{name}": {error}') from error
    collections[unknown] = _BY_HDF5
    collections[counts == 0] = 0
    # No two rows share values, so that all of them together fit into the file as well.
    outside = np.cumsum(np.where(unknown, 0, counts)) * field.row_bytes > shard.size
    outside |= (collections >= shard.size) | (collections < _BY_HDF5)
    outside |= (collections == 0) & (counts > 0)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise DatasetError(
            f'{path}: field "{name}", row {row}: it is said to have {counts[row]:,} values, at '
            f"byte {collections[row]:,} of a file of {shard.size:,}: the file is damaged. Bring "
            "the whole file back"
        )
    return Rows(counts, collections, stored["object"].copy())


def _descriptors(
    dataset: h5py.Dataset, path: str, field: Field
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return all rows as they are stored, and which of them only HDF5 can read."""
    require_sound_fill(dataset)
    rows = dataset.size
    stored = np.zeros(rows, _DESCRIPTOR)
    unknown = np.ones(rows, bool)
    if not _is_plain(dataset, path, field):
        return stored, unknown
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        if offset is None:
            return stored, unknown
        found = np.fromfile(path, _DESCRIPTOR, rows, offset=offset)
        if len(found) < rows:
            raise OSError("the file ends before its rows do: bring the whole file back")
        return found, ~unknown
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - by the descriptor
        _read_chunks(dataset, file.fileno(), stored, unknown)
    return stored, unknown


def _is_plain(dataset: h5py.Dataset, path: str, field: Field) -> bool:
    """Tell whether rows and values lie in this file, and values as in memory."""
    file = dataset.file
    if dataset.is_virtual or dataset.external or not is_in(dataset, path) or file.userblock_size:
        return False
    if file.id.get_create_plist().get_sizes() != (8, 8):
        return False
    if dataset.chunks is None and dataset.id.get_space_status() != h5py.h5d.SPACE_STATUS_ALLOCATED:
        return False
    kind = dataset.id.get_type()
    if not isinstance(kind, h5py.h5t.TypeVlenID):
        return True  # text: its bytes
    there = np.dtype((field.dtype, field.shape)) if field.shape else field.dtype
    return bool(h5py.h5t.py_create(there, logical=True).equal(kind.get_super()))


def _read_chunks(
    dataset: h5py.Dataset,
    descriptor: int,
    stored: npt.NDArray[Any],
    unknown: npt.NDArray[np.bool_],
) -> None:
    """Read the rows of those chunks that can be decoded without HDF5."""
    (size,) = dataset.chunks
    chunk_bytes = size * _DESCRIPTOR.itemsize
    try:
        # Of shuffle, which leaves such rows as they are, there are no values.
        filters = [each._replace(values=each.values or (1,)) for each in filters_of(dataset)]
        pipeline = Pipeline(filters, chunk_bytes)
        table = list_chunks(dataset, [-(-len(stored) // size)], pipeline, chunk_bytes)
    except UndecodableError:
        return
    memory = ThreadMemory()
    for number, (offset, length, skipped) in enumerate(table.tolist()):
        if offset < 0 or length > pipeline.most_stored:
            continue
        raw = np.frombuffer(os.pread(descriptor, length, offset), np.uint8)
        try:
            content = pipeline.decode(raw, [length], [skipped], memory)
        except (UndecodableError, DamagedChunkError):
            continue  # HDF5 meets it, too, and says what it is
        rows = slice(number * size, min((number + 1) * size, len(stored)))
        stored[rows] = content.reshape(-1).view(_DESCRIPTOR)[: rows.stop - rows.start]
        unknown[rows] = False


def _count_by_hdf5(dataset: h5py.Dataset, counts: Int64s, unknown: npt.NDArray[np.bool_]) -> None:
    """Count the values of rows that only HDF5 can read. It reads them all."""
    if not unknown.any():
        return
    for start in range(0, len(counts), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        if unknown[rows].any():
            require_sound_heap(dataset, rows)
            values = dataset[rows] if dataset.ndim else [dataset[()]]
            lengths = np.fromiter(map(len, values), np.int64)
            counts[rows] = np.where(unknown[rows], lengths, counts[rows])


class HeapReader:
    """Reads values of a part that is variable-length. For one thread at a time."""

    def __init__(
        self, part: Part, locate: Locate = where_it_is, helpers: Helpers | None = None
    ) -> None:
        """Prepare; no file is opened yet. `locate` and `helpers` are as ShardReader takes them."""
        assert part.heap is not None
        self.dataset: Dataset = part.dataset
        self._heap, self._lengths = part.heap, part.heap.lengths
        self._ends = self._lengths.firsts + self._lengths.counts
        # Of each row of values, where it is in its file.
        self._offsets = np.full(len(self._ends), _UNKNOWN, np.int64)
        self._by_collection: dict[int, tuple[Int64s, Int64s]] = {}
        self._helpers = helpers or Helpers(1)
        self._extents = ExtentReader(self._helpers)
        self._staging = ThreadMemory()
        self._nowhere = np.empty(LARGEST_GAP_BYTES, np.uint8)
        self._files: OpenFiles[int] = OpenFiles(open_descriptor, os.close, locate)

    @property
    def files_opened(self) -> int:
        """How often a file was opened; at best once for each."""
        return self._files.opened

    def read_runs(
        self, name: str, rows: Int64s, counts: Int64s, out: Bytes, places: Int64s
    ) -> None:
        """Read runs of consecutive values, as `RowReader.read_runs` does rows."""
        field = self.dataset.fields[name]
        assert field.form is not None
        name = field.form.path
        pieces = self._pieces(rows, counts, places)
        shards = np.searchsorted(self._lengths.stops, pieces.rows, side="right")
        there = np.unique(shards)
        for start in range(0, len(there), self._files.shards.most):
            some = there[start : start + self._files.shards.most]
            if len(some) == len(there):
                self._read(name, field, pieces, shards, out)
            else:
                own = np.isin(shards, some)
                self._read(name, field, pieces.only(own), shards[own], out)

    def scatter_runs(
        self, name: str, rows: Int64s, counts: Int64s, into: Destinations, places: Int64s
    ) -> None:
        """Read runs of consecutive values, each to its place, as `RowReader.scatter_runs` does."""
        scatter_by_runs(self, self._staging, name, rows, counts, into, places)

    def close(self) -> None:
        """Close all files. Reading on opens them again."""
        self._files.close()
        self._helpers.close()

    def _pieces(self, rows: Int64s, counts: Int64s, places: Int64s) -> _Pieces:
        """Cut runs of values where a row ends, of all of which some are wanted."""
        first = np.searchsorted(self._ends, rows, side="right")
        last = np.searchsorted(self._ends, rows + counts - 1, side="right")
        of_run = last - first + 1
        owners = np.repeat(np.arange(len(rows)), of_run)
        samples = first[owners] + within(of_run)
        begins = np.maximum(self._lengths.firsts[samples], rows[owners])
        ends = np.minimum(self._ends[samples], (rows + counts)[owners])
        inside = begins - self._lengths.firsts[samples]
        to = places[owners] + begins - rows[owners]
        pieces = _Pieces(samples, inside, ends - begins, to)
        return pieces.only(pieces.counts > 0)

    def _read(self, name: str, field: Field, pieces: _Pieces, shards: Int64s, out: Bytes) -> None:
        """Read pieces of rows of so few shards that all of them may be open."""
        collections = self._heap.collections[pieces.rows]
        by_hdf5 = collections == _BY_HDF5
        if by_hdf5.any():
            self._read_by_hdf5(name, field, pieces.only(by_hdf5), shards[by_hdf5], out)
            pieces, shards = pieces.only(~by_hdf5), shards[~by_hdf5]
        if not len(shards):
            return
        descriptors = self._descriptors(shards)
        self._locate(name, field, pieces.rows, shards, descriptors)
        offsets = self._offsets[pieces.rows] + pieces.firsts * field.row_bytes
        order = np.lexsort((offsets, shards))
        pieces, shards, sizes = pieces.only(order), shards[order], pieces.counts[order]
        extents = Extents(descriptors[order], offsets[order], sizes * field.row_bytes)
        failed = self._read_extents(extents, out, pieces.places * field.row_bytes)
        if len(failed):
            self._raise_failed(name, field, pieces.only(failed[:1]), shards[failed[:1]])
        _make_native(field, pieces, out)

    def _descriptors(self, shards: Int64s) -> Int64s:
        """Return the descriptor of each of these shards, opened."""
        there, which = np.unique(shards, return_inverse=True)
        opened = [self._opened(self.dataset.shards[index]) for index in there.tolist()]
        return np.array(opened, np.int64)[which]

    def _opened(self, shard: Shard) -> int:
        try:
            return self._files.shards.get(shard)
        except OSError as error:
            raise DatasetError(f"{shard.path}: {error.strerror or error}") from error

    def _locate(
        self, name: str, field: Field, rows: Int64s, shards: Int64s, descriptors: Int64s
    ) -> None:
        """Find out where rows are in their files, with all others of the same collections."""
        new = self._offsets[rows] == _UNKNOWN
        if not new.any():
            return
        collections = self._heap.collections[rows[new]]
        found = np.unique(np.stack([shards[new], descriptors[new], collections]), axis=1)
        for index, descriptor, collection in found.T.tolist():
            order, sorted_ = self._sorted_rows(index)
            own = order[slice(*np.searchsorted(sorted_, (collection, collection + 1)))]
            sizes = self._lengths.counts[own] * field.row_bytes
            try:
                places = _objects_in(descriptor, collection)
                at = [places.get(number, (-1, 0)) for number in self._heap.objects[own].tolist()]
                offsets, stored = np.array(at, np.int64).T
            except OSError as error:
                shard = self.dataset.shards[index]
                raise DatasetError(
                    f'{shard.path}: field "{shard.inside(name)}": {error}'
                ) from error
            wrong = np.flatnonzero((offsets < 0) | (stored < sizes))
            if len(wrong):
                ((shard, row),) = self._places(own[wrong[:1]])
                raise DatasetError(
                    f'{shard.path}: field "{shard.inside(name)}", row {row}: its values are not '
                    f"where the row says (global heap at byte {collection:,}): the file is "
                    "damaged. Bring it back"
                )
            self._offsets[own] = offsets

    def _sorted_rows(self, index: int) -> tuple[Int64s, Int64s]:
        """Return the rows of a shard in the order of their collections, and these."""
        known = self._by_collection.get(index)
        if known is None:
            stops = self._lengths.stops
            first = int(stops[index - 1]) if index else 0
            collections = self._heap.collections[first : int(stops[index])]
            order = np.argsort(collections, kind="stable")
            known = self._by_collection[index] = (order + first, collections[order])
        return known

    def _read_extents(self, extents: Extents, out: Bytes, begins: Int64s) -> Int64s:
        """Read extents to these bytes of the output; neighbours, and what is between, in one go.

        Returns:
            Indices of those that could not be read.
        """
        if not can_read_vectors():
            return self._extents.read(extents, InPieces(out, begins, extents.sizes))
        descriptors, offsets, sizes = extents
        gaps = np.zeros_like(sizes)
        gaps[:-1] = offsets[1:] - (offsets + sizes)[:-1]
        gaps[:-1][descriptors[1:] != descriptors[:-1]] = 0
        gaps[(gaps < 0) | (gaps > LARGEST_GAP_BYTES)] = 0
        # Every second extent is what lies behind the one before it, and goes nowhere.
        memory = np.empty((len(sizes), 2, 2), np.uint64)
        memory[:, 0, 0] = out.ctypes.data + begins
        memory[:, 0, 1] = sizes
        memory[:, 1, 0] = self._nowhere.ctypes.data
        memory[:, 1, 1] = gaps
        wanted = np.stack([sizes, gaps], axis=1).ravel() > 0
        target = _Vectors(memory.reshape(-1, 2)[wanted])
        among = Extents(
            np.repeat(descriptors, 2)[wanted],
            np.stack([offsets, offsets + sizes], axis=1).ravel()[wanted],
            np.stack([sizes, gaps], axis=1).ravel()[wanted],
        )
        return np.unique(np.flatnonzero(wanted)[self._extents.read(among, target)] // 2)

    def _raise_failed(self, name: str, field: Field, piece: _Pieces, shards: Int64s) -> None:
        """Read what could not be read again, for the reason.

        Raises:
            DatasetError: with it.
        """
        ((shard, row),) = self._places(piece.rows)
        size = int(piece.counts[0]) * field.row_bytes
        offset = int(self._offsets[piece.rows[0]] + piece.firsts[0] * field.row_bytes)
        try:
            got = len(os.pread(int(self._descriptors(shards)[0]), size, offset))
            raise OSError(f"the file ends after {got} of {size} bytes, at byte {offset + got}")
        except OSError as error:
            what = error.strerror or error
            raise DatasetError(
                f'{shard.path}: field "{shard.inside(name)}", row {row}: {what}'
            ) from error

    def _read_by_hdf5(
        self, name: str, field: Field, pieces: _Pieces, shards: Int64s, out: Bytes
    ) -> None:
        """Read rows through h5py, one by one."""
        made = out.view(field.dtype.newbyteorder("=")).reshape(len(out), *field.shape)
        places = self._places(pieces.rows)
        for (shard, row), (_, first, count, to) in zip(places, pieces.listed(), strict=True):
            try:
                dataset = self._files.in_hdf5.get(shard)[shard.inside(name)]
                require_sound_heap(dataset, slice(row, row + 1))
                values = dataset[row] if dataset.ndim else dataset[()]
            except HDF5_FAILURES as error:
                raise DatasetError(
                    f'{shard.path}: field "{shard.inside(name)}", row {row}: {error}'
                ) from error
            if isinstance(values, str | bytes):
                values = np.frombuffer(values.encode() if isinstance(values, str) else values, "u1")
            made[to : to + count] = np.asarray(values)[first : first + count]

    def _places(self, rows: Int64s) -> list[tuple[Shard, int]]:
        """Return the shard of each row, and its number there."""
        stops, shards = self._lengths.stops, self.dataset.shards
        indices = np.searchsorted(stops, rows, side="right")
        inside = rows - np.concatenate(([0], stops))[indices]
        return [(shards[i], row) for i, row in zip(indices, inside.tolist(), strict=True)]


class _Vectors:
    """Each extent to memory of its own, as `hpctrain.data.reading.scatter.Target` has it."""

    def __init__(self, memory: Vectors) -> None:
        self.vectors = np.ones(len(memory), np.int64)
        self._memory = memory

    def open(self) -> AbstractContextManager[Read]:
        """Return what reads extents."""
        return nullcontext(self._read)

    def _read(self, descriptor: int, offset: int, first: int, stop: int, size: int) -> int:
        address = self._memory.ctypes.data + first * self._memory.strides[0]
        return read_vectors(descriptor, address, stop - first, offset)


class _Pieces(NamedTuple):
    """Parts of rows: arrays of int64 of the same length.

    Attributes:
        rows: that they are of.
        firsts: values of the row before them.
        counts: values.
        places: where in the output each goes.
    """

    rows: Int64s
    firsts: Int64s
    counts: Int64s
    places: Int64s

    def only(self, which: Any) -> _Pieces:
        """Return some of them, by index or mask."""
        return _Pieces(*(each[which] for each in self))

    def listed(self) -> list[tuple[int, int, int, int]]:
        """Return row, values before, values and place of each."""
        return list(zip(*(each.tolist() for each in self), strict=True))


def _objects_in(descriptor: int, collection: int) -> dict[int, tuple[int, int]]:
    """Return where the objects of a collection are in their file, and their bytes, by number.

    Raises:
        OSError: if it cannot be read, or is none.
    """
    head = os.pread(descriptor, HEAD_BYTES, collection)
    if len(head) < _COLLECTION.size:
        raise OSError(f"the file ends at byte {collection + len(head):,}: bring all of it back")
    signature, version, size = _COLLECTION.unpack_from(head)
    if (signature, version) != (b"GCOL", 1):
        raise OSError(f"there is no global heap at byte {collection:,}: the file is damaged")
    found: dict[int, tuple[int, int]] = {}
    size = min(size, os.fstat(descriptor).st_size - collection)
    at = _COLLECTION.size
    while at + _OBJECT.size <= size:
        if at + _OBJECT.size <= len(head):
            number, _, length = _OBJECT.unpack_from(head, at)
        else:  # behind a large one
            header = os.pread(descriptor, _OBJECT.size, collection + at)
            if len(header) < _OBJECT.size:
                break
            number, _, length = _OBJECT.unpack(header)
        if not number:  # what is free, up to the end
            break
        found[number] = (collection + at + _OBJECT.size, min(length, size))
        at += _OBJECT.size + (length + 7) // 8 * 8
    return found


def _make_native(field: Field, pieces: _Pieces, out: Bytes) -> None:
    """Make values of this machine of those of a file."""
    if field.dtype.isnative:
        return
    rows = np.repeat(pieces.places, pieces.counts) + within(pieces.counts)
    out[rows] = out[rows].view(field.dtype).byteswap().view(np.uint8)
