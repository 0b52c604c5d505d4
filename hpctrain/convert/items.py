"""One array of an HDF5 file, as it is told: its type, its storage, and what it could be for.

Of its values no more is read than says what they are for: the ends of numbers in a row, some texts,
the first bytes of what may be an image.
"""

from __future__ import annotations

import datetime
import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5t

from hpctrain.data.coding import Coding
from hpctrain.data.dataset import SUPPORTED_DTYPES
from hpctrain.data.files.contents import (
    array_of,
    is_bare_dimension,
    text_attribute,
)
from hpctrain.data.files.coordinates import scales_of
from hpctrain.data.files.form_opening import whole_number
from hpctrain.data.files.global_heaps import require_sound_fill, require_sound_heap
from hpctrain.data.files.storage import HDF5_FAILURES, dtype_of, filters_of
from hpctrain.data.files.type_texts import type_of, type_text
from hpctrain.data.forms import COMPLEX_PAIRS
from hpctrain.errors import DatasetError
from hpctrain.utils.text import number

Kind = Literal[
    "number",
    "enumeration",
    "complex pair",
    "text",
    "opaque",
    "compound",
    "sequence",
    "reference",
    "odd number",
    "other",
]
"""What the values are, as far as it matters to who trains on them."""

ANY = "*"
MOST_NUMBERS = 2**20
"""That are read of a row of integers, to find out whether they are offsets or counts."""
MOST_TEXTS = 2**10
"""That are read, to find out whether they are classes."""
MOST_MEMBERS = 64
_DEEPEST_MEMBER = 3
_MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WebP", b"GIF8": "GIF"}
_UNITS = re.compile(r"\s*(\w+?)s?\s+since\s+(\S+(?:\s+[\d:.]+)?)", re.IGNORECASE)
_SECONDS = {
    **dict.fromkeys(("second", "sec", "s"), 1.0),
    **dict.fromkeys(("minute", "min"), 60.0),
    **dict.fromkeys(("hour", "hr", "h"), 3600.0),
    **dict.fromkeys(("day", "d"), 86400.0),
}
_REAL_CALENDARS = ("", "standard", "gregorian", "proleptic_gregorian")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peek:
    """What a look at some values has told.

    Attributes:
        first, last, total: of whole numbers in a row; `total` is their sum.
        ascends: whether none of them is smaller than the one before.
        texts: different ones among those read.
        read: texts that were read.
        longest: bytes of the longest of them.
        image: format of the encoded image that the bytes begin with; empty if with none.
    """

    first: int | None = None
    last: int | None = None
    total: int | None = None
    ascends: bool = False
    texts: int = 0
    read: int = 0
    longest: int = 0
    image: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """An array, a member of one, or a link in an HDF5 file.

    Attributes:
        path: in the file; `*` stands for the parts in which groups that hold the same differ.
        type: of its values, in words; "link" for one.
        kind: of its values.
        shape: all axes; None where there is none.
        dtype: as h5py has it; None where it has none.
        axes: names of the axes, "" where one has none.
        stored: where its values lie, in words.
        notes: what its attributes say of its values.
        obstacle: why it cannot train; empty if it can.
        is_coordinate: whether it says where others lie, as the dimension scales of netCDF do.
        matlab: its class in MATLAB; empty if that did not write it.
        is_empty_in_matlab: whether its values are the shape of an array without any.
        num_bytes: of its values in memory.
        count: of arrays that this one stands for.
        rows: of all of these along their first axis.
        is_uniform: whether all of these have the same shape but for their first axis.
        peek: what some of its values tell.
        is_keyed: whether it stands for arrays beside each other, a sample each.
        is_undecodable: whether its attributes say what cannot be done with its numbers.
        leads_to: where it is, if it is here by a link.
        members: of its type, if that is compound, which have paths of their own.
    """

    path: str
    type: str
    kind: Kind = "other"
    shape: tuple[int, ...] | None = None
    dtype: np.dtype[Any] | None = None
    axes: tuple[str, ...] = ()
    stored: str = ""
    notes: tuple[str, ...] = ()
    obstacle: str = ""
    is_coordinate: bool = False
    matlab: str = ""
    is_empty_in_matlab: bool = False
    num_bytes: int = 0
    count: int = 1
    rows: int = 0
    is_uniform: bool = True
    peek: Peek = Peek()
    is_keyed: bool = False
    is_undecodable: bool = False
    leads_to: str = ""
    members: tuple[Item, ...] = ()


def item_of(path: str, dataset: h5py.Dataset, place: str, *, has_name: bool) -> Item:
    """Return what is told of an array.

    Args:
        path: of it in the file, as text.
        dataset: which is open.
        place: the file.
        has_name: whether a config can name it.
    """
    shape = dataset.shape
    kind, dtype = _kind_of(dataset)
    item = Item(
        path=path,
        type=type_of(dataset),
        kind=kind,
        shape=shape,
        dtype=dtype,
        axes=_axes_of(dataset),
        is_coordinate=text_attribute(dataset, "CLASS") == "DIMENSION_SCALE",
        matlab=text_attribute(dataset, "MATLAB_class"),
        is_empty_in_matlab="MATLAB_empty" in dataset.attrs,
        rows=shape[0] if shape else 0,
        num_bytes=math.prod(shape or (0,)) * dataset.id.get_type().get_size(),
    )
    notes = [f"in {units}"] if (units := text_attribute(dataset, "units")) else []
    if (period := covered(dataset, dataset)) is not None:
        notes = [period]
    notes += _unlimited(dataset)
    obstacle = _obstacle_of_shape(dataset) if has_name else "its name is not UTF-8"
    reason = ""
    try:
        require_sound_fill(dataset)
        if not obstacle:
            array = array_of(dataset, place)
            reason = array.reason
            if array.coding is not None:
                notes += [array.coding.problem] if array.coding.problem else []
                notes += _decoded(array.coding)
                item = replace(item, is_undecodable=bool(array.coding.problem))
    except DatasetError as error:
        obstacle = str(error).removeprefix(f"{place}: ")
    except OSError as error:
        obstacle = f"HDF5 cannot tell where its values are: {error}"
    except HDF5_FAILURES:
        obstacle = "HDF5 cannot tell where its values are"
    item = replace(item, stored=_stored(dataset, reason), notes=tuple(notes), obstacle=obstacle)
    if obstacle:
        return item
    is_table = kind in ("compound", "complex pair")
    return replace(item, members=tuple(_members_of(item, dataset))) if is_table else item


def _kind_of(dataset: h5py.Dataset) -> tuple[Kind, np.dtype[Any]]:
    dtype = dtype_of(dataset)
    return _odd_or(dataset.id.get_type(), kind_of(dtype)), dtype


def _odd_or(type_id: h5t.TypeID, kind: Kind) -> Kind:
    """Return the kind of values that numpy may have no type for."""
    return "odd number" if kind == "opaque" and whole_number(type_id) else kind


def kind_of(dtype: np.dtype[Any]) -> Kind:
    """Return the kind of values of a dtype of h5py's."""
    base = dtype.base
    of: Any = h5py.check_vlen_dtype(base)
    kinds: tuple[tuple[bool, Kind], ...] = (
        (h5py.check_ref_dtype(base) is not None, "reference"),
        (h5py.check_string_dtype(base) is not None, "text"),
        (of is not None and np.dtype(of).kind in "iufb", "sequence"),
        (h5py.check_enum_dtype(base) is not None, "enumeration"),
        (base.names in COMPLEX_PAIRS, "complex pair"),
        (base.names is not None, "compound"),
        (base.kind == "V", "opaque"),
        (base.newbyteorder("=").name in SUPPORTED_DTYPES or base.kind in "mMf", "number"),
    )
    return next((kind for is_it, kind in kinds if is_it), "other")


def _axes_of(dataset: h5py.Dataset) -> tuple[str, ...]:
    """Return the names of the axes, by the dimension scales that are attached to them."""
    try:
        names: dict[int, str] = {}
        for axis, scale in scales_of(dataset):
            names.setdefault(axis, str(scale.name).rpartition("/")[2])
        return tuple(names.get(axis, "") for axis in range(dataset.ndim))
    except HDF5_FAILURES:
        return ()


def _unlimited(dataset: h5py.Dataset) -> list[str]:
    if dataset.shape and dataset.maxshape and None in dataset.maxshape:
        axes = [str(axis) for axis, most in enumerate(dataset.maxshape) if most is None]
        return [f"may grow along axis {', '.join(axes)}"]
    return []


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
    try:
        require_sound_fill(dataset)
        if dataset.chunks is None:
            return reason or "contiguous"
        shape = " x ".join(map(str, dataset.chunks))
        return ", ".join([f"chunks of {shape}", *map(str, filters_of(dataset))])
    except HDF5_FAILURES:
        return "in a way that h5py does not know"


def _decoded(coding: Coding) -> list[str]:
    """Return what becomes of the stored numbers of a float field, in words."""
    words = ["read as unsigned"] if coding.unsigned else []
    words += ["read as signed"] if coding.unsigned is False else []
    words += [f"x {number(coding.scale)}"] if coding.scale is not None else []
    words += [f"+ {number(coding.offset)}"] if coding.offset is not None else []
    words += ["some stand for missing values"] if coding.marks else []
    return ([f"decoded: {', '.join(words)}"] if words else []) + list(coding.unused)


def _members_of(item: Item, dataset: h5py.Dataset) -> list[Item]:
    """Return the members of a compound array, and those of members that are compounds."""
    assert item.shape is not None
    assert item.dtype is not None
    found: list[Item] = []
    waiting = [(item.path, dataset.id.get_type(), item.dtype, item.shape, 0)]
    while waiting and len(found) < MOST_MEMBERS:
        path, kind, dtype, shape, depth = waiting.pop()
        base, inner = dtype.subdtype or (dtype, ())
        shape += inner
        names = base.names if depth <= _DEEPEST_MEMBER else None
        if names and (depth == 0 or kind_of(base) == "compound"):
            type_id = _inner(kind)
            numbers = {type_id.get_member_name(i): i for i in range(type_id.get_nmembers())}
            waiting += [
                (
                    f"{path}/{name}",
                    type_id.get_member_type(numbers[name.encode()]),
                    base[name],
                    shape,
                    depth + 1,
                )
                for name in reversed(names)
                if name.encode() in numbers and "/" not in name
            ]
            continue
        size = math.prod(shape) * base.itemsize
        found.append(
            Item(
                path=path,
                type=type_text(kind),
                kind=_odd_or(kind, kind_of(base)),
                shape=shape,
                dtype=base,
                rows=item.rows,
                num_bytes=size,
            )
        )
    return found


def _inner(kind: h5t.TypeID) -> Any:
    """Return the compound type in a type, which may be an array of it."""
    return kind.get_super() if isinstance(kind, h5t.TypeArrayID) else kind


def peek_of(item: Item, dataset: h5py.Dataset) -> Item:
    """Return an array with what a look at some of its values tells."""
    try:
        if dataset.shape:
            require_sound_heap(dataset, slice(MOST_TEXTS))
        members = tuple(
            replace(each, peek=_of_texts(_member_texts(dataset, each.path[len(item.path) + 1 :])))
            if each.kind == "text" and each.shape == dataset.shape
            else each
            for each in item.members
        )
        return replace(item, peek=_peek(item, dataset), members=members)
    except (*HDF5_FAILURES, DatasetError):
        return item


def _member_texts(dataset: h5py.Dataset, path: str) -> npt.NDArray[Any]:
    first, *others = path.split("/")
    values: npt.NDArray[Any] = dataset.fields(first)[:MOST_TEXTS]
    for member in others:
        values = values[member]
    return values


def _peek(item: Item, dataset: h5py.Dataset) -> Peek:
    if item.shape is None or item.dtype is None:
        return Peek()
    if item.kind == "text":
        return _of_texts(dataset[: max(1, MOST_TEXTS // math.prod(item.shape[1:]))])
    if item.kind == "sequence":
        is_bytes = np.dtype(h5py.check_vlen_dtype(item.dtype.base)) == np.uint8
        return Peek(image=_image_in(dataset[(0,) * dataset.ndim]) if is_bytes else "")
    if len(item.shape) != 1 or item.dtype.kind not in "iu" or item.kind != "number":
        return Peek()
    image = _image_in(dataset[:8]) if item.dtype == np.uint8 else ""
    if item.shape[0] > MOST_NUMBERS:
        return Peek(first=int(dataset[0]), last=int(dataset[-1]), image=image)
    values = dataset[()]
    return Peek(
        first=int(values[0]),
        last=int(values[-1]),
        total=int(values.sum(dtype=np.float64)),
        ascends=bool((values[1:] >= values[:-1]).all()),
        image=image,
    )


def _of_texts(values: npt.NDArray[Any]) -> Peek:
    flat = values.ravel().tolist()
    raw = [each.encode() if isinstance(each, str) else bytes(each) for each in flat]
    return Peek(texts=len(set(raw)), read=len(raw), longest=max(map(len, raw), default=0))


def _image_in(values: npt.NDArray[Any]) -> str:
    head = np.asarray(values)[:8].tobytes()
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


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
