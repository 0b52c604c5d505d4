"""A catalogue: what HDF5 files hold that are anywhere, asked of HDF5 once and kept as JSON.

An `index.json` is part of a folder of shards. A catalogue is a file of its own, wherever there is
room for it, and `data.train = "era5.json"` stands for the files that it lists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.data.coding import coding_from
from hpctrain.data.finding.contents import Array, Contents
from hpctrain.errors import DatasetError
from hpctrain.utils.files import replace_file

CATALOGUE_VERSION = 1
CATALOGUE_SUFFIX = ".json"
_KIND = "hpctrain catalogue"


def is_catalogue(path: Path) -> bool:
    """Tell whether a path that stands for a dataset is that of a catalogue."""
    return path.suffix == CATALOGUE_SUFFIX and path.is_file()


def write_catalogue(path: Path, files: Sequence[Contents]) -> None:
    """Write a catalogue; a reader sees the old one, or the new one whole."""
    document = {
        "kind": _KIND,
        "version": CATALOGUE_VERSION,
        "files": [
            {
                "file": _shortened(each.path, path.parent),
                "bytes": each.size,
                "modified_ns": each.modified_ns,
                "xxh3": each.checksum,
                "arrays": {name: _array_json(array) for name, array in each.arrays.items()},
            }
            for each in files
        ],
    }
    replace_file(path, (json.dumps(document, indent=1) + "\n").encode())


def read_catalogue(path: Path) -> list[Contents]:
    """Read a catalogue and hold the files' sizes and times against it.

    Raises:
        DatasetError: if it is broken or newer than this version, or a file is not there or was
            written to since.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["kind"] != _KIND:
            raise ValueError("it is no catalogue")
        version = int(document["version"])
        files = [] if version > CATALOGUE_VERSION else _parsed(document, path.parent)
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError) as error:
        raise DatasetError(
            f"{path}: this is not what `python -m hpctrain data index --out` writes "
            f"({type(error).__name__}: {error}): make it anew"
        ) from error
    if version > CATALOGUE_VERSION:
        raise DatasetError(
            f"{path}: version {version} was written by a newer hpctrain; this one reads up to "
            f"{CATALOGUE_VERSION}: update hpctrain"
        )
    for each in files:
        _require_unchanged(each, path)
    return files


def _parsed(document: Mapping[str, Any], folder: Path) -> list[Contents]:
    files = [
        Contents(
            path=str(folder / file["file"]),
            size=int(file["bytes"]),
            modified_ns=int(file["modified_ns"]),
            checksum=None if file["xxh3"] is None else str(file["xxh3"]),
            arrays={name: _array(array) for name, array in file["arrays"].items()},
        )
        for file in document["files"]
    ]
    if not files:
        raise ValueError("it lists no file")
    for each in files:
        for array in each.arrays.values():
            if not all(0 <= size < 2**63 for size in (*array.shape, *(array.chunks or ()))):
                raise ValueError(f"a size of {array.shape}")
            if array.offset is not None:
                end = array.offset + array.dtype.itemsize * int(np.prod(array.shape, dtype=object))
                if array.offset < 0 or end > each.size:
                    raise ValueError(f"values up to byte {end} of {each.size}")
    return files


def _array(value: Mapping[str, Any]) -> Array:
    chunks, offset = value["chunks"], value["offset"]
    return Array(
        shape=tuple(int(size) for size in value["shape"]),
        dtype=np.dtype(str(value["dtype"])),
        chunks=None if chunks is None else tuple(int(size) for size in chunks),
        offset=None if offset is None else int(offset),
        reason=str(value["reason"]),
        sources=tuple(str(source) for source in value["sources"]),
        coding=coding_from(value["coding"]) if "coding" in value else None,
    )


def _array_json(array: Array) -> dict[str, Any]:
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.str,
        "chunks": None if array.chunks is None else list(array.chunks),
        "offset": array.offset,
        "reason": array.reason,
        "sources": list(array.sources),
        **({} if array.coding is None else {"coding": array.coding.to_json()}),
    }


def _shortened(path: str, folder: Path) -> str:
    """Return a path that survives a move of both together, if the file is below the folder."""
    whole = Path(path).resolve()
    below = folder.resolve()
    return str(whole.relative_to(below) if whole.is_relative_to(below) else whole)


def _require_unchanged(file: Contents, catalogue: Path) -> None:
    again = f"make it anew with `python -m hpctrain data index ... --out {catalogue}`"
    try:
        found = Path(file.path).stat()
    except OSError as error:
        raise DatasetError(
            f"{file.path}: {error.strerror}, but {catalogue} lists it: bring it back, or {again}"
        ) from error
    if (found.st_size, found.st_mtime_ns) != (file.size, file.modified_ns):
        raise DatasetError(
            f"{file.path}: {catalogue} is older than this file, which was written to since: {again}"
        )
