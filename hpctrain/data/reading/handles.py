"""Open files: a bounded number of them, opened once each at best, locked never."""

from __future__ import annotations

import os
import resource
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import h5py

from hpctrain.data.dataset import Field, Shard
from hpctrain.data.files.storage import load_plugins, open_hdf5_file
from hpctrain.data.reading.chunk_index import ChunkedField
from hpctrain.data.reading.damage import UndecodableError
from hpctrain.errors import DatasetError
from hpctrain.utils.files import open_regular

MOST_OPEN_FILES = 1024
"""Open files of one reader, or a quarter of what the system allows a process, if that is less;
those unused for longest are closed."""
MOST_OPEN_IN_HDF5 = 16
"""Of these, HDF5 keeps some MB of memory each."""

H = TypeVar("H")
Locate = Callable[[str], str]
"""From the path of a shard to where it is to be read."""


def where_it_is(path: str) -> str:
    """Return the path itself."""
    return path


class Handles(Generic[H]):
    """Open files by path; the one unused for longest is closed when there are too many."""

    def __init__(
        self,
        open_: Callable[[Shard, str], H],
        close: Callable[[H], Any],
        locate: Locate,
        most: int,
        key: Callable[[Shard, str], str] = lambda shard, path: path,
    ) -> None:
        """Begin without any.

        Args:
            open_: opens a shard that is to be read at a path.
            close: closes what it gave.
            locate: which file is read for a shard.
            most: that are open at once.
            key: shards with the same share a handle; by default those of one file.
        """
        self.opened = 0
        self.most = most
        self._open = open_
        self._close = close
        self._locate = locate
        self._key = key
        self._kept: OrderedDict[str, H] = OrderedDict()
        # Descriptors are mere numbers: nothing else closes them when their reader is dropped.
        weakref.finalize(self, _close_all, self._kept, close)

    def get(self, shard: Shard) -> H:
        path = self._locate(shard.path)
        key = self._key(shard, path)
        handle = self._kept.get(key)
        if handle is None:
            if len(self._kept) >= self.most:
                self._close(self._kept.popitem(last=False)[1])
            try:
                handle = self._open(shard, path)
            except (OSError, DatasetError):
                if path == shard.path:
                    raise
                handle = self._open(shard, shard.path)  # somebody has removed the copy
            self._kept[key] = handle
            self.opened += 1
        else:
            self._kept.move_to_end(key)
        return handle

    def close(self) -> None:
        _close_all(self._kept, self._close)


class OpenFiles(Generic[H]):
    """The open files of one reader.

    Attributes:
        shards: to read bytes of.
        in_hdf5: to have HDF5 read what is left.
    """

    def __init__(
        self,
        open_: Callable[[Shard, str], H],
        close: Callable[[H], Any],
        locate: Locate,
        key: Callable[[Shard, str], str] = lambda shard, path: path,
    ) -> None:
        """Begin without any; as `Handles` takes it, how shards are opened to read bytes of."""
        self.shards: Handles[H] = Handles(open_, close, locate, most_open_files(), key)
        self.in_hdf5 = handles_in_hdf5(locate)

    @property
    def opened(self) -> int:
        """How often a file was opened; at best once for each."""
        return self.shards.opened + self.in_hdf5.opened

    def close(self) -> None:
        self.shards.close()
        self.in_hdf5.close()


def handles_in_hdf5(locate: Locate) -> Handles[h5py.File]:
    """Return files that are open in HDF5: none yet."""
    return Handles(open_hdf5, h5py.File.close, locate, MOST_OPEN_IN_HDF5)


def most_open_files() -> int:
    """Return how many files a reader keeps open."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN_FILES if allowed < 0 else max(1, min(MOST_OPEN_FILES, allowed // 4))


class OpenShard:
    """A file to read bytes of, and where its chunks are.

    Attributes:
        descriptor: of the open file.
        chunked: fields whose chunks are read without HDF5.
        reasons: why not, for other fields.
    """

    def __init__(self, shard: Shard, path: str, chunked: Iterable[str]) -> None:
        """Open a shard, or its copy; HDF5 is asked about these fields, and let go of again.

        Raises:
            DatasetError: if the file is not what it was when the dataset was opened.
            OSError: if the system, or HDF5, refuses.
        """
        self.chunked: dict[str, ChunkedField] = {}
        self.reasons: dict[str, str] = {}
        names = list(chunked)
        if not names:
            self.descriptor = open_descriptor(shard, path)
            return
        with open_hdf5(shard, path) as file:
            for name in names:
                try:
                    dataset = file[shard.inside(name)]
                    if dataset.file.filename != file.filename:
                        raise UndecodableError("in another file, by a link")
                    self.chunked[name] = ChunkedField(dataset)
                except UndecodableError as error:
                    self.reasons[name] = str(error)
            # A second name of HDF5's own descriptor: the file system sees one open, and HDF5's
            # memory for the file does not stay.
            self.descriptor = os.dup(file.id.get_vfd_handle())

    def close(self) -> None:
        os.close(self.descriptor)


def has_chunks(shard: Shard) -> bool:
    """Tell whether a shard has chunks that are read without HDF5, and are listed when it opens."""
    return any(each.offset is None and each.is_direct for each in shard.layouts.values())


def key_of_shard(shard: Shard, path: str) -> str:
    """Return what shards share that one open file serves: of groups without chunks, the path."""
    return f"{path}\0{shard.group}" if shard.group and has_chunks(shard) else path


def open_shard(fields: Mapping[str, Field], shard: Shard, path: str) -> OpenShard:
    """Open a shard, and list the chunks of the fields that are in some.

    Raises:
        DatasetError: if the file is not what it was when the dataset was opened, or an index of
            0.1.0, which has no checksum, says otherwise than the file what a field is.
    """
    layouts = shard.layouts.items()
    chunked = [name for name, layout in layouts if layout.offset is None and layout.is_direct]
    opened = OpenShard(shard, path, chunked)
    for name, chunks in opened.chunked.items():
        rows = min(chunks.samples, shard.samples) if shard.grows else chunks.samples
        if (rows, chunks.field) != (shard.samples, fields[name]):
            opened.close()
            raise DatasetError(
                f'{path}: field "{name}" has {chunks.samples} rows of {chunks.field.dtype}, of '
                f"shape {chunks.field.shape}, and its index says otherwise. Make the index anew "
                "with `python -m hpctrain data index`"
            )
    return opened


def open_descriptor(shard: Shard, path: str) -> int:
    """Open a shard, or its copy, to read bytes of.

    Raises:
        DatasetError: if the file is not what it was when the dataset was opened.
        OSError: if the system refuses.
    """
    descriptor = open_regular(path)
    try:
        _require_size(shard, path, os.fstat(descriptor).st_size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_hdf5(shard: Shard, path: str) -> h5py.File:
    """Open a shard, or its copy, in HDF5. Of several processes reading, none needs a lock.

    Raises:
        DatasetError: if the file is not what it was when the dataset was opened.
        OSError: if the system, or HDF5, refuses.
    """
    _require_size(shard, path, Path(path).stat().st_size)
    load_plugins()  # the index may list chunks whose filter h5py alone does not have
    return open_hdf5_file(path)


def _close_all(kept: OrderedDict[str, H], close: Callable[[H], Any]) -> None:
    while kept:
        close(kept.popitem()[1])


def _require_size(shard: Shard, path: str, size: int) -> None:
    if size < shard.size or (size != shard.size and not shard.grows):
        raise DatasetError(
            f"{path}: {size} bytes, but {shard.size} when the dataset was opened: the file "
            "was truncated or written anew. Bring it back, or start again with the new one"
        )
