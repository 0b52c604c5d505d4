"""The objects of an HDF5 file, its links, and the other files that it takes values from.

A file may hold millions of objects, or nest them as deep as it likes. HDF5's own visit recurses in
C, a level of the stack for each level of groups, and builds the path of each object from the root.
Here both are bounded.

HDF5 follows a link to a pipe and waits for ever, and makes values up where another file is missing:
so links, and the files that an array takes values from, are looked at before it is asked.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from hpctrain.data.files.storage import HDF5_FAILURES, open_hdf5_file
from hpctrain.errors import DatasetError
from hpctrain.utils.files import require_regular

MOST_OBJECTS = 250_000
"""That are looked at, to find out what a file holds. Whoever names the fields needs no look."""
DEEPEST = 100
"""Levels of groups."""
MOST_LINKS = 16
"""On the way to a dataset; HDF5 follows as many by default."""


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


def require_files_behind(group: h5py.Group, path: str, most: int = MOST_LINKS) -> None:
    """Check that what the links of a path name in other files are files.

    What is not there does not concern this function.

    Raises:
        OSError: if something else is there, such as a pipe, or the links lead on and on.
    """
    if most < 0:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    here: h5py.Group = group.file["/"] if path.startswith("/") else group
    parts = [part for part in _raw(path).split(b"/") if part not in (b"", b".")]
    for index, part in enumerate(parts):
        links = here.id.links
        if not links.exists(part):
            return
        kind = links.get_info(part).type
        if kind == h5py.h5l.TYPE_HARD:
            opened = h5py.h5o.open(here.id, part)
            if not isinstance(opened, h5py.h5g.GroupID):
                return
            here = h5py.Group(opened)
            continue
        rest = b"/".join(parts[index + 1 :])
        if kind == h5py.h5l.TYPE_SOFT:
            require_files_behind(here, _as_str(links.get_val(part) + b"/" + rest), most - 1)
        elif kind == h5py.h5l.TYPE_EXTERNAL:
            name, inside = links.get_val(part)
            for candidate in _candidates(_as_str(name), here.file.filename):
                require_regular(candidate)
                with open_hdf5_file(candidate) as other:
                    require_files_behind(other, _as_str(inside + b"/" + rest), most - 1)
        return


def _candidates(name: str, own: str) -> Iterator[Path]:
    """Yield what is there of all that HDF5 may open for the name of another file.

    Source: H5Lcreate_external.
    """
    prefixes = os.environ.get("HDF5_EXT_PREFIX", "").split(":")
    folder = Path(own).parent
    for place in (Path(name), *(Path(each, name) for each in prefixes if each), folder / name):
        if place.exists():
            yield place
    beside = folder / Path(name).name
    if beside.exists():
        yield beside


def _raw(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


def _as_str(raw: bytes) -> str:
    return raw.decode("utf-8", errors="surrogateescape")


def is_in(dataset: h5py.Dataset, path: str) -> bool:
    """Tell whether a dataset is in the file of this path itself, and not behind a link in it."""
    return Path(dataset.file.filename) == Path(path)


def other_files(dataset: h5py.Dataset, path: str) -> list[str]:
    """Return the other files that the values of a dataset come from.

    Raises:
        DatasetError: if HDF5 would give fill values for some of them.
    """
    own = dataset.file.filename
    found = [] if is_in(dataset, path) else [own]
    if dataset.is_virtual:
        found += require_sources(dataset)
    if dataset.external:
        found += require_external(dataset)
    return found


def require_external(dataset: h5py.Dataset) -> list[str]:
    """Check that the files of external storage are as long as they are to be.

    HDF5 gives zeros for what is not in them.

    Returns:
        The files, where HDF5 looks for them: from the current directory.

    Raises:
        DatasetError: naming the first that is missing or too short.
    """
    own = dataset.file.filename
    # Source: H5Pset_efile_prefix, the variable that stands for it, and what ${ORIGIN} in it means.
    prefix = os.environ.get("HDF5_EXTFILE_PREFIX", "").replace("${ORIGIN}", str(Path(own).parent))
    left = math.prod(dataset.shape) * dataset.dtype.itemsize
    found = []
    for name, offset, size in dataset.external:
        path = Path(prefix, name)
        used = min(size, left)
        left -= used
        there = path.stat().st_size if path.is_file() else None
        if there is None or there < offset + used:
            problem = "is missing" if there is None else f"ends at byte {there}"
            raise DatasetError(
                f'{own}: field "{dataset.name}" is stored in {path.absolute()} up to byte '
                f"{offset + used}, and that file {problem}; HDF5 would give zeros in its place. "
                "Bring it back, or start where its path leads to it"
            )
        found.append(str(path.absolute()))
    return list(dict.fromkeys(found))


def behind_links(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Return the HDF5 datasets of a file that are found by soft and external links only.

    Each once, by the first of its paths, however many links and circles of them lead to it. Links
    to what is not there are passed over.
    """
    found: dict[str, h5py.Dataset] = {}
    budget = Budget(file.filename)
    seen = {identity(file)}
    # A group's own name would be its path in the file that it is in, so paths are kept here.
    waiting: list[tuple[str, h5py.Group]] = [("", file)]
    while waiting:
        prefix, group = waiting.pop(0)
        budget.take(len(group))
        budget.require_depth(prefix.count("/"))
        for name in group:
            item = _followed(group, name)
            if item is None or identity(item) in seen:
                continue
            seen.add(identity(item))
            if isinstance(item, h5py.Group):
                waiting.append((f"{prefix}{name}/", item))
            elif isinstance(item, h5py.Dataset):
                found[prefix + name] = item
    return found


def _followed(group: h5py.Group, name: str) -> Any:
    """Return what a link leads to, None if nothing is there."""
    try:
        require_files_behind(group, name)
        return group[name]
    except HDF5_FAILURES:
        return None


def require_sources(dataset: h5py.Dataset) -> list[str]:
    """Check that the sources of a virtual dataset are there: HDF5 gives fill values if not.

    Returns:
        The files, as far as they have names of their own and not a pattern.

    Raises:
        DatasetError: naming the first that is missing, or does not hold what it should.
    """
    own = dataset.file.filename
    folder = Path(own).parent
    found = []
    for virtual, name, inside, source in dataset.virtual_sources():
        if name == "." or "%" in name or "%" in inside:
            continue
        path = folder / name
        # Of a source that is taken whole HDF5 does not keep the shape, only how much is made of it.
        shape, values = source.shape, virtual.get_select_npoints()
        problem = _source_problem(path, inside, shape, values) if path.exists() else "is missing"
        if problem:
            raise DatasetError(
                f'{own}: field "{dataset.name}" is virtual, and its source {name} {problem}; HDF5 '
                "would give fill values in its place"
            )
        found.append(str(path))
    return list(dict.fromkeys(found))


def _source_problem(path: Path, name: str, shape: tuple[int, ...], values: int) -> str:
    """Return what is wrong with the source of a virtual dataset; empty if nothing is."""
    try:
        with open_hdf5_file(path) as file:
            require_files_behind(file, name)
            if name not in file:
                return f'has no "{name}"'
            found = file[name].shape
    except HDF5_FAILURES as error:
        return f"cannot be read ({error})"
    if not shape and math.prod(found) != values:
        return f'has a "{name}" of shape {found}, which is not {values} values'
    if shape and (len(found) != len(shape) or any(map(int.__lt__, found, shape))):
        return f'has a "{name}" of shape {found}, not {shape}'
    return ""
