"""Zarr stores, version 2 and 3, folders or zip files, as reanalyses are published in.

What xarray makes of a store is what is packed: the fill value of version 2 is the missing value of
an array whose dimensions have names, and version 3 has it among the attributes.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.convert.sources.source import ArrayFacts, is_url, kept_attributes, optional, reading
from hpctrain.errors import DatasetError

KNOWN = ".zarr, .zarr.zip"
_MARKS = (".zgroup", ".zarray", ".zmetadata", "zarr.json")
_DIMENSIONS = "_ARRAY_DIMENSIONS"
"""Source: the attribute in which xarray keeps the names of dimensions in version 2."""


def holds(path: str) -> bool:
    """Tell whether this is a store: a folder with its metadata, or a zip file of that name.

    One behind a URL has to be called so, and is read where it is.
    """
    if is_url(path):
        return path.rstrip("/").endswith(".zarr")
    return path.endswith(".zarr.zip") or any(Path(path, mark).is_file() for mark in _MARKS)


def arrays_in(path: str, key: str | None = None) -> dict[str, ArrayFacts]:
    """Return the arrays of a store, by their path in it, as `Format.arrays_in` does."""
    with reading(path):
        found = dict(_arrays(_open(path), ""))
        facts = {name: _facts(name, array) for name, array in found.items() if array.ndim}
    if not facts:
        raise DatasetError(f"{path}: there is no array with rows in this store")
    return facts


def open_array(path: str, key: str) -> Any:
    """Return an array, as `Format.open_array` does."""
    with reading(f'{path}: field "{key}"'):
        node = _open(path)
        return node if _is_array(node) else node[key]


def close_array(array: Any) -> None:
    """Close the store of an array."""
    close = getattr(array.store, "close", None)
    if close is not None:
        close()


def _open(path: str) -> Any:
    zarr = optional("zarr", "zarr", "Zarr stores are")
    store: Any = path
    if is_url(path):
        optional("fsspec", "remote", f"{path.partition('://')[0]}:// is")
    if path.endswith(".zip"):
        store = zarr.storage.ZipStore(path, mode="r")
    return zarr.open(store, mode="r")


def _is_array(node: Any) -> bool:
    return hasattr(node, "shape")


def _arrays(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    if _is_array(node):
        yield name or "x", node
        return
    prefix = f"{name}/" if name else ""
    # Their order in a store is that of the file system.
    for key, array in sorted(node.arrays()):
        yield f"{prefix}{key}", array
    for key, group in sorted(node.groups()):
        yield from _arrays(group, f"{prefix}{key}")


def _facts(name: str, array: Any) -> ArrayFacts:
    attributes = dict(array.attrs)
    metadata: Any = getattr(array, "metadata", None)
    is_v3 = getattr(metadata, "zarr_format", 2) == 3
    dimensions = attributes.pop(_DIMENSIONS, None)
    if is_v3:
        dimensions = metadata.dimension_names
        if "_FillValue" in attributes:
            attributes["_FillValue"] = _number(attributes["_FillValue"], array.dtype)
    elif dimensions is not None and array.fill_value is not None and array.dtype.kind in "iuf":
        attributes["_FillValue"] = array.dtype.type(array.fill_value)
    own = name.rpartition("/")[2]
    is_coordinate = dimensions is not None and tuple(dimensions) == (own,)
    return ArrayFacts(tuple(array.shape), array.dtype, kept_attributes(attributes), is_coordinate)


def _number(value: Any, dtype: np.dtype[Any]) -> Any:
    """Return a fill value, which xarray writes for floats as eight bytes in base64."""
    if dtype.kind == "f" and isinstance(value, str):
        return dtype.type(struct.unpack("<d", base64.standard_b64decode(value))[0])
    return dtype.type(value) if isinstance(value, int | float) else value
