"""A catalogue: what HDF5 files hold that are anywhere, asked of HDF5 once and kept as JSON.

An `index.json` is part of a folder of shards. A catalogue is a file of its own, wherever there is
room for it, and `data.train = "era5.json"` stands for the files that it lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt, MinLen

from hpctrain.data.coding import coding_from
from hpctrain.data.dataset import parse_dtype
from hpctrain.data.files.contents import Array, Contents
from hpctrain.data.files.index import require_sealed, sealed
from hpctrain.errors import DatasetError
from hpctrain.utils.files import is_checksum, replace_file
from hpctrain.utils.json_files import LARGE, parse_checked, parse_json, read_whole

CATALOGUE_VERSION = 2
CATALOGUE_SUFFIX = ".json"
_KIND = "hpctrain catalogue"


Count = Annotated[int, Ge(0), Lt(2**63)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """What a catalogue of any version has."""

    kind: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Array:
    """`Array`, as JSON has it."""

    shape: list[Count]
    dtype: str
    chunks: list[Annotated[int, Ge(1), Lt(2**63)]] | None
    offset: Count | None
    reason: str
    sources: list[str]
    coding: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """`Contents`, as JSON has it."""

    file: str
    bytes: Count
    modified_ns: int
    xxh3: str | None
    arrays: dict[str, _Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Catalogue:
    """The files of a catalogue."""

    files: Annotated[list[_File], MinLen(1)]


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
    replace_file(path, sealed(document))


def read_catalogue(path: Path) -> list[Contents]:
    """Read a catalogue and check the files' sizes and times against it.

    Raises:
        DatasetError: if it is broken or newer than this version, or a file is not there or was
            written to since.
    """
    try:
        content = read_whole(path, LARGE)
        head = parse_checked(content, _Head)
        if head.kind != _KIND:
            raise ValueError("it is not a catalogue")
        if head.version > CATALOGUE_VERSION:
            raise DatasetError(
                f"{path}: version {head.version} was written by a newer hpctrain; this one reads "
                f"up to {CATALOGUE_VERSION}: update hpctrain"
            )
        require_sealed(parse_json(content))
        files = _contents(parse_checked(content, _Catalogue), path.parent)
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DatasetError(
            f"{path}: this is not what `python -m hpctrain data index --out` writes ({error}): "
            "make it anew"
        ) from error
    for each in files:
        _require_unchanged(each, path)
    return files


def _contents(catalogue: _Catalogue, folder: Path) -> list[Contents]:
    """Return what a catalogue says of its files.

    Raises:
        ValueError: if that cannot be.
    """
    for file in catalogue.files:
        if file.xxh3 is not None and not is_checksum(file.xxh3):
            raise ValueError(f"{file.file}: the checksum is not one of 16 hexadecimal digits")
    return [
        Contents(
            path=str(folder / file.file),
            size=file.bytes,
            modified_ns=file.modified_ns,
            checksum=file.xxh3,
            arrays={name: _array(array, file.bytes) for name, array in file.arrays.items()},
        )
        for file in catalogue.files
    ]


def _array(facts: _Array, file_bytes: int) -> Array:
    array = Array(
        shape=tuple(facts.shape),
        dtype=parse_dtype(facts.dtype),
        chunks=None if facts.chunks is None else tuple(facts.chunks),
        offset=facts.offset,
        reason=facts.reason,
        sources=tuple(facts.sources),
        coding=None if facts.coding is None else coding_from(facts.coding),
    )
    if array.chunks is not None and len(array.chunks) != len(array.shape):
        raise ValueError(f"chunks {array.chunks} of shape {array.shape}")
    if array.offset is not None:
        end = array.offset + array.num_bytes
        if end > file_bytes:
            raise ValueError(f"values up to byte {end} of {file_bytes}")
    return array


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
