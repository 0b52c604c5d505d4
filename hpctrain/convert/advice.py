"""What the arrays of a file are for, and which keys of `[data.fields]` each needs. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hpctrain.convert.items import ANY, Item
from hpctrain.data.dataset import SUPPORTED_DTYPES
from hpctrain.utils.text import listed

PIXELS = (224, 224)
"""Rows and columns that are proposed for encoded images."""
_OFFSETS = re.compile(r"ptr|offset|start|begin|split|bound|^jc$|cumul|first", re.IGNORECASE)
_COUNTS = re.compile(r"count|len|^n_?|num|size|sizes", re.IGNORECASE)
_IN_MATLAB = "#refs#"
"""Group in which MATLAB keeps the values of cells and structures that others refer to."""
KEYED = "arrays beside each other, a sample each: write them as one array, or each in its own group"
_OF_PYTABLES = re.compile("(^|/)_i_[^/]+/")
_PROBLEMS = {
    "reference": (
        "it holds references to places in this file, which are not followed: store the values "
        "that they lead to"
    ),
    "other": "it cannot become a tensor",
}
"""By the kind of an array, why it cannot train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What one array is for.

    Attributes:
        path: of it; or a pattern of groups.
        keys: that a field of it needs beside its path.
        samples: that it has, as such a field; 0: it is none.
        role: what it is in place of a field, in words; empty if it may be one.
        obstacle: why it cannot be one; empty if it can.
        is_wanted: whether it is proposed: what tells samples apart, such as an identifier, is not.
        num_bytes: of its values.
        source: groups that its rows are in, which only fields of the same can be joined with.
    """

    path: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 0
    role: str = ""
    obstacle: str = ""
    is_wanted: bool = True
    num_bytes: int = 0
    source: str = ""


@dataclass(frozen=True, slots=True)
class FieldSet:
    """Fields that can train together.

    Attributes:
        samples: of each.
        uses: at least one.
    """

    samples: int
    uses: tuple[Use, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        return sum(use.num_bytes for use in self.uses)

    @property
    def needs_keys(self) -> bool:
        """Whether the arrays are no fields as they stand."""
        return any(use.keys or ANY in use.path for use in self.uses)


def with_members(items: Sequence[Item]) -> Iterator[Item]:
    """Yield arrays, and the members of each behind it."""
    for item in items:
        yield item
        yield from item.members


def uses_of(items: Sequence[Item]) -> dict[str, Use]:
    """Return what each array and member is for, by path."""
    is_matlab = any(item.matlab for item in items)
    times = {
        item.path.rpartition("/")[2]
        for item in items
        if item.is_coordinate and any(note.endswith("calendar") for note in item.notes)
    }
    lengths = _lengths_in(items)
    found = {}
    for item in items:
        if item.type == "link":
            continue
        found[item.path] = _use_of(item, lengths, times, is_matlab=is_matlab)
        for member in item.members:
            use = _use_of(member, lengths, times, is_matlab=False)
            is_part = item.kind == "complex pair" and bool(found[item.path].keys)
            found[member.path] = replace(use, is_wanted=use.is_wanted and not is_part)
    for key, array, _ in set(lengths.values()):
        values = listed([path for path, each in lengths.items() if each[1] == array])
        what = "where samples begin in" if key == "offsets" else "the lengths of samples in"
        found[array] = Use(path=array, role=f"{key}: {what} {values}")
    return found


def sets_of(uses: Mapping[str, Use]) -> list[FieldSet]:
    """Return what can train together, most bytes first.

    Links, and what tells samples apart, are in it only where there is nothing else.
    """
    able = [use for use in uses.values() if use.samples and not use.obstacle and not use.role]
    found: dict[tuple[str, int], list[Use]] = {}
    for use in [use for use in able if use.is_wanted] or able:
        found.setdefault((use.source, use.samples), []).append(use)
    sets = [FieldSet(samples, tuple(each)) for (_, samples), each in found.items()]
    return sorted(sets, key=lambda each: -each.num_bytes)


def stem_of(path: str) -> str:
    """Return the part of a pattern that names groups, up to its last star."""
    parts = path.split("/")
    wild = [number for number, part in enumerate(parts) if ANY in part]
    return "/".join(parts[: wild[-1] + 1]) if wild else ""


def _lengths_in(items: Sequence[Item]) -> dict[str, tuple[str, str, int]]:
    """Return by array of values which key names what array of lengths, and how many samples."""
    rows = [item for item in items if item.peek.total is not None and item.count == 1]
    found: dict[str, tuple[str, str, int]] = {}
    for values in items:
        fits = [each for each in rows if _may_tell(each, values)]
        for each in sorted(fits, key=lambda each: (-_likeness(each.path, values.path), each.path)):
            key, samples = _key_and_samples(each, values)
            if key and values.path not in found and each.path not in found:
                found[values.path] = (key, each.path, samples)
    return found


def _may_tell(lengths: Item, values: Item) -> bool:
    is_apart = lengths.path != values.path and not (lengths.is_coordinate or values.is_coordinate)
    has_rows = bool(values.shape) and values.kind == "number" and not values.obstacle
    beside = lengths.path.rpartition("/")[0] in ("", values.path.rpartition("/")[0])
    return is_apart and has_rows and beside and values.count == 1


def _likeness(one: str, other: str) -> int:
    """Return how many letters two names begin with in common."""
    first, second = one.rpartition("/")[2], other.rpartition("/")[2]
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 99)


def _key_and_samples(lengths: Item, values: Item) -> tuple[str, int]:
    """Return how numbers in a row may tell samples of values apart; an empty key: they do not."""
    peek, count = lengths.peek, lengths.rows
    rows = values.rows
    name = lengths.path.rpartition("/")[2]
    if peek.first == 0 and peek.ascends and peek.last == rows and 2 <= count != rows + 1:
        return "offsets", count - 1
    own = values.path.rpartition("/")[2]
    is_named = own in name and _OFFSETS.search(name) is not None
    if is_named and peek.first == 0 and peek.ascends and (peek.last or 0) < rows and count < rows:
        return "offsets", count
    if _COUNTS.search(name) and peek.total == rows and count < rows:
        return "counts", count
    return "", 0


def _use_of(
    item: Item,
    lengths: Mapping[str, tuple[str, str, int]],
    times: set[str],
    *,
    is_matlab: bool,
) -> Use:
    use = Use(path=item.path, num_bytes=item.num_bytes)
    if item.obstacle:
        return replace(use, obstacle=item.obstacle)
    if role := _role_of(item, is_matlab=is_matlab):
        return replace(use, role=role)
    if problem := _PROBLEMS.get(item.kind) or _problem_of(item):
        return replace(use, obstacle=problem)
    keys, is_wanted = _keys_of(item)
    axis = _axis_of(item, times, is_matlab=is_matlab)
    samples = (item.shape or (0,))[axis]
    if axis:
        keys = {"axis": axis, **keys}
    if item.path in lengths:
        key, array, samples = lengths[item.path]
        is_image = item.peek.image and len(item.shape or ()) == 1
        keys = {key: array, **({"image": PIXELS} if is_image else {"batch": _batch(item)})}
    if item.count > 1 and (keys or not item.is_uniform):
        what = f"would need {', '.join(keys)}" if keys else "of another shape in each"
        return replace(use, obstacle=f"in groups that hold the same, and {what}")
    return replace(
        use,
        keys=keys,
        samples=item.rows if item.count > 1 else samples,
        is_wanted=is_wanted and not item.leads_to,
        source=stem_of(item.path) if item.count > 1 else "",
    )


def _role_of(item: Item, *, is_matlab: bool) -> str:
    roles = (
        (item.is_coordinate, "coordinate"),
        (item.kind == "compound", "a table: name its members"),
        (item.matlab == "char", "letters of MATLAB, as numbers"),
        (item.is_empty_in_matlab, "the shape of an empty array of MATLAB"),
        (is_matlab and item.path.startswith(_IN_MATLAB), "what references of MATLAB lead to"),
        (_OF_PYTABLES.search(item.path) is not None, "an index of PyTables"),
    )
    return next((role for has_it, role in roles if has_it), "")


def _problem_of(item: Item) -> str:
    if item.is_keyed:
        return KEYED
    return "" if item.dtype is not None else "it cannot become a tensor"


def _keys_of(item: Item) -> tuple[dict[str, Any], bool]:
    """Return which keys the values of an array need, and whether it is proposed to train on it."""
    assert item.dtype is not None
    base = item.dtype.base
    if item.kind == "text":
        return _keys_of_texts(item)
    if item.kind == "sequence":
        return ({"image": PIXELS} if item.peek.image else {"batch": "pad"}), True
    if item.kind in ("opaque", "odd number"):
        return {"dtype": "bytes" if item.kind == "opaque" else "int64"}, True
    if item.kind == "complex pair":
        return _keys_of_pair(base)
    if base.newbyteorder("=").name not in SUPPORTED_DTYPES:
        return {"dtype": "int64" if base.kind in "mM" else "float64"}, True
    return ({"decode": "none"} if item.is_undecodable else {}), True


def _keys_of_pair(base: np.dtype[Any]) -> tuple[dict[str, Any], bool]:
    real, imaginary = (base[name] for name in base.names or ())
    is_pair = real == imaginary and real.kind == "f" and real.itemsize in (4, 8)
    return ({"dtype": f"complex{16 * real.itemsize}"}, True) if is_pair else ({}, False)


def _keys_of_texts(item: Item) -> tuple[dict[str, Any], bool]:
    peek = item.peek
    assert item.dtype is not None
    if peek.longest <= 1 and len(item.shape or ()) > 1:  # as netCDF's classic texts are stored
        return {"dtype": "bytes"}, False
    if 0 < peek.texts <= peek.read // 2:
        return {"classes": "sorted"}, True
    width = peek.longest if item.dtype.base.hasobject else item.dtype.base.itemsize
    return {"dtype": f"S{max(1, width)}"}, False


def _axis_of(item: Item, times: set[str], *, is_matlab: bool) -> int:
    """Return the axis that counts samples: that of time, and in MATLAB's files the last one."""
    axes = [number for number, name in enumerate(item.axes) if name in times]
    if axes:
        return axes[0]
    return len(item.shape or (0,)) - 1 if is_matlab and item.matlab else 0


def _batch(item: Item) -> str:
    return "pad" if len(item.shape or ()) == 1 else "concat"
