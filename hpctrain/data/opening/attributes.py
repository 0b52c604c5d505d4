"""Attributes as fields: one value for each file, or group of one, and so for all samples in it.

Such are the label of a file that is one sample, the task of an episode, the mass of a simulation.
Rank 0 reads them when files are opened; ranks are told them with the dataset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.config.schema_data import FieldTable
from hpctrain.data.coding import Coding
from hpctrain.data.dataset import Dataset, Field, Layout, Shard, require_supported
from hpctrain.data.files.discovery import FileOrder, files_of
from hpctrain.data.files.form_opening import MOST_CLASSES, as_classes
from hpctrain.data.files.groups import objects_fitting, stem
from hpctrain.data.files.storage import HDF5_FAILURES, open_hdf5_file, read_attribute
from hpctrain.data.files.walking import require_files_behind
from hpctrain.data.forms import Form, UnfitRowError, Wish, form_of
from hpctrain.data.opening.homes import Home
from hpctrain.data.view import Part
from hpctrain.errors import DatasetError
from hpctrain.utils.text import listed, nearest

Values = npt.NDArray[Any]
_OF_NETCDF = "_NCProperties"
"""Attribute of the root of files that the netCDF library, and h5netcdf, wrote."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttributePlace:
    """Where an attribute is.

    Attributes:
        name: of it.
        path: of the group or HDF5 dataset that has it, or a pattern of such; empty: the file.
    """

    name: str
    path: str

    @classmethod
    def of(cls, name: str, table: FieldTable, stems: Iterable[str]) -> AttributePlace:
        """Return that of a field.

        Args:
            name: of the field.
            table: what the config says of it.
            stems: patterns of the groups that other fields of the same files are in.

        Raises:
            DatasetError: if nothing says which groups are meant.
        """
        assert table.attribute is not None
        groups = list(dict.fromkeys(filter(None, stems)))
        if table.path is not None:
            return cls(name=table.attribute, path=table.path.strip("/"))
        if len(groups) > 1:
            raise DatasetError(
                f"data.fields.{name}.attribute: other fields are in {listed(groups)}: say by path "
                'whose attribute it is; "/" is the file'
            )
        return cls(name=table.attribute, path=groups[0] if groups else "")

    @property
    def stem(self) -> str:
        """The part of a pattern that names groups, empty if it is none."""
        return stem(f"{self.path}/") if "*" in self.path else ""

    def fits(self, groups: str) -> bool:
        """Tell whether each group of a pattern lies in, or has, one object of this."""
        own, others = self.stem.split("/"), groups.split("/")
        return not self.stem or (bool(groups) and own == others[: len(own)])

    def inside(self, shard: Shard) -> str:
        """Return the path of the object that has a shard's value; empty: the file."""
        if "*" not in self.path:
            return self.path
        parts, group = self.path.split("/"), shard.group.split("/")
        return "/".join([*group[: len(parts)], *parts[len(group) :]])


def missing_of(table: FieldTable) -> int | None:
    """Return the number that stands for what is none of the classes; None: such is refused."""
    if table.missing is None and table.mask is not None and not table.batch:
        is_whole = table.dtype is not None and np.dtype(table.dtype).kind == "i"
        return -1 if table.classes is not None or is_whole else None
    return table.missing


def attribute_parts(
    tables: Mapping[str, FieldTable],
    files: Mapping[str, str],
    source_of_classes: str,
    order: FileOrder,
    beside: Sequence[tuple[Home, Part]],
) -> list[tuple[Part, list[str]]]:
    """Return attributes as rows, and the fields of each part.

    Args:
        tables: what the config says of each field.
        files: that have it.
        source_of_classes: the files of the training, whose texts are the classes of all.
        order: in which files follow each other.
        beside: where the other fields are.

    Raises:
        DatasetError: if an attribute is not there, or not what can be delivered.
    """
    others = {
        each: [(home.groups, part) for home, part in beside if home.files == each]
        for each in files.values()
    }
    fields: dict[tuple[str, str], dict[str, tuple[AttributePlace, Wish]]] = {}
    for name, table in tables.items():
        groups = [groups for groups, _ in others[files[name]]]
        place = AttributePlace.of(name, table, groups)
        classes = table.classes
        if classes == "sorted":
            classes = attribute_texts(place, files_of(table.train or source_of_classes, order))
            classes = classes if missing_of(table) is None else tuple(filter(None, classes))
        wish = Wish(
            path=place.path,
            dtype=table.dtype,
            squeeze=table.squeeze,
            classes=classes,
            missing=missing_of(table),
        )
        fields.setdefault((files[name], place.path), {})[name] = place, wish
    return [
        (attribute_part(own, source, order, others[source]), list(own))
        for (source, _), own in fields.items()
    ]


def attribute_part(
    fields: Mapping[str, tuple[AttributePlace, Wish]],
    files: str,
    order: FileOrder,
    others: Sequence[tuple[str, Part]],
) -> Part:
    """Return attributes as rows: as many of each file, or group, as other fields have.

    Args:
        fields: of the same place but for the names of attributes, and what is delivered.
        files: that have them.
        order: in which files follow each other.
        others: fields of the same files: the pattern of groups that they are in, and their part.

    Raises:
        DatasetError: if an attribute is not there, or not what can be delivered.
    """
    place, _ = next(iter(fields.values()))
    fitting = [part for groups, part in others if place.fits(groups)]
    if not fitting and place.stem:
        raise DatasetError(
            f'{files}: attributes of "{place.path}", and no other field is in groups of this '
            "pattern, whose rows they would be of: name one by its path, or the groups that the "
            "others are in"
        )
    shards = _shards_like(fitting[0]) if fitting else _files(files, order)
    found: dict[str, Field] = {}
    values: dict[str, Values] = {}
    raw = _read(shards, fields)
    for name, (each, wish) in fields.items():
        found[name], values[name] = _delivered(each, wish, raw[name], shards)
    layouts = dict.fromkeys(fields, Layout(0))  # no reader goes there
    codings = {
        name: Coding(missing=(wish.missing,))
        for name, (_, wish) in fields.items()
        if wish.missing is not None
    }
    shards = [dataclasses.replace(shard, layouts=layouts, codings=codings) for shard in shards]
    dataset = Dataset(source=files, fields=found, shards=tuple(shards))
    return Part(dataset, constants=values)


def attribute_texts(place: AttributePlace, files: Sequence[str]) -> tuple[str, ...]:
    """Return the different texts of an attribute in all of these files, sorted.

    Raises:
        DatasetError: if it is no text, or there are too many to be classes.
    """
    found: set[bytes] = set()
    for path in files:
        try:
            with open_hdf5_file(path) as file:
                for inside in objects_fitting(file, place.path):
                    if place.name not in _object(file, inside).attrs:
                        continue  # who reads a sample of it says so
                    value = _value(file, inside, place.name)
                    if value.dtype.kind not in "SO":
                        raise DatasetError(
                            f'{path}: {_told(inside)}: attribute "{place.name}" is {value.dtype}, '
                            "and classes are of texts"
                        )
                    found |= {bytes(each) for each in value.ravel().tolist()}
        except HDF5_FAILURES as error:
            raise DatasetError(f"{path}: HDF5 cannot read this file: {error}") from error
        if len(found) > MOST_CLASSES:
            raise DatasetError(
                f'{path}: attribute "{place.name}" has more than {MOST_CLASSES:,} different texts, '
                'which are no classes: deliver them as bytes, dtype = "S20"'
            )
    return as_classes(found, f'attribute "{place.name}"')


def _shards_like(part: Part) -> list[Shard]:
    """Return the files, or groups, of a part, with as many rows as the view has of each."""
    rows = np.diff(part.stops, prepend=0).tolist()
    return [
        dataclasses.replace(shard, samples=count)
        for shard, count in zip(part.dataset.shards, rows, strict=True)
    ]


def _files(files: str, order: FileOrder) -> list[Shard]:
    """Return files that no other field is in, a row each."""
    try:
        return [
            Shard(path, 1, Path(path).stat().st_size, None, {}) for path in files_of(files, order)
        ]
    except OSError as error:
        raise DatasetError(f"{error.filename}: {error.strerror}") from error


def _read(
    shards: Sequence[Shard], fields: Mapping[str, tuple[AttributePlace, Wish]]
) -> dict[str, list[Values]]:
    """Return the value of every shard of each field, as it is stored; each file opened once."""
    found: dict[str, list[Values]] = {name: [] for name in fields}
    for path, own in groupby(shards, lambda shard: shard.path):
        try:
            with open_hdf5_file(path) as file:
                for shard in own:
                    for name, (place, wish) in fields.items():
                        inside = place.inside(shard)
                        is_class = wish.classes is not None and wish.missing is not None
                        if is_class and place.name not in _object(file, inside).attrs:
                            found[name].append(np.array(b"", object))  # it has none of them
                        else:
                            found[name].append(_value(file, inside, place.name))
        except HDF5_FAILURES as error:
            raise DatasetError(f"{path}: HDF5 cannot read this file: {error}") from error
    return found


def _value(file: h5py.File, inside: str, name: str) -> Values:
    """Return an attribute; texts as an array of bytes.

    Raises:
        DatasetError: if it is not there, or nothing that a tensor is made of.
    """
    attributes = _object(file, inside).attrs
    place = f"{file.filename}: {_told(inside)}"
    if name not in attributes:
        there = sorted(map(str, attributes))
        near = nearest(name, there)
        hint = f' Did you mean "{near}"?' if near else ""
        raise DatasetError(
            f'{place} has no attribute "{name}".{hint} It has: {listed(there, 30) or "none"}'
        )
    try:
        value = read_attribute(attributes, name)
    except (TypeError, ValueError) as error:
        raise DatasetError(f'{place}: attribute "{name}" cannot be read: {error}') from error
    if isinstance(value, str | bytes):
        texts: Values = np.array(_as_bytes(value), object)
        return texts
    array = np.asarray(value)
    if isinstance(value, h5py.Empty) or not array.size:
        raise DatasetError(f'{place}: attribute "{name}" has no value')
    if array.dtype.kind == "S" or all(isinstance(e, str | bytes) for e in array.ravel().tolist()):
        made = np.empty(array.shape, object)
        made.reshape(-1)[:] = [_as_bytes(each) for each in array.ravel().tolist()]
        array = made
    elif array.dtype.kind not in "biufc":
        raise DatasetError(f'{place}: attribute "{name}" is {array.dtype}, and not numbers or text')
    # Its tools have no other numbers and texts: they write one as a list of one.
    is_single = array.shape == (1,) and _OF_NETCDF in file.attrs
    return array.reshape(()) if is_single else array


def _as_bytes(text: str | bytes) -> bytes:
    return text.encode(errors="surrogateescape") if isinstance(text, str) else bytes(text)


def _object(file: h5py.File, inside: str) -> Any:
    if not inside:
        return file
    require_files_behind(file, inside)
    found = file.get(inside)
    if not isinstance(found, h5py.Group | h5py.Dataset):
        raise DatasetError(f'{file.filename}: there is no group or HDF5 dataset "{inside}"')
    return found


def _told(inside: str) -> str:
    return f'"{inside}"' if inside else "the file"


def _delivered(
    place: AttributePlace, wish: Wish, values: Sequence[Values], shards: Sequence[Shard]
) -> tuple[Field, Values]:
    """Return what becomes of the values of all shards, (shards, *shape).

    Raises:
        DatasetError: naming the one that is unlike others, or cannot be what is asked for.
    """

    def at(index: int) -> str:
        inside = place.inside(shards[index])
        return f'{shards[index].path}: {_told(inside)}: attribute "{place.name}"'

    first = values[0]
    is_text = first.dtype.kind == "O"
    for index, each in enumerate(values):
        if (each.shape, each.dtype.kind == "O") != (first.shape, is_text):
            raise DatasetError(
                f"{at(index)} is {_described(each)}, but {_described(first)} in "
                f"{at(0)}: samples of a batch are alike"
            )
    dtype = np.result_type(*{each.dtype.newbyteorder("=") for each in values})
    stacked = _stacked_texts(values) if is_text else np.array(values, dtype)
    try:
        form = form_of(wish, (), first.shape, dtype)
        shape, kind = form.delivered()
        require_supported(place.name, Field(shape, kind), files := shards[0].path)
    except ValueError as error:
        raise DatasetError(f"{at(0)} is {_described(first)}: {error} (data.fields)") from None
    except DatasetError as error:
        raise DatasetError(str(error).replace(f"{files}: field", f"{files}: attribute")) from None
    for index, each in enumerate(values):
        # 1 in one file and 1.5 in another are both floats; a number that is none is named.
        back = each if is_text else stacked[index].astype(each.dtype)
        if back is not each and not np.array_equal(back, each, equal_nan=each.dtype.kind in "fc"):
            raise DatasetError(
                f"{at(index)} is {each.dtype}, and other files have what makes it {dtype}, which "
                "has no such number: write one number format"
            )
    try:
        made = form.make(stacked)
    except UnfitRowError as error:
        raise DatasetError(f"{at(error.row)}: {error} (data.fields)") from None
    return Field(shape, kind, form=_named(form, place)), made


def _named(form: Form, place: AttributePlace) -> Form:
    return dataclasses.replace(form, path=f"{place.path}@{place.name}")


def _stacked_texts(values: Sequence[Values]) -> Values:
    made = np.empty((len(values), *values[0].shape), object)
    for index, each in enumerate(values):
        made[index, ...] = each
    return made


def _described(value: Values) -> str:
    kind = "text" if value.dtype.kind == "O" else str(value.dtype)
    return f"{kind} of shape {value.shape}" if value.shape else f"one {kind}"
