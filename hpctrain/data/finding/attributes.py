"""The attributes of HDF5 datasets that say how their numbers are to be read."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import h5py

from hpctrain.data.coding import PLAIN, Coding, without_plain
from hpctrain.data.conventions import ATTRIBUTES, coding_of
from hpctrain.data.dataset import Dataset, Shard
from hpctrain.data.storage import HDF5_FAILURES, open_hdf5_file, read_attribute
from hpctrain.errors import DatasetError

logger = logging.getLogger(__name__)

MANY_FILES = 100
"""So many take a time to open that is worth a word."""


_BARE = "This is a netCDF dimension but not a netCDF variable"
"""Source: netCDF-4's own files; its documentation tells of the attribute NAME only."""


def is_bare_dimension(dataset: h5py.Dataset) -> bool:
    """Tell whether an array is no variable of a netCDF file, but the length of an axis."""
    return text_attribute(dataset, "NAME").startswith(_BARE)


def text_attribute(dataset: h5py.Dataset, name: str) -> str:
    """Return an attribute that is text; empty: there is none such."""
    try:
        value = read_attribute(dataset.attrs, name) if name in dataset.attrs else ""
    except (OSError, TypeError, ValueError, RuntimeError, KeyError):
        return ""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else ""


def coding_in(dataset: h5py.Dataset) -> Coding:
    """Return how the numbers of an open HDF5 dataset stand for values."""
    if dataset.dtype.kind not in "iuf":
        return PLAIN
    there = dataset.attrs
    said = {name: _value(there, name) for name in ATTRIBUTES if name in there}
    if said and "units" in there:
        said["units"] = _value(there, "units")
    return coding_of(dataset.dtype, said)


def _value(attributes: h5py.AttributeManager, name: str) -> Any:
    try:
        return read_attribute(attributes, name)
    except (OSError, TypeError):  # a type that h5py does not know
        return "of a type that cannot be read"
    except ValueError as error:
        return str(error)


def with_codings(dataset: Dataset) -> Dataset:
    """Return a dataset that knows the codings of all files; those that are unknown are looked at.

    Raises:
        DatasetError: if a file cannot be read.
    """
    unknown = sum(shard.codings is None for shard in dataset.shards)
    if not unknown:
        return dataset
    if unknown >= MANY_FILES:
        logger.info(
            "%s: its index was made before it kept what files say of their numbers, so %d files "
            "are opened for that: make it anew with `python -m hpctrain data index`",
            dataset.source,
            unknown,
        )
    shards = tuple(_looked_at(shard, list(dataset.fields)) for shard in dataset.shards)
    return dataclasses.replace(dataset, shards=shards)


def _looked_at(shard: Shard, names: list[str]) -> Shard:
    if shard.codings is not None:
        return shard
    try:
        with open_hdf5_file(shard.path) as file:
            codings = {name: coding_in(file[name]) for name in names}
    except HDF5_FAILURES as error:
        raise DatasetError(f"{shard.path}: HDF5 cannot read this file: {error}") from error
    return dataclasses.replace(shard, codings=without_plain(codings))
