"""Writing a dataset: shards of plain HDF5, each there whole or not at all, then the index."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Dataset, Field, Shard, require_supported
from hpctrain.data.files.discovery import inspect_file
from hpctrain.data.files.index import (
    HDF5_SUFFIXES,
    INDEX_NAME,
    UNFINISHED_NAME,
    is_shard_name,
    write_index,
)
from hpctrain.data.files.storage import Storage
from hpctrain.errors import DatasetError
from hpctrain.topology import Communicator, on_all_ranks, on_rank_zero
from hpctrain.utils.files import file_checksum, publish, temporary_name

SHARD_BYTES = 256 * 2**20
"""Values in one shard, about, where nothing else is asked for."""
ALIGNMENTS = ((16 * 2**20, 2**20), (2**16, 2**12))
"""(bytes of the largest field, alignment): whole stripes of a parallel file system, or whole pages.

A field is aligned if it is at least 16 times as large, so that gaps stay below 7 %.
"""
Attributes = Mapping[str, Mapping[str, Any]]


class Writer:
    """Writes samples to a new folder of shards, with an index.

    Use as a context manager. The index is written last, when the body ends without an exception;
    after one, what was written is removed.

        with Writer("data/train") as writer:
            for image, label in scans:
                writer.append({"image": image, "label": label})

    The first sample decides the shapes and dtypes of the fields; every later one must fit. One
    shard is held in memory until it is full, then written under a hidden name, synced and renamed.

    With a communicator all ranks write to one dataset, each its own samples: those of rank 0 come
    first, then those of rank 1, and so on. To enter and to leave are then collective; `append` and
    `extend` are not. An exception on one rank has to end the job, as `hpctrain.connect` sees to,
    and leaves a folder that nothing reads as a dataset.

        with hpctrain.connect() as world, Writer("data", communicator=world.communicator) as writer:
            for path in paths[world.topology.rank :: world.topology.world_size]:
                writer.extend(load(path))
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        shard_bytes: int = SHARD_BYTES,
        shard_rows: int | None = None,
        storage: Storage | None = None,
        attributes: Attributes | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        """Prepare; the folder is made when the body begins.

        Args:
            folder: where the shards go; new, or empty.
            shard_bytes: values in one shard, about.
            shard_rows: samples in one shard; None: as many as make `shard_bytes`.
            storage: such as `Storage("gzip")`; None: contiguous, which reads fastest.
            attributes: by field, HDF5 attributes such as {"units": "kelvin"}.
            communicator: of all ranks that write; None: this process alone.

        Raises:
            DatasetError: if the filter of `storage` is not installed.
        """
        self._folder = Path(folder)
        self._shard_bytes = shard_bytes
        self._wanted_rows = shard_rows
        self._storage = storage or Storage()
        self._storage.require_available()
        self._communicator = communicator
        self._attributes = {name: dict(values) for name, values in (attributes or {}).items()}
        self._fields: dict[str, Field] = {}
        self._buffers: dict[str, npt.NDArray[Any]] = {}
        self._rows = 0
        self._shard_rows = 0
        self._shards: list[Shard] = []

    def __enter__(self) -> Writer:
        """Make the folder. Collective, with a communicator: all ranks.

        Raises:
            DatasetError: if it holds a dataset already, or a part of one.
        """
        if self._communicator is None:
            self._begin()
        else:
            on_rank_zero(self._communicator, self._begin)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        finished = False
        try:
            if kind is None:
                self._finish()
                finished = True
        finally:
            if not finished:
                self._discard()

    def append(self, sample: Mapping[str, npt.ArrayLike]) -> None:
        """Add one sample.

        Args:
            sample: by field, an array of the field's shape.

        Raises:
            DatasetError: if it does not fit the first one, or a dtype cannot become a tensor.
        """
        self.extend({name: np.asarray(value)[None] for name, value in sample.items()})

    def extend(self, samples: Mapping[str, npt.ArrayLike]) -> None:
        """Add several samples.

        Args:
            samples: by field, (samples, *shape).

        Raises:
            DatasetError: if they do not fit the first ones, or a dtype cannot become a tensor.
        """
        arrays = {name: np.asarray(values) for name, values in samples.items()}
        count = self._require_fit(arrays)
        done = 0
        while done < count:
            step = min(count - done, self._shard_rows - self._rows)
            for name, array in arrays.items():
                self._buffers[name][self._rows : self._rows + step] = array[done : done + step]
            self._rows += step
            done += step
            if self._rows == self._shard_rows:
                self._write_shard()

    @property
    def _marker(self) -> Path:
        return self._folder / UNFINISHED_NAME

    def _begin(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            require_vacant(self._folder)
            # Until the index is there, the shards must not pass for plain HDF5 files.
            self._marker.touch(exist_ok=False)
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def _require_fit(self, arrays: Mapping[str, npt.NDArray[Any]]) -> int:
        """Return how many samples these are, if they are what the first ones were."""
        counts = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
        if not counts or len(set(counts.values())) != 1:
            raise DatasetError(
                f"{self._folder}: the fields have different numbers of samples: {counts}"
            )
        # Always this machine's byte order: numpy's scalars have no other either.
        fields = {
            name: Field(array.shape[1:], array.dtype.newbyteorder("="))
            for name, array in arrays.items()
        }
        if not self._fields:
            for name, field in fields.items():
                require_supported(name, field, str(self._folder))
            unknown = self._attributes.keys() - fields.keys()
            if unknown:
                raise DatasetError(
                    f"{self._folder}: attributes for {', '.join(sorted(unknown))}, which no sample "
                    f"has. The fields are: {', '.join(fields)}"
                )
            self._fields = fields
            self._shard_rows = self._wanted_rows or rows_of_shard(
                fields, self._shard_bytes, self._storage
            )
            self._buffers = {
                name: np.empty((self._shard_rows, *field.shape), field.dtype)
                for name, field in fields.items()
            }
        if fields != self._fields:
            raise DatasetError(
                f"{self._folder}: sample {len(self._shards) * self._shard_rows + self._rows} has "
                f"{_describe(fields)}; the first one had {_describe(self._fields)}. "
                "Give all samples the same fields, shapes and dtypes"
            )
        return next(iter(counts.values()))

    def _write_shard(self) -> None:
        numbers = [len(self._shards)]
        if self._communicator is not None:
            numbers.insert(0, self._communicator.rank)
        rows = {name: buffer[: self._rows] for name, buffer in self._buffers.items()}
        path = self._folder / shard_name(*numbers)
        self._shards.append(write_shard(path, rows, self._attributes, self._storage))
        self._rows = 0

    def _finish(self) -> None:
        if self._communicator is None:
            self._write_rest()
            self._write_index(self._fields, self._shards)
            return
        parts = on_all_ranks(self._communicator, self._write_rest)
        on_rank_zero(self._communicator, lambda: self._write_index(*_joined(self._folder, parts)))

    def _write_rest(self) -> tuple[dict[str, Field], list[Shard]]:
        """Write the last, shorter shard and return what this process has written."""
        if self._rows:
            self._write_shard()
        return self._fields, self._shards

    def _write_index(self, fields: Mapping[str, Field], shards: Sequence[Shard]) -> None:
        if not shards:
            raise DatasetError(f"{self._folder}: no sample was written")
        try:
            write_index(Dataset(str(self._folder), fields, tuple(shards)), self._folder)
            self._marker.unlink()
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def _discard(self) -> None:
        """Remove what this writer wrote; a dataset is there whole or not at all.

        Of several ranks each removes its own, and the mark of an unfinished dataset stays: this
        one cannot know how far the others are.
        """
        for shard in self._shards:
            Path(shard.path).unlink(missing_ok=True)
        if self._communicator is None or self._communicator.world_size == 1:
            self._marker.unlink(missing_ok=True)


def require_vacant(folder: Path) -> None:
    """Check that a folder holds no dataset.

    Raises:
        DatasetError: if there is one, or a part of one.
    """
    taken = [
        entry.name
        for entry in folder.iterdir()
        if is_shard_name(entry.name) or entry.name in (INDEX_NAME, UNFINISHED_NAME)
    ]
    if taken:
        raise DatasetError(
            f"{folder}: there is a dataset, or a part of one, in this folder "
            f"({sorted(taken)[0]}). Choose another folder, or remove this one"
        )


def _joined(
    folder: Path, parts: Sequence[tuple[Mapping[str, Field], Sequence[Shard]]]
) -> tuple[Mapping[str, Field], list[Shard]]:
    """Put the shards of all ranks after each other, if they hold the same fields."""
    written = [(rank, fields) for rank, (fields, _) in enumerate(parts) if fields]
    first, fields = written[0] if written else (0, {})
    for rank, others in written[1:]:
        if others != fields:
            raise DatasetError(
                f"{folder}: rank {rank} wrote {_describe(others)}; rank {first} wrote "
                f"{_describe(fields)}. Give all samples the same fields, shapes and dtypes"
            )
    return fields, [shard for _, shards in parts for shard in shards]


def _describe(fields: Mapping[str, Field]) -> str:
    return ", ".join(f"{name} {field.dtype} {field.shape}" for name, field in fields.items())


def shard_name(*numbers: int) -> str:
    """Return the file name of a shard; names sort as their numbers do."""
    return "-".join(["shard", *(f"{number:06d}" for number in numbers)]) + HDF5_SUFFIXES[0]


def rows_of_shard(fields: Mapping[str, Field], shard_bytes: int, storage: Storage) -> int:
    """Return how many samples make a shard of about so many bytes; whole chunks, if there are."""
    rows = max(1, shard_bytes // sum(field.row_bytes for field in fields.values()))
    chunk_rows = 1 if storage.is_contiguous else storage.chunk_rows(fields)
    return max(rows - rows % chunk_rows, min(rows, chunk_rows))


def write_shard(
    path: Path,
    fields: Mapping[str, npt.NDArray[Any]],
    attributes: Attributes,
    storage: Storage,
) -> Shard:
    """Write a shard under a hidden name, then give it its own once its content is on disk.

    Raises:
        DatasetError: if it cannot be written.
    """
    temporary = temporary_name(path)
    try:
        write_hdf5(temporary, fields, attributes, storage)
        shard = inspect_shard(temporary, list(fields))
        publish(temporary, path)
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return dataclasses.replace(shard, path=str(path))


def inspect_shard(path: Path, names: Sequence[str]) -> Shard:
    """Return what a file holds of these fields, with the checksum of all of its bytes."""
    shard, _ = inspect_file(str(path), names)
    return dataclasses.replace(shard, checksum=file_checksum(path))


def cannot_write(place: Path, error: OSError) -> DatasetError:
    """Return what to tell about a file system that refuses."""
    return DatasetError(f"{place}: cannot write here: {error.strerror or error}")


def write_hdf5(
    path: Path,
    fields: Mapping[str, npt.NDArray[Any]],
    attributes: Attributes,
    storage: Storage,
) -> None:
    """Write arrays to an HDF5 file; equal arrays give equal bytes.

    Args:
        path: of the new file.
        fields: by name, (samples, *shape).
        attributes: by field.
        storage: of each field.
    """
    threshold, interval = _alignment([array.nbytes for array in fields.values()])
    about = {name: Field(array.shape[1:], array.dtype) for name, array in fields.items()}
    keywords = storage.keywords(about, len(next(iter(fields.values()))))
    with h5py.File(path, "w", alignment_threshold=threshold, alignment_interval=interval) as file:
        for name, array in fields.items():
            dataset = file.create_dataset(name, data=array, track_times=False, **keywords[name])
            dataset.attrs.update(attributes.get(name, {}))


def _alignment(sizes: Sequence[int]) -> tuple[int, int]:
    """Return from how many bytes on to align, and to what, for fields of these sizes (bytes)."""
    for threshold, interval in ALIGNMENTS:
        if max(sizes) >= threshold:
            return threshold, interval
    return 1, 1
