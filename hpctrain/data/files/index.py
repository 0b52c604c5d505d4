"""`index.json`: what the shards of a folder hold and where, so that training need not ask HDF5."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import h5py
import xxhash

from hpctrain.data.coding import Coding, coding_from
from hpctrain.data.dataset import (
    Dataset,
    Field,
    Layout,
    Shard,
    parse_dtype,
    require_countable,
    require_plausible,
    require_row,
    require_supported,
)
from hpctrain.errors import DatasetError
from hpctrain.utils.files import file_checksum, is_checksum, replace_file
from hpctrain.utils.json_files import LARGE, parse_json, read_whole

INDEX_NAME = "index.json"
UNFINISHED_NAME = "index.json.unfinished"
"""Lies in a folder as long as its shards are being written."""
INDEX_VERSION = 2
HDF5_SUFFIXES = (".h5", ".hdf5", ".he5", ".nc")
FURTHER_SUFFIXES = (".h5ad", ".h5mu", ".loom", ".nc4", ".cdf", ".mat", ".hdf")
"""Of files that may be HDF5: looked into, and only in a folder that has none of those above."""
_REMAKE = "Write the dataset anew, or remove the index to read the files as plain HDF5"
T = TypeVar("T")
CHECKSUM = "checksum"
UNSEALED_VERSION = 1
"""Of an index and of a catalogue of 0.1.0, which had no checksum."""


def write_index(dataset: Dataset, folder: Path, origin: Mapping[str, Any] | None = None) -> None:
    """Write the index of a folder; a reader sees the old one, or the new one whole.

    Args:
        dataset: its shards all in this folder.
        folder: to write to.
        origin: where the samples come from, for people and for `read_origin`.
    """
    document = {
        "version": INDEX_VERSION,
        **({} if origin is None else {"origin": origin}),
        "samples": dataset.samples,
        "fields": {
            name: {"shape": list(field.shape), "dtype": field.dtype.str}
            for name, field in dataset.fields.items()
        },
        "shards": [
            {
                "file": shard.name,
                "samples": shard.samples,
                "bytes": shard.size,
                "xxh3": shard.checksum,
                "layouts": {name: _layout_json(layout) for name, layout in shard.layouts.items()},
                **_codings_json(shard.codings),
            }
            for shard in dataset.shards
        ],
    }
    replace_file(folder / INDEX_NAME, sealed(document))


def read_index(folder: Path) -> Dataset:
    """Read the index of a folder and check the files' sizes against it.

    Raises:
        DatasetError: if the index is broken or newer than this version, or the shards are not
            those that it lists.
    """
    dataset = parse_index(folder)
    problems = file_problems(dataset, folder)
    if problems:
        raise DatasetError(next(iter(problems.values())))
    return dataset


def parse_index(folder: Path) -> Dataset:
    """Read the index of a folder, without a look at its files.

    Raises:
        DatasetError: if the index is broken or newer than this version.
    """
    path = folder / INDEX_NAME
    return _Parser(path).dataset(_load(path), folder)


def read_origin(folder: Path) -> object:
    """Return where the samples of a folder come from, None if its index does not say.

    Raises:
        DatasetError: if the index cannot be read.
    """
    document = _load(folder / INDEX_NAME)
    return document.get("origin") if isinstance(document, dict) else None


def _load(path: Path) -> object:
    try:
        document = parse_json(read_whole(path, LARGE))
        if isinstance(document, dict) and type(version := document.get("version")) is int:
            _require_known(version, path)
            require_sealed(document)
        return document
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DatasetError(f"{path}: this is not an index: {error}. {_REMAKE}") from error


def _require_known(version: int, path: Path) -> None:
    if version > INDEX_VERSION:
        raise DatasetError(
            f"{path}: version {version} was written by a newer hpctrain; this one reads up to "
            f"{INDEX_VERSION}: update hpctrain"
        )


def damaged_shards(dataset: Dataset) -> list[str]:
    """Return the shards whose content is not what their checksum was made of. Reads them all."""
    return [
        shard.path
        for shard in dataset.shards
        if shard.checksum is not None and file_checksum(shard.path) != shard.checksum
    ]


def is_shard_name(name: str) -> bool:
    """Tell whether a file of this name is a shard; hidden ones are still being written."""
    return name.endswith(HDF5_SUFFIXES) and not name.startswith(".")


def shards_in(folder: Path) -> list[str]:
    """Return the HDF5 files of a folder, in any order."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    shards = [str(entry) for entry in entries if is_shard_name(entry.name)]
    others = (str(entry) for entry in entries if entry.name.endswith(FURTHER_SUFFIXES))
    return shards or [path for path in others if h5py.is_hdf5(path)]


def _layout_json(layout: Layout) -> dict[str, Any]:
    if layout.offset is not None:
        return {"offset": layout.offset}
    return {"chunk_rows": layout.chunk_rows, "reason": layout.reason}


def _codings_json(codings: Mapping[str, Coding] | None) -> dict[str, Any]:
    """Return the entry of a shard, none where nobody has looked at the attributes of its fields."""
    if codings is None:
        return {}
    return {"codings": {name: coding.to_json() for name, coding in codings.items()}}


class _Parser:
    """Builds a Dataset from JSON and says which key is wrong where it cannot."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def dataset(self, document: object, folder: Path) -> Dataset:
        root = self._typed(document, dict, "the document")
        self._get(root, "version", int, "")
        fields = {
            name: self._field(name, self._typed(value, dict, f"fields.{name}"))
            for name, value in self._get(root, "fields", dict, "").items()
        }
        shards = tuple(
            self._shard(self._typed(value, dict, f"shards[{i}]"), f"shards[{i}].", folder, fields)
            for i, value in enumerate(self._get(root, "shards", list, ""))
        )
        if not fields or not shards:
            raise self._wrong("shards" if fields else "fields", "is empty")
        dataset = Dataset(source=str(folder), fields=fields, shards=shards)
        require_countable(dataset.samples, str(self._path))
        if dataset.samples != self._get(root, "samples", int, ""):
            raise self._wrong("samples", f"is not the sum over the shards, {dataset.samples}")
        return dataset

    def _field(self, name: str, value: Mapping[str, Any]) -> Field:
        place = f"fields.{name}."
        sizes = self._get(value, "shape", list, place)
        shape = tuple(self._count(size, f"{place}shape") for size in sizes)
        try:
            dtype = parse_dtype(self._get(value, "dtype", str, place))
        except ValueError as error:
            raise self._wrong(f"{place}dtype", f"is wrong: {error}") from error
        field = Field(shape, dtype)
        require_supported(name, field, str(self._path))
        require_row(name, field.row_bytes, str(self._path))
        return field

    def _shard(
        self, value: Mapping[str, Any], place: str, folder: Path, fields: Mapping[str, Field]
    ) -> Shard:
        file = self._get(value, "file", str, place)
        if not is_shard_name(file) or "/" in file:
            raise self._wrong(f"{place}file", "is not the name of an HDF5 file in this folder")
        samples = self._count(value.get("samples"), f"{place}samples")
        size = self._count(value.get("bytes"), f"{place}bytes")
        checksum = value.get("xxh3")
        layouts = self._get(value, "layouts", dict, place)
        if samples == 0:
            raise self._wrong(f"{place}samples", "is 0")
        if layouts.keys() != fields.keys():
            raise self._wrong(f"{place}layouts", f"is not about {', '.join(fields)}")
        return Shard(
            path=str(folder / file),
            samples=samples,
            size=size,
            checksum=None if checksum is None else self._checksum(checksum, f"{place}xxh3"),
            layouts={
                name: self._layout(layouts[name], f"{place}layouts.{name}", field, samples, size)
                for name, field in fields.items()
            },
            codings=self._codings(value, place, fields) if "codings" in value else None,
        )

    def _codings(
        self, value: Mapping[str, Any], place: str, fields: Mapping[str, Field]
    ) -> dict[str, Coding]:
        place = f"{place}codings"
        codings = self._typed(value["codings"], dict, place)
        if not codings.keys() <= fields.keys():
            raise self._wrong(place, f"is not about {', '.join(fields)}")
        try:
            return {
                name: coding_from(self._typed(each, dict, f"{place}.{name}"))
                for name, each in codings.items()
            }
        except ValueError as error:
            raise self._wrong(place, f"is not what a coding says: {error}") from error

    def _layout(self, value: object, place: str, field: Field, samples: int, size: int) -> Layout:
        layout = self._typed(value, dict, place)
        if "offset" not in layout:
            require_plausible(place, samples * field.row_bytes, str(self._path), size)
            rows = max(1, self._count(layout.get("chunk_rows"), f"{place}.chunk_rows"))
            return Layout(None, rows, self._get(layout, "reason", str, f"{place}."))
        offset = self._count(layout["offset"], f"{place}.offset")
        if offset + samples * field.row_bytes > size:
            raise self._wrong(f"{place}.offset", f"leads past the end of the file, {size} bytes")
        return Layout(offset)

    def _get(self, value: Mapping[str, Any], key: str, kind: type[T], place: str) -> T:
        if key not in value:
            raise self._wrong(f"{place}{key}", "is missing")
        return self._typed(value[key], kind, f"{place}{key}")

    def _typed(self, value: object, kind: type[T], place: str) -> T:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self._wrong(place, f"is {type(value).__name__}, not {kind.__name__}")
        return value

    def _checksum(self, value: object, place: str) -> str:
        checksum = self._typed(value, str, place)
        if not is_checksum(checksum):
            raise self._wrong(place, "is not a checksum of 16 hexadecimal digits")
        return checksum

    def _count(self, value: object, place: str) -> int:
        count = self._typed(value, int, place)
        if not 0 <= count < 2**63:
            raise self._wrong(place, f"is {count}")
        return count

    def _wrong(self, place: str, what: str) -> DatasetError:
        return DatasetError(f"{self._path}: {place} {what}. {_REMAKE}")


def file_problems(dataset: Dataset, folder: Path) -> dict[str, str]:
    """Return what is wrong with the names and sizes of the files of a folder, by path.

    It is to hold the shards of its index, of the right size, and no others.

    Raises:
        DatasetError: if the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            sizes = {e.name: e.stat().st_size for e in entries if is_shard_name(e.name)}
    except OSError as error:
        raise DatasetError(f"{error.filename or folder}: {error.strerror}") from error
    problems: dict[str, str] = {}
    for shard in dataset.shards:
        size = sizes.pop(shard.name, None)
        if size is None:
            problems[shard.path] = (
                f"{shard.path}: this shard is missing, or listed twice; {INDEX_NAME} lists it with "
                f"{shard.samples} samples. Bring it back, or write the dataset anew"
            )
        elif size != shard.size:
            what = "it is truncated" if size < shard.size else "the index is older than the file"
            problems[shard.path] = (
                f"{shard.path}: {size} bytes, where {INDEX_NAME} says {shard.size}: {what}. "
                "Copy the file again, or write the dataset anew"
            )
    if sizes:
        problems[str(folder)] = (
            f"{folder}: {INDEX_NAME} does not list {', '.join(sorted(sizes)[:5])}. "
            "Move what does not belong here away, or write the dataset anew"
        )
    return problems


def sealed(document: Mapping[str, Any]) -> bytes:
    """Return a document as JSON, with its checksum."""
    whole = {**document, CHECKSUM: checksum_of(document)}
    return (json.dumps(whole, indent=1) + "\n").encode()


def require_sealed(document: Mapping[str, Any]) -> None:
    """Check that a document says what it said when it was written.

    Those of 0.1.0 have no checksum. A version and a key that were altered do not make another one
    of them.

    Raises:
        ValueError: if it does not.
    """
    if document.get("version") == UNSEALED_VERSION and CHECKSUM not in document:
        return
    if document.get(CHECKSUM) != checksum_of(document):
        raise ValueError("its checksum is not that of what it says: it was damaged, or edited")


def checksum_of(document: Mapping[str, Any]) -> str:
    """Return the xxh3-64 of all that a document says but its checksum, hexadecimal."""
    said = {key: value for key, value in document.items() if key != CHECKSUM}
    return str(xxhash.xxh3_64_hexdigest(json.dumps(said).encode()))
