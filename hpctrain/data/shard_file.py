"""One shard: arrays to an HDF5 file that is there whole or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy.typing as npt

from hpctrain.data.dataset import Field, Shard
from hpctrain.data.discovery import inspect_file
from hpctrain.data.index import HDF5_SUFFIXES
from hpctrain.data.storage import Storage
from hpctrain.errors import DatasetError
from hpctrain.utils.files import file_checksum, publish, temporary_name

SHARD_BYTES = 256 * 2**20
"""Values in one shard, about, where nothing else is asked for."""
ALIGNMENTS = ((16 * 2**20, 2**20), (2**16, 2**12))
"""(bytes of the largest field, alignment): whole stripes of a parallel file system, or whole pages.

A field is aligned if it is at least 16 times as large, so that gaps stay below 7 %.
"""

Attributes = Mapping[str, Mapping[str, Any]]


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
