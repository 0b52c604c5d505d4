"""Writing a dataset: shards of plain HDF5, each there whole or not at all, then the index."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Dataset, Field, Shard, require_fields, require_supported
from hpctrain.data.files.discovery import inspect_file
from hpctrain.data.files.index import (
    HDF5_SUFFIXES,
    INDEX_NAME,
    UNFINISHED_NAME,
    is_shard_name,
    write_index,
)
from hpctrain.data.files.storage import Storage
from hpctrain.data.ragged import COUNTS, Ragged, Shelf, stored_fields
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

    Fields named in `ragged` have samples of unequal length, such as sentences, graphs or the bytes
    of images: their values are stored one after the other, and how many each sample has beside
    them, as NAME_counts. A config reads them by `counts`:

        with Writer("data/train", ragged=["tokens"]) as writer:
            writer.append({"tokens": np.array([5, 7, 2], "u2"), "label": 1})

        [data.fields.tokens]
        counts = "tokens_counts"
        batch = "pad"

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
        ragged: Sequence[str] = (),
    ) -> None:
        """Prepare; the folder is made when the body begins.

        Args:
            folder: where the shards go; new, or empty.
            shard_bytes: values in one shard, about.
            shard_rows: samples in one shard; None: as many as make `shard_bytes`.
            storage: such as `Storage("gzip")`; None: contiguous, which reads fastest.
            attributes: by field, HDF5 attributes such as {"units": "kelvin"}.
            communicator: of all ranks that write; None: this process alone.
            ragged: fields whose samples have values of unequal number, along their first axis.

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
        self._ragged = frozenset([ragged] if isinstance(ragged, str) else ragged)
        self._shelf = Shelf(self._ragged, shard_bytes, shard_rows)
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
            sample: by field, an array of the field's shape; of fields of unequal length, (its
                values, *shape).

        Raises:
            DatasetError: if it does not fit the first one, or a dtype cannot become a tensor.
        """
        self.extend({name: np.asarray(value)[None] for name, value in sample.items()})

    def extend(self, samples: Mapping[str, npt.ArrayLike | Ragged]) -> None:
        """Add several samples.

        Args:
            samples: by field, (samples, *shape); of fields of unequal length a list of arrays, or
                `Ragged`.

        Raises:
            DatasetError: if they do not fit the first ones, or a dtype cannot become a tensor.
        """
        arrays = {name: self._array(name, values) for name, values in samples.items()}
        count = self._require_fit(arrays)
        if self._ragged:
            each = [a.samples() if isinstance(a, Ragged) else list(a) for a in arrays.values()]
            for values in zip(*each, strict=True):
                for rows in self._shelf.add(dict(zip(arrays, values, strict=True))):
                    self._write_shard(rows)
            return
        done = 0
        while done < count:
            step = min(count - done, self._shard_rows - self._rows)
            for name, array in arrays.items():
                assert not isinstance(array, Ragged)
                self._buffers[name][self._rows : self._rows + step] = array[done : done + step]
            self._rows += step
            done += step
            if self._rows == self._shard_rows:
                self._write_buffers()

    def _array(self, name: str, values: npt.ArrayLike | Ragged) -> npt.NDArray[Any] | Ragged:
        """Return the values of a field as they are kept, always in this machine's byte order.

        Raises:
            DatasetError: if they are of unequal length, and the field is not, or no samples.
        """
        if name not in self._ragged:
            if isinstance(values, Ragged):
                raise DatasetError(
                    f'{self._folder}: the samples of field "{name}" are of unequal length: name it '
                    f'in Writer(..., ragged=["{name}"])'
                )
            return np.asarray(values)
        try:
            if not isinstance(values, Ragged):
                values = Ragged.of(list(values))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise DatasetError(f'{self._folder}: field "{name}": {error}') from error
        native = values.values.dtype.newbyteorder("=")
        return Ragged(values.values.astype(native, copy=False), values.counts)

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

    def _require_fit(self, arrays: Mapping[str, npt.NDArray[Any] | Ragged]) -> int:
        """Return how many samples these are, if they are what the first ones were."""
        counts = {
            name: len(array) if isinstance(array, Ragged) or array.ndim else 0
            for name, array in arrays.items()
        }
        if not counts or len(set(counts.values())) != 1:
            raise DatasetError(
                f"{self._folder}: the fields have different numbers of samples: {counts}"
            )
        # Always this machine's byte order: numpy's scalars have no other either.
        fields = {
            name: Field(array.values.shape[1:], array.values.dtype, mean_rows=1)
            if isinstance(array, Ragged)
            else Field(array.shape[1:], array.dtype.newbyteorder("="))
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
            require_stored_apart(fields, self._ragged, str(self._folder))
            self._fields = fields
            if not self._ragged:
                self._shard_rows = self._wanted_rows or rows_of_shard(
                    fields, self._shard_bytes, self._storage
                )
                self._buffers = {
                    name: np.empty((self._shard_rows, *field.shape), field.dtype)
                    for name, field in fields.items()
                }
        if fields != self._fields:
            before = sum(shard.samples for shard in self._shards) + self._rows + len(self._shelf)
            raise DatasetError(
                f"{self._folder}: sample {before} has "
                f"{_describe(fields)}; the first one had {_describe(self._fields)}. "
                "Give all samples the same fields, shapes and dtypes"
            )
        return next(iter(counts.values()))

    def _write_buffers(self) -> None:
        self._write_shard({name: buffer[: self._rows] for name, buffer in self._buffers.items()})
        self._rows = 0

    def _write_shard(self, rows: Mapping[str, npt.NDArray[Any] | Ragged]) -> None:
        numbers = [len(self._shards)]
        if self._communicator is not None:
            numbers.insert(0, self._communicator.rank)
        path = self._folder / shard_name(*numbers)
        self._shards.append(write_shard(path, rows, self._attributes, self._storage))

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
            self._write_buffers()
        if len(self._shelf):
            if lacking := self._shelf.lacking:
                raise DatasetError(
                    f'{self._folder}: field "{min(lacking)}" has no value in any of the '
                    f"{len(self._shelf)} samples: leave it out"
                )
            self._write_shard(self._shelf.rest())
        return self._fields, self._shards

    def _write_index(self, fields: Mapping[str, Field], shards: Sequence[Shard]) -> None:
        if not shards:
            raise DatasetError(f"{self._folder}: no sample was written")
        try:
            dataset = Dataset(str(self._folder), stored_fields(fields), tuple(shards))
            write_index(dataset, self._folder)
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
    return ", ".join(
        f"{name} {field.dtype} {f'(any, *{field.shape})' if field.mean_rows else field.shape}"
        for name, field in fields.items()
    )


def require_stored_apart(fields: Mapping[str, Field], ragged: Iterable[str], place: str) -> None:
    """Check that fields of unequal length are there, and no other field is called as their counts.

    Raises:
        DatasetError: if not.
    """
    require_fields(ragged, fields, place)
    for name in ragged:
        if f"{name}{COUNTS}" in fields:
            raise DatasetError(
                f'{place}: how many values the samples of "{name}" have is stored as '
                f'"{name}{COUNTS}", and there is such a field: give it another name'
            )


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
    fields: Mapping[str, npt.NDArray[Any] | Ragged],
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
        names = [f"{k}{COUNTS}" if isinstance(v, Ragged) else k for k, v in fields.items()]
        shard = inspect_shard(temporary, names)
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
    """Return the message about a file system that refuses."""
    return DatasetError(f"{place}: cannot write here: {error.strerror or error}")


def write_hdf5(
    path: Path,
    fields: Mapping[str, npt.NDArray[Any] | Ragged],
    attributes: Attributes,
    storage: Storage,
) -> None:
    """Write arrays to an HDF5 file; equal arrays give equal bytes.

    Args:
        path: of the new file.
        fields: by name, (samples, *shape), or samples of unequal length.
        attributes: by field.
        storage: of each field.
    """
    values = {name: each.values for name, each in fields.items() if isinstance(each, Ragged)}
    rows = {
        f"{name}{COUNTS}" if isinstance(each, Ragged) else name: each.counts
        if isinstance(each, Ragged)
        else each
        for name, each in fields.items()
    }
    keywords = _keywords(rows, storage)
    for name, array in values.items():
        keywords |= _keywords({name: array}, storage)
    arrays = {**values, **rows}
    threshold, interval = _alignment([array.nbytes for array in arrays.values()])
    with h5py.File(path, "w", alignment_threshold=threshold, alignment_interval=interval) as file:
        for name, array in arrays.items():
            dataset = file.create_dataset(name, data=array, track_times=False, **keywords[name])
            dataset.attrs.update(attributes.get(name, {}))


def _keywords(
    arrays: Mapping[str, npt.NDArray[Any]], storage: Storage
) -> dict[str, dict[str, Any]]:
    """Return the arguments of h5py's create_dataset, by array; all have as many rows."""
    about = {name: Field(array.shape[1:], array.dtype) for name, array in arrays.items()}
    return storage.keywords(about, len(next(iter(arrays.values()))))


def _alignment(sizes: Sequence[int]) -> tuple[int, int]:
    """Return from how many bytes on to align, and to what, for fields of these sizes (bytes)."""
    for threshold, interval in ALIGNMENTS:
        if max(sizes) >= threshold:
            return threshold, interval
    return 1, 1
