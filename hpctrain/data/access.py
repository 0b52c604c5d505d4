"""Consecutive rows of one field, from the files into memory that the caller keeps.

Where the rows lie in a file as they do in memory, they are read by `preadv` at their offset:
HDF5, and the lock that it holds over all threads, are not in the path. The rest goes through h5py.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Dataset, Field, Shard
from hpctrain.data.permutation import Int64s
from hpctrain.data.storage import HDF5_FAILURES, INSTALL, load_plugins
from hpctrain.errors import DatasetError

Bytes = npt.NDArray[np.uint8]
H = TypeVar("H")

MOST_OPEN_FILES = 256
"""Open files of one reader; those unused for longest are closed. Far below any usual limit."""
LARGEST_READ = 2**30
"""Bytes of one system call: Linux moves at most 2**31 - 4096."""


Locate = Callable[[str], str]
"""From the path of a shard to where it is to be read."""


def where_it_is(path: str) -> str:
    """Return the path itself."""
    return path


class RowAccess:
    """Reads rows of a dataset. For one thread at a time."""

    def __init__(self, dataset: Dataset, locate: Locate = where_it_is) -> None:
        """Prepare; no file is opened yet.

        Args:
            dataset: whose rows.
            locate: returns which file to read for a shard's path: itself, or an equal copy. It
                is asked again and again, and may change its mind.
        """
        self.dataset = dataset
        self._locate = locate
        self._stops = dataset.shard_stops
        self._starts = np.concatenate(([0], self._stops[:-1]))
        # Of every field, where row 0 of each shard is in its file; -1 where only HDF5 knows.
        self._offsets = {name: _offsets(dataset, name) for name in dataset.fields}
        self._descriptors: _Handles[int] = _Handles(_open_descriptor, os.close, locate)
        self._files: _Handles[h5py.File] = _Handles(_open_hdf5, h5py.File.close, locate)

    @property
    def files_opened(self) -> int:
        """How often a file was opened; at best once for each."""
        return self._descriptors.opened + self._files.opened

    def read_runs(
        self, name: str, rows: Int64s, counts: Int64s, out: Bytes, places: Int64s
    ) -> None:
        """Read runs of consecutive rows of a field, in native byte order.

        Args:
            name: of the field.
            rows: (runs,) int64, the first row of each run, counted over all shards.
            counts: (runs,) int64, rows.
            out: (places, row_bytes) uint8, C-contiguous.
            places: (runs,) int64, where in `out` each run goes.

        Raises:
            DatasetError: naming file, field and row, if the file is not there, not what it was
                when the dataset was opened, or cannot be read.
        """
        field = self.dataset.fields[name]
        shards = np.searchsorted(self._stops, rows, side="right")
        offsets = self._offsets[name][shards]
        # One system call each where a run lies in one shard, as in memory: the rest is for _read.
        simple = (offsets >= 0) & (rows + counts <= self._stops[shards]) & field.dtype.isnative
        offsets = offsets + (rows - self._starts[shards]) * field.row_bytes
        target = memoryview(out.data).cast("B")
        preadv, descriptor_of = os.preadv, self._descriptors.get
        begins = places * field.row_bytes
        ends = begins + counts * field.row_bytes
        for run, (shard, offset, begin, end, is_simple) in enumerate(
            zip(
                shards.tolist(),
                offsets.tolist(),
                begins.tolist(),
                ends.tolist(),
                simple.tolist(),
                strict=True,
            )
        ):
            if is_simple:
                try:
                    descriptor = descriptor_of(self.dataset.shards[shard])
                    if preadv(descriptor, [target[begin:end]], offset) == end - begin:
                        continue
                except OSError:
                    pass  # _read meets it again, and says where
            place, count = int(places[run]), int(counts[run])
            self._read(name, field, int(rows[run]), out[place : place + count])

    def _read(self, name: str, field: Field, row: int, out: Bytes) -> None:
        """Read consecutive rows, from several shards if need be, with all that can go wrong."""
        done = 0
        while done < len(out):
            index = int(np.searchsorted(self._stops, row + done, side="right"))
            shard = self.dataset.shards[index]
            first = row + done - int(self._starts[index])
            part = out[done : done + shard.samples - first]
            try:
                self._read_part(shard, name, field, first, part)
            except HDF5_FAILURES as error:
                # Those of h5py have no number, and are not always OSErrors.
                what = getattr(error, "strerror", None) or error
                path = self._locate(shard.path)
                raise DatasetError(
                    f'{path}: field "{name}", row {first}: {what}{_hint(error)}'
                ) from error
            done += len(part)

    def close(self) -> None:
        """Close all files. Reading on opens them again."""
        self._descriptors.close()
        self._files.close()

    def _read_part(self, shard: Shard, name: str, field: Field, first: int, out: Bytes) -> None:
        """Fill `out` with rows of one shard."""
        offset = shard.layouts[name].offset
        if offset is None:
            self._read_by_hdf5(shard, name, field, first, out)
            return
        descriptor = self._descriptors.get(shard)
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
        dataset = self._files.get(shard)[name]
        dataset.read_direct(rows, source_sel=np.s_[first : first + len(out)])


class _Handles(Generic[H]):
    """Open files by path; the one unused for longest is closed when there are too many."""

    def __init__(
        self, open_: Callable[[Shard, str], H], close: Callable[[H], Any], locate: Locate
    ) -> None:
        self.opened = 0
        self._open = open_
        self._close = close
        self._locate = locate
        self._kept: OrderedDict[str, H] = OrderedDict()
        # Descriptors are mere numbers: nothing else closes them when their reader is dropped.
        weakref.finalize(self, _close_all, self._kept, close)

    def get(self, shard: Shard) -> H:
        path = self._locate(shard.path)
        handle = self._kept.get(path)
        if handle is None:
            if len(self._kept) >= MOST_OPEN_FILES:
                self._close(self._kept.popitem(last=False)[1])
            try:
                handle = self._open(shard, path)
            except (OSError, DatasetError):
                if path == shard.path:
                    raise
                handle = self._open(shard, shard.path)  # somebody has removed the copy
            self._kept[path] = handle
            self.opened += 1
        else:
            self._kept.move_to_end(path)
        return handle

    def close(self) -> None:
        _close_all(self._kept, self._close)


def _close_all(kept: OrderedDict[str, H], close: Callable[[H], Any]) -> None:
    while kept:
        close(kept.popitem()[1])


def _offsets(dataset: Dataset, name: str) -> Int64s:
    """Return the offset of a field in every shard, -1 for none, (shards,) int64."""
    offsets = [shard.layouts[name].offset for shard in dataset.shards]
    return np.array([-1 if offset is None else offset for offset in offsets], np.int64)


def _open_descriptor(shard: Shard, path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _require_size(shard, path, os.fstat(descriptor).st_size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open_hdf5(shard: Shard, path: str) -> h5py.File:
    _require_size(shard, path, Path(path).stat().st_size)
    load_plugins()  # the index may list chunks whose filter h5py alone does not have
    return h5py.File(path, "r", locking=False)


def _require_size(shard: Shard, path: str, size: int) -> None:
    if size != shard.size:
        raise DatasetError(
            f"{path}: {size} bytes, but {shard.size} when the dataset was opened: the file "
            "was truncated or written anew. Bring it back, or start again with the new one"
        )


def _hint(error: Exception) -> str:
    """Return what to do about an error of HDF5, as far as its text tells."""
    if "filter" in str(error) and "plugin" in str(error):
        return f". A filter is missing: {INSTALL}"
    return ""
