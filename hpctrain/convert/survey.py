"""What is in an HDF5 file of any maker: all of it, and what of it can train.

Nothing is refused here: what cannot become a tensor is listed with the reason.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import h5py

from hpctrain.data.coding import Coding
from hpctrain.data.contents import array_of, is_bare_dimension, text_attribute, type_of
from hpctrain.data.dataset import SUPPORTED_DTYPES
from hpctrain.data.storage import HDF5_FAILURES, filters_of, open_hdf5_file
from hpctrain.data.walking import Link, objects_in, require_files_behind
from hpctrain.errors import DatasetError
from hpctrain.utils.text import number

LEAST_ALIKE = 3
"""So many groups that hold the same are taken for samples or episodes, and listed as one."""
ANY = "*"
_NO_TENSOR = "it cannot become a tensor"
_UNITS = re.compile(r"\s*(\w+?)s?\s+since\s+(\S+(?:\s+[\d:.]+)?)", re.IGNORECASE)
_SECONDS = {
    **dict.fromkeys(("second", "sec", "s"), 1.0),
    **dict.fromkeys(("minute", "min"), 60.0),
    **dict.fromkeys(("hour", "hr", "h"), 3600.0),
    **dict.fromkeys(("day", "d"), 86400.0),
}
_REAL_CALENDARS = ("", "standard", "gregorian", "proleptic_gregorian")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """An array or a link in an HDF5 file.

    Attributes:
        path: in the file; `*` stands for the names of groups that hold the same.
        type: of its values, in words; "link" for one.
        shape: all axes; None where there is none.
        stored: where its values lie, in words.
        notes: what its attributes say of its values.
        obstacle: why it cannot train; empty if it can.
        is_coordinate: whether it says where others lie, as the dimension scales of netCDF do.
        num_bytes: of its values in memory.
        count: of arrays that this one stands for.
    """

    path: str
    type: str
    shape: tuple[int, ...] | None = None
    stored: str = ""
    notes: tuple[str, ...] = ()
    obstacle: str = ""
    is_coordinate: bool = False
    num_bytes: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """One file.

    Attributes:
        path: of it.
        items: in the order of their paths, alike groups as one.
        cut: why there may be more; empty if there is not.
    """

    path: str
    items: tuple[Item, ...]
    cut: str = ""

    def trainable(self) -> dict[int, list[Item]]:
        """Return the arrays that can train together, by their number of rows; most bytes first.

        Coordinates are none of them, and what lies in alike groups is not.
        """
        found: dict[int, list[Item]] = {}
        for item in self.items:
            if item.shape and not (item.obstacle or item.is_coordinate or item.count > 1):
                found.setdefault(item.shape[0], []).append(item)
        size = {rows: sum(item.num_bytes for item in items) for rows, items in found.items()}
        return {rows: found[rows] for rows in sorted(found, key=lambda rows: -size[rows])}


def survey(path: str) -> Survey:
    """Return what one HDF5 file holds. Reads two values of each time, no others.

    Raises:
        DatasetError: if it is not an HDF5 file, or cannot be read.
    """
    items: list[Item] = []
    cut = ""
    try:
        with open_hdf5_file(path) as file:
            try:
                for name, found in objects_in(file):
                    text = name if isinstance(name, str) else name.decode(errors="backslashreplace")
                    if isinstance(found, h5py.Dataset):
                        items.append(_item(text, found, path, has_name=isinstance(name, str)))
                    elif isinstance(found, Link):
                        items.append(_link_item(text, found))
            except DatasetError as error:  # there are too many objects, or too deep ones
                cut = str(error)
    except HDF5_FAILURES as error:
        raise DatasetError(f"{path}: HDF5 cannot read this file: {error}") from error
    return Survey(path=path, items=tuple(_folded(items)), cut=cut)


def _item(path: str, dataset: h5py.Dataset, place: str, *, has_name: bool) -> Item:
    item = Item(
        path=path,
        type=type_of(dataset),
        shape=dataset.shape,
        is_coordinate=text_attribute(dataset, "CLASS") == "DIMENSION_SCALE",
    )
    obstacle = _obstacle_of_shape(dataset)
    if not has_name:
        obstacle = "its name is not UTF-8"
    notes = [f"in {units}"] if (units := text_attribute(dataset, "units")) else []
    if (period := covered(dataset, dataset)) is not None:
        notes = [period]
    try:
        if obstacle:
            stored = _stored(dataset)
            return replace(item, stored=stored, notes=tuple(notes), obstacle=obstacle)
        array = array_of(dataset, place)
        stored = _stored(dataset, array.reason)
        if array.dtype.name not in SUPPORTED_DTYPES:
            return replace(item, stored=stored, notes=tuple(notes), obstacle=_NO_TENSOR)
        if array.coding is not None:
            obstacle = array.coding.problem
            notes += _decoded(array.coding)
        return replace(
            item,
            stored=stored,
            notes=tuple(notes),
            obstacle=obstacle,
            num_bytes=array.num_bytes,
        )
    except DatasetError as error:
        return replace(item, notes=tuple(notes), obstacle=str(error).removeprefix(f"{place}: "))
    except HDF5_FAILURES:
        return replace(item, notes=tuple(notes), obstacle=_NO_TENSOR)


def _obstacle_of_shape(dataset: h5py.Dataset) -> str:
    if dataset.shape is None:
        return "it has no values"
    if dataset.shape == ():
        return "one value, and no axis of samples"
    if 0 in dataset.shape:
        return "it has no rows" if dataset.shape[0] == 0 else "its rows have no values"
    if is_bare_dimension(dataset):
        return "the length of an axis of netCDF, without values"
    return ""


def _stored(dataset: h5py.Dataset, reason: str = "") -> str:
    """Return where the values of an array lie, in words.

    Args:
        dataset: the array.
        reason: why they are not contiguous, if there are no chunks and somebody has found out.
    """
    if dataset.chunks is None:
        return reason or "contiguous"
    shape = " x ".join(map(str, dataset.chunks))
    return ", ".join([f"chunks of {shape}", *map(str, filters_of(dataset))])


def _decoded(coding: Coding) -> list[str]:
    """Return what becomes of the stored numbers of a float field, in words."""
    words = ["read as unsigned"] if coding.unsigned else []
    words += ["read as signed"] if coding.unsigned is False else []
    words += [f"x {number(coding.scale)}"] if coding.scale is not None else []
    words += [f"+ {number(coding.offset)}"] if coding.offset is not None else []
    words += ["some stand for missing values"] if coding.marks else []
    return ([f"decoded: {', '.join(words)}"] if words else []) + list(coding.unused)


def _link_item(path: str, link: Link) -> Item:
    """Return a link to another name or file: where it leads, and whether anything is there."""
    group, raw = link
    leads = "to what cannot be told"
    try:
        found = group.get(raw, getlink=True)
        at = f"{found.filename}:" if isinstance(found, h5py.ExternalLink) else ""
        leads = f"to {at}{found.path}"
        require_files_behind(group, raw.decode(errors="surrogateescape"))
        if group.get(raw) is None:
            leads += ", where there is nothing"
    except OSError as error:
        leads += f", which {error.strerror or 'cannot be followed'}"
    except HDF5_FAILURES:
        leads = "of a kind that h5py does not know"
    return Item(path=path, type="link", notes=(leads,), obstacle="a link: it trains if named")


def _folded(items: Sequence[Item]) -> list[Item]:
    """Return items in the order of their paths, those of groups that hold the same as one."""
    below: dict[str, list[Item]] = {}
    here: list[Item] = []
    for item in items:
        name, slash, rest = item.path.partition("/")
        if slash:
            below.setdefault(name, []).append(replace(item, path=rest))
        else:
            here.append(item)
    alike: dict[tuple[tuple[object, ...], ...], list[str]] = {}
    for name, inside in below.items():
        alike.setdefault(_signature(inside), []).append(name)
    found = {item.path: [item] for item in here}
    for names in alike.values():
        if len(names) < LEAST_ALIKE:
            for name in names:
                found[name] = _placed(name, _folded(below[name]))
            continue
        merged = [replace(item, count=item.count * len(names)) for item in below[names[0]]]
        found[names[0]] = _placed(ANY, _folded(merged))
    return [item for name in sorted(found) for item in found[name]]


def _signature(items: Sequence[Item]) -> tuple[tuple[object, ...], ...]:
    """Return what groups have in common that hold one sample or episode each."""
    facts = [(each.path, each.type, len(each.shape or ())) for each in items]
    return tuple(sorted(facts))


def _placed(name: str, items: Sequence[Item]) -> list[Item]:
    return [replace(item, path=f"{name}/{item.path}") for item in items]


def covered(first: h5py.Dataset, last: h5py.Dataset) -> str | None:
    """Return the period of files that follow each other, in words; None: these are no times.

    Source: https://cfconventions.org, section 4.4.

    Args:
        first: the times in the first file, which is open.
        last: those in the last one; it may be the same.
    """
    units = [text_attribute(each, "units") for each in (first, last)]
    if not all(map(_UNITS.match, units)):
        return None
    calendar = text_attribute(first, "calendar")
    try:
        if not all(each.ndim == 1 and len(each) for each in (first, last)):
            return f"times in {units[0]}, {calendar or 'standard'} calendar"
        ends = float(first[0]), float(last[-1])
    except HDF5_FAILURES:
        return f"times in {units[0]}, {calendar or 'standard'} calendar"
    begin, end = (_date(end, each, calendar) for end, each in zip(ends, units, strict=True))
    return f"{begin} to {end}, {calendar or 'standard'} calendar"


def _date(value: float, units: str, calendar: str) -> str:
    """Return a time as a date, or as it is where Python's calendar does not reach."""
    found = _UNITS.match(units)
    assert found is not None
    as_it_is = f"{value:g} {units}"
    seconds = _SECONDS.get(found[1].lower())
    if seconds is None or calendar.lower() not in _REAL_CALENDARS:
        return as_it_is
    try:
        start = datetime.datetime.fromisoformat(_padded(found[2].rstrip("Z")))
        date = start.replace(tzinfo=None) + datetime.timedelta(seconds=value * seconds)
    except (ValueError, OverflowError):
        return as_it_is
    return date.isoformat(" ", "minutes")


def _padded(date: str) -> str:
    """Return "1900-1-1 0:0:0.0" as ISO 8601 has it."""
    day, _, time = date.replace("T", " ").partition(" ")
    year, *rest = day.split("-")
    padded = "-".join([year.zfill(4), *(part.zfill(2) for part in rest)])
    if not time:
        return padded
    clock = [part.zfill(2) for part in time.split(".")[0].split(":")]
    return f"{padded} {':'.join([*clock, '00'][: max(2, len(clock))])}"
