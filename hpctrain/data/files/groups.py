"""Groups of a file that hold the same: an episode each, or a sample, such as `data/demo_*/actions`.

To everything that reads and orders, each of them is a shard: rows over groups, one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import h5py

from hpctrain.data.dataset import Field, Shard
from hpctrain.data.files.contents import Contents, look_into
from hpctrain.data.files.walking import MOST_OBJECTS, require_files_behind
from hpctrain.data.forms import Wish
from hpctrain.errors import DatasetError
from hpctrain.utils.text import listed


def is_pattern(name: str) -> bool:
    """Tell whether a path stands for many, by a star in the name of a group on its way.

    An array may have any name, also one with a star in it.
    """
    return "*" in name.strip("/").rpartition("/")[0]


def stem(pattern: str) -> str:
    """Return the part of a pattern that names groups, empty if it is none: up to the last star."""
    parts = pattern.split("/")
    wild = [number for number, part in enumerate(parts[:-1]) if "*" in part]
    return "/".join(parts[: wild[-1] + 1]) if wild else ""


def look_into_groups(
    path: str, patterns: Sequence[str], wishes: Mapping[str, Wish] | None = None
) -> Contents:
    """Return what HDF5 says of all arrays of a file whose names fit.

    Args:
        path: of the file.
        patterns: of names.
        wishes: what is delivered of the arrays of a pattern, where that is not what is stored.

    Raises:
        DatasetError: if it cannot be read, or none fits.
    """
    pattern_of: dict[str, str] = {}
    wish_of: dict[str, Wish] = {}

    def named(file: h5py.File) -> list[str]:
        found = {each: list(_fitting(file, each)) for each in patterns}
        for each, wish in (wishes or {}).items():
            pattern_of.update(dict.fromkeys(found[each], each))
            wish_of.update((name, dataclasses.replace(wish, path=name)) for name in found[each])
        names = [name for each in patterns for name in found[each]]
        if len(names) > MOST_OBJECTS:
            raise DatasetError(
                f"{path}: {len(names):,} arrays fit {listed(list(patterns))}, and at most "
                f"{MOST_OBJECTS:,} are taken: cut the file, or write its rows one after the other "
                "with `python -m hpctrain data pack`"
            )
        return names

    about = look_into(path, named, wish_of)
    arrays = dict(about.arrays)
    for name, array in about.arrays.items():
        if array.form is not None:  # in all groups the same, called by the pattern
            form = dataclasses.replace(array.form, path=pattern_of[name])
            arrays[name] = dataclasses.replace(array, form=form)
    return dataclasses.replace(about, arrays=arrays)


def objects_fitting(file: h5py.File, pattern: str) -> Iterator[str]:
    """Yield the names of the groups and datasets of a file that fit a pattern; "" is the file."""
    if not pattern:
        yield ""
        return
    parent, _, last = pattern.rpartition("/")
    for name in objects_fitting(file, parent):
        group = file[name] if name else file
        if not isinstance(group, h5py.Group):
            continue
        keys = [key for key in group if isinstance(key, str)] if "*" in last else [last]
        for key in keys:
            if _fits_part(key, last):
                require_files_behind(group, key)
                if isinstance(group.get(key), h5py.Group | h5py.Dataset):
                    yield f"{name}/{key}" if name else key


def _fitting(group: h5py.Group, pattern: str) -> Iterator[str]:
    """Yield the names of the datasets below a group that fit a pattern."""
    head, _, rest = pattern.partition("/")
    keys: Iterable[str] = [head]
    if rest and "*" in head:
        keys = [key for key in group if isinstance(key, str) and _fits_part(key, head)]
    for key in keys:
        require_files_behind(group, key)
        found = group.get(key)
        if isinstance(found, h5py.Group) and rest:
            yield from (f"{key}/{name}" for name in _fitting(found, rest))
        elif isinstance(found, h5py.Dataset) and not rest:
            yield key


def in_groups(
    file: Contents, patterns: Sequence[str], axis: int, key: Callable[[str], Any]
) -> list[tuple[str, Callable[[], tuple[Shard, dict[str, Field]]]]]:
    """Return each group of a file by name, and what makes a shard of it.

    Its fields are called by their patterns.

    Args:
        file: with the arrays of all groups.
        patterns: all of one stem.
        axis: of the arrays, which counts the rows.
        key: sorts names of groups.

    Raises:
        DatasetError: if there is no group, or one lacks an array that others have.
    """
    depth = stem(patterns[0]).count("/") + 1
    groups: dict[str, dict[str, Any]] = {}
    for name, array in file.arrays.items():
        parts = name.split("/")
        for pattern in patterns:
            if len(parts) == pattern.count("/") + 1 and _fits(parts, pattern):
                groups.setdefault("/".join(parts[:depth]), {})[pattern] = array
    if not groups:
        raise DatasetError(f"{file.path}: nothing in this file fits {listed(list(patterns))}")
    made: list[tuple[str, Callable[[], tuple[Shard, dict[str, Field]]]]] = []
    for group in sorted(groups, key=key):
        arrays = groups[group]
        if missing := [pattern for pattern in patterns if pattern not in arrays]:
            raise DatasetError(
                f'{file.path}: "{group}" has {listed(list(arrays))}, but nothing for '
                f"{listed(missing)}: name arrays that all groups have"
            )
        own = dataclasses.replace(file, arrays=arrays)
        look = functools.partial(_as_shard, own, group, patterns, axis)
        made.append((f"{file.path}:{group}", look))
    return made


def _as_shard(
    file: Contents, group: str, patterns: Sequence[str], axis: int
) -> tuple[Shard, dict[str, Field]]:
    shard, fields = file.shard(patterns, axis)
    return dataclasses.replace(shard, group=group), fields


def _fits(parts: Sequence[str], pattern: str) -> bool:
    *groups, last = pattern.split("/")
    return parts[-1] == last and all(map(_fits_part, parts, groups))


def _fits_part(name: str, pattern: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name, re.DOTALL) is not None
