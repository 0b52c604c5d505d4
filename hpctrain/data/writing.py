"""Writing a dataset: shards of plain HDF5, then the index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Dataset, Field, Shard, require_supported
from hpctrain.data.discovery import inspect_file
from hpctrain.data.files import file_checksum, publish_file, temporary_name
from hpctrain.data.index import (
    HDF5_SUFFIXES,
    INDEX_NAME,
    UNFINISHED_NAME,
    is_shard_name,
    write_index,
)
from hpctrain.errors import DatasetError

ALIGNMENTS = ((16 * 2**20, 2**20), (2**16, 2**12))
"""(bytes of the largest field, alignment): whole stripes of a parallel file system, or whole pages.

A field is aligned if it is at least 16 times as large, so that gaps stay below 7 %.
"""


class Writer:
    """Writes samples to a new folder of shards, with an index.

    Use as a context manager. The index is written last, when the body ends without an exception;
    after one, what was written is removed.

        with Writer("data/train") as writer:
            for image, label in scans:
                writer.append({"image": image, "label": label})

    The first sample decides the shapes and dtypes of the fields; every later one must fit. One
    shard is held in memory until it is full, then written under a hidden name, synced and renamed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        shard_bytes: int = 256 * 2**20,
        attributes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Prepare; the folder is made when the body begins.

        Args:
            folder: where the shards go; new, or empty.
            shard_bytes: values in one shard, about.
            attributes: by field, HDF5 attributes such as {"units": "kelvin"}.
        """
        self._folder = Path(folder)
        self._shard_bytes = shard_bytes
        self._attributes = {name: dict(values) for name, values in (attributes or {}).items()}
        self._fields: dict[str, Field] = {}
        self._buffers: dict[str, npt.NDArray[Any]] = {}
        self._rows = 0
        self._shard_rows = 0
        self._shards: list[Shard] = []

    def __enter__(self) -> Writer:
        """Make the folder.

        Raises:
            DatasetError: if it holds a dataset already, or a part of one.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            taken = [
                entry.name
                for entry in self._folder.iterdir()
                if is_shard_name(entry.name) or entry.name in (INDEX_NAME, UNFINISHED_NAME)
            ]
            if taken:
                raise DatasetError(
                    f"{self._folder}: there is a dataset, or a part of one, in this folder "
                    f"({sorted(taken)[0]}). Choose another folder, or remove this one"
                )
            # Until the index is there, the shards must not pass for plain HDF5 files.
            self._marker.touch(exist_ok=False)
        except OSError as error:
            raise self._failed(error) from error
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
            row_bytes = sum(field.row_bytes for field in fields.values())
            self._shard_rows = max(1, self._shard_bytes // row_bytes)
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
        path = self._folder / f"shard-{len(self._shards):06d}{HDF5_SUFFIXES[0]}"
        temporary = temporary_name(path)
        rows = {name: buffer[: self._rows] for name, buffer in self._buffers.items()}
        try:
            write_hdf5(temporary, rows, self._attributes)
            shard, _ = inspect_file(str(temporary), list(rows))
            checksum = file_checksum(temporary)
            publish_file(temporary, path)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            temporary.unlink(missing_ok=True)
        self._shards.append(Shard(str(path), shard.samples, shard.size, checksum, shard.layouts))
        self._rows = 0

    def _finish(self) -> None:
        if self._rows:
            self._write_shard()
        if not self._shards:
            raise DatasetError(f"{self._folder}: no sample was written")
        try:
            write_index(Dataset(str(self._folder), self._fields, tuple(self._shards)), self._folder)
            self._marker.unlink()
        except OSError as error:
            raise self._failed(error) from error

    def _discard(self) -> None:
        """Remove what this writer wrote; a dataset is there whole or not at all."""
        for path in (*(Path(shard.path) for shard in self._shards), self._marker):
            path.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> DatasetError:
        return DatasetError(f"{self._folder}: cannot write here: {error.strerror or error}")


def write_hdf5(
    path: Path,
    fields: Mapping[str, npt.NDArray[Any]],
    attributes: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write arrays to an HDF5 file, each contiguous; equal arrays give equal bytes.

    Args:
        path: of the new file.
        fields: by name, (samples, *shape).
        attributes: by field.
    """
    threshold, interval = _alignment([array.nbytes for array in fields.values()])
    with h5py.File(path, "w", alignment_threshold=threshold, alignment_interval=interval) as file:
        for name, array in fields.items():
            dataset = file.create_dataset(name, data=array, track_times=False)
            dataset.attrs.update(attributes.get(name, {}))


def _alignment(sizes: Sequence[int]) -> tuple[int, int]:
    """Return from how many bytes on to align, and to what, for fields of these sizes (bytes)."""
    for threshold, interval in ALIGNMENTS:
        if max(sizes) >= threshold:
            return threshold, interval
    return 1, 1


def _describe(fields: Mapping[str, Field]) -> str:
    return ", ".join(f"{name} {field.dtype} {field.shape}" for name, field in fields.items())
