"""The objects of an HDF5 file: it may hold millions, or nest them as deep as it likes.

HDF5's own visit recurses in C, a level of the stack for each level of groups, and builds the path
of each object from the root. Here both are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import h5py

from hpctrain.errors import DatasetError

MOST_OBJECTS = 250_000
"""That are looked at, to find out what a file holds. Whoever names the fields needs no look."""
DEEPEST = 100
"""Levels of groups."""


class Link(NamedTuple):
    """An entry of a group that is no object but leads to one: a soft, external or unknown link.

    Attributes:
        group: that it is in.
        name: in the group.
    """

    group: h5py.Group
    name: bytes


def objects_in(
    file: h5py.File,
) -> Iterator[tuple[str | bytes, h5py.Group | h5py.Dataset | Link]]:
    """Yield each group and dataset of a file once, with its first path, in the order of names.

    Links are yielded and not followed. A path is bytes where it is not UTF-8.

    Raises:
        DatasetError: if there are more than anybody looks at.
    """
    budget = Budget(file.filename)
    seen = {identity(file)}
    waiting = [(b"", file.id, _names(file, budget))]
    while waiting:
        prefix, group, names = waiting[-1]
        if not names:
            waiting.pop()
            continue
        raw = names.pop()
        path = prefix + raw
        if group.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
            yield _text(path), Link(h5py.Group(group), raw)
            continue
        opened = h5py.h5o.open(group, raw)
        if not isinstance(opened, h5py.h5g.GroupID | h5py.h5d.DatasetID):
            continue  # a named type
        is_group = isinstance(opened, h5py.h5g.GroupID)
        item = h5py.Group(opened) if is_group else h5py.Dataset(opened)
        known_as = identity(item)
        if known_as in seen:
            continue
        seen.add(known_as)
        yield _text(path), item
        if is_group:
            budget.require_depth(len(waiting))
            waiting.append((path + b"/", opened, _names(item, budget)))


class Budget:
    """How much of a file may still be looked at."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._left = MOST_OBJECTS

    def take(self, count: int) -> None:
        """Note that so many objects are about to be looked at.

        Raises:
            DatasetError: if that is too many.
        """
        self._left -= count
        if self._left < 0:
            raise DatasetError(
                f"{self._place}: this file holds more than {MOST_OBJECTS:,} objects, and is not "
                "searched for those with rows: name the fields that are wanted"
            )

    def require_depth(self, depth: int) -> None:
        """Check how deep a group lies.

        Raises:
            DatasetError: if no file of data nests like that.
        """
        if depth > DEEPEST:
            raise DatasetError(
                f"{self._place}: the groups of this file are nested more than {DEEPEST} deep, and "
                "it is not searched any further: name the fields that are wanted"
            )


def identity(item: h5py.Group | h5py.Dataset) -> tuple[int, int]:
    """Return what an object of HDF5 has whatever path leads to it."""
    about = h5py.h5o.get_info(item.id)
    return about.fileno, about.addr


def _names(group: h5py.Group, budget: Budget) -> list[bytes]:
    """Return the names in a group, the first at the end."""
    budget.take(len(group))
    return sorted(group.id, reverse=True)


def _text(path: bytes) -> str | bytes:
    try:
        return path.decode("utf-8")
    except UnicodeDecodeError:
        return path
