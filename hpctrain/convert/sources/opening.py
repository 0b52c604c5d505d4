"""From what a user calls a source to a Source."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpctrain.convert.sources import netcdf3, zarr_stores
from hpctrain.convert.sources.images import SUFFIXES, EncodedImages, ImageFolder, images_in
from hpctrain.convert.sources.indexed import Indexed, require_no_keys
from hpctrain.convert.sources.remote import Listing, listed, public
from hpctrain.convert.sources.source import Converted, Source, is_url
from hpctrain.convert.sources.table import Part, Table, format_of, known, make_part
from hpctrain.convert.sources.text import DEFAULT_TOKENS, Text
from hpctrain.data.dataset import WHOLE, require_fields
from hpctrain.data.files.discovery import in_order
from hpctrain.data.files.groups import is_pattern
from hpctrain.data.files.index import FURTHER_SUFFIXES, HDF5_SUFFIXES, shards_in
from hpctrain.errors import DatasetError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl")
_NAMED = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<files>.+)")
_ENDS = (
    "h5|hdf5|he5|h5ad|h5mu|loom|nc4?|cdf|mat|hdf|npz|zarr|zarr.zip|parquet|parq|pq|arrow|feather|"
    "ipc|jsonl"
)
_KEYED = re.compile(rf"(?P<pattern>.+\.(?:{_ENDS})/?):(?P<key>[^:]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How to read a source, where its files leave that open.

    Attributes:
        axes: the axis of the samples by field, or under "" for all others; 0 if it is not here;
            None: each array is a sample.
        dtypes: by field, what its values become.
        size: rows and columns that images are scaled to.
        grey: images in one channel rather than three.
        tokens: bytes of text in one sample; given, any file is text.
        encoded: images as the bytes of their files, in place of pixels.
    """

    axes: Mapping[str, int | None] = field(default_factory=dict)
    dtypes: Mapping[str, np.dtype[Any]] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    grey: bool = False
    tokens: int | None = None
    # Not shown where it is not asked for: packings that were begun know how files were read.
    encoded: bool = field(default=False, repr=False)

    def axis(self, name: str) -> int | None:
        """Return the axis of the samples of a field; None: there is none."""
        return self.axes.get(name, self.axes.get("", 0))


@dataclass(frozen=True, slots=True)
class Item:
    """[NAME=]FILES[:FIELD], one of the things that a source is put together from."""

    name: str | None
    pattern: str
    key: str | None

    @classmethod
    def parse(cls, text: str) -> Item:
        """Take a text apart; a file that has just this name is meant by it."""
        if not is_url(text) and Path(text).exists():
            return cls(None, text, None)
        named = _NAMED.fullmatch(text)
        if named is None:
            raise DatasetError("a source has an empty name")
        keyed = _KEYED.fullmatch(named["files"])
        if keyed is None:
            return cls(named["name"], named["files"], None)
        return cls(named["name"], keyed["pattern"], keyed["key"])

    def at(self, pattern: str) -> str:
        """Return how to call the same of other files."""
        name, key = f"{self.name}=" if self.name else "", f":{self.key}" if self.key else ""
        return f"{name}{pattern}{key}"

    @property
    def is_copied(self) -> bool:
        """Whether its files are not here, and are copied before they are read."""
        return is_url(self.pattern) and not zarr_stores.holds(self.pattern)

    @property
    def names_groups(self) -> bool:
        """Whether it is an array in each of many groups of HDF5 files."""
        return self.key is not None and is_pattern(self.key) and _is_hdf5(self.pattern)

    @property
    def is_plain(self) -> bool:
        return self.name is None and self.key is None


def to_copy(texts: Sequence[str]) -> Listing | None:
    """Find out which files of a source are not here; None: all are.

    Raises:
        DatasetError: if a server has none, or cannot be asked.
    """
    urls = [item.pattern for item in map(Item.parse, texts) if item.is_copied]
    return listed(" ".join(map(public, texts)), urls) if urls else None


def copied(texts: Sequence[str], patterns: Mapping[str, str]) -> list[str]:
    """Return how to call a source whose files have been copied.

    Args:
        texts: what it was called before.
        patterns: of the copies, by URL.
    """
    return [item.at(patterns.get(item.pattern, item.pattern)) for item in map(Item.parse, texts)]


def open_source(texts: Sequence[str], reading: Reading) -> Source:
    """Find out what a source holds.

    Args:
        texts: each [NAME=]FILES[:FIELD], FILES a file, a folder or a glob; the same field of
            several files is put after each other, different fields beside each other.
        reading: what the files leave open.

    Raises:
        DatasetError: if there are no files, they cannot be read, or they do not fit together.
    """
    source = _open(texts, [Item.parse(text) for text in texts], reading)
    return Converted(source, reading.dtypes) if reading.dtypes else source


def _open(texts: Sequence[str], items: Sequence[Item], reading: Reading) -> Source:
    name = " ".join(texts)
    if len(items) == 1 and items[0].is_plain and reading.tokens is None:
        pattern = items[0].pattern
        if reading.encoded:
            return _encoded(pattern)
        if _is_hdf5(pattern) and not reading.axes:
            whole = Indexed.open(pattern, to_decode=reading.dtypes)
            require_no_keys(whole.dataset)
            return whole
        if Path(pattern).is_dir() and _holds_images(Path(pattern)):
            return ImageFolder.open(pattern, reading.size, reading.grey)
    if reading.encoded:
        raise DatasetError(
            f"{name}: --encoded packs one folder, or one pattern of files, of images"
        )
    if any(item.names_groups for item in items):
        return _in_groups(name, items, reading)
    files = [(item, _find(item.pattern)) for item in items]
    paths = [path for _, found in files for path in found]
    if reading.tokens is not None or all(path.endswith(TEXT_SUFFIXES) for path in paths):
        return Text.open(name, paths, reading.tokens or DEFAULT_TOKENS)
    columns: dict[str, list[Part]] = {}
    for item, found in files:
        for path in found:
            for field_name, part in _parts(item, path, reading):
                columns.setdefault(field_name, []).append(part)
    return Table(name, columns, frozenset(reading.dtypes))


def _encoded(pattern: str) -> EncodedImages:
    """Return the images of a folder, or those that fit a pattern, as they are.

    Raises:
        DatasetError: if there are none, or other files among them.
    """
    if Path(pattern).is_dir():
        return EncodedImages.open(pattern)
    paths = _find(pattern)
    other = [path for path in paths if not path.lower().endswith(SUFFIXES)]
    if other:
        raise DatasetError(
            f"{other[0]}: --encoded packs files of images (*{', *'.join(SUFFIXES)}): leave it out "
            "for others, whose encoded images train as they are ([data.fields.NAME] image = ...)"
        )
    return EncodedImages.of_files(pattern, paths)


def _in_groups(name: str, items: Sequence[Item], reading: Reading) -> Indexed:
    """Return the arrays of groups that names with a star stand for, as fields of their last names.

    Raises:
        DatasetError: if other things are among them, or they do not fit together.
    """
    keys = {item.name or (item.key or "").rpartition("/")[2]: item for item in items}
    axes = {reading.axis(field) for field in keys}
    if not all(item.names_groups for item in items) or len({i.pattern for i in items}) > 1:
        raise DatasetError(
            f"{name}: arrays of groups (a star in their names) are packed with others of the same "
            "files and groups only"
        )
    if len(keys) < len(items) or len(axes) > 1:
        raise DatasetError(
            f"{name}: give each array of groups a name of its own, and all of them one --axis"
        )
    (axis,) = axes
    paths = {field: item.key.strip("/") for field, item in keys.items() if item.key is not None}
    return Indexed.of_groups(
        name, items[0].pattern, paths, WHOLE if axis is None else axis, reading.dtypes
    )


def text_files(texts: Sequence[str]) -> list[tuple[str | None, list[str]]]:
    """Return the files of texts, and which column or key holds them, where it is said.

    Raises:
        DatasetError: if there are none.
    """
    return [(item.key, _find(item.pattern)) for item in map(Item.parse, texts)]


def _parts(item: Item, path: str, reading: Reading) -> list[tuple[str, Part]]:
    """Return the arrays of a file that an item asks for, with their names as fields."""
    kind = format_of(path)
    if kind is None:
        raise DatasetError(
            f"{path}: what is this? Known are {known()}, folders of images, "
            f"{', '.join(TEXT_SUFFIXES)}, and any other file as text with --tokens"
        )
    arrays = kind.arrays_in(path, item.key)
    wanted = [name for name, facts in arrays.items() if not facts.is_coordinate] or list(arrays)
    if item.key is not None:
        require_fields([item.key], arrays, path)
        wanted = [item.key]
    if item.name is not None and len(wanted) > 1:
        raise DatasetError(
            f"{path}: which one is to be {item.name}? It holds {', '.join(wanted)}: write "
            f"{item.name}={item.pattern}:{wanted[0]}"
        )
    named = [(item.name or key, key) for key in wanted]
    made = []
    for name, key in named:
        if (axis := reading.axis(name)) is None:
            raise DatasetError(
                f"{path}: --axis none is for arrays of groups, such as {path}:patch_*/image"
            )
        made.append((name, make_part(path, key, axis, arrays[key])))
    return made


def _find(pattern: str) -> list[str]:
    path = Path(pattern)
    if is_url(pattern):
        return [pattern]
    if path.is_dir() and zarr_stores.holds(pattern):
        return [pattern]
    if path.is_dir():
        there = (each for each in path.iterdir() if not each.name.startswith("."))
        found = in_order(str(each) for each in there if each.is_file())
        if not found:
            raise DatasetError(f"{path}: there are no files in this folder")
        return found
    if path.exists():
        return [pattern]
    found = in_order(glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute ones too
    if not found:
        raise DatasetError(f"{pattern}: no file has such a name")
    return found


def _is_hdf5(pattern: str) -> bool:
    path = Path(pattern)
    if path.is_dir():
        return bool(shards_in(path))
    # What a pattern finds first stands for all: files of two formats would not fit together.
    if pattern.endswith((".nc", *FURTHER_SUFFIXES)):
        first = next(iter(_find(pattern)), "")
        return not netcdf3.holds(first) and (pattern.endswith(".nc") or h5py.is_hdf5(first))
    return pattern.endswith(HDF5_SUFFIXES)


def _holds_images(folder: Path) -> bool:
    return bool(images_in(folder)) or any(
        images_in(entry) for entry in folder.iterdir() if entry.is_dir()
    )
