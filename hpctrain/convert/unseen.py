"""What a tool does not look at, though it lies in the same files or beside them: it is named."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import h5py

from hpctrain.data.dataset import Dataset
from hpctrain.data.files.contents import is_bare_dimension
from hpctrain.data.files.discovery import find_files
from hpctrain.data.files.form_opening import find_stored
from hpctrain.data.files.index import FURTHER_SUFFIXES, HDF5_SUFFIXES
from hpctrain.data.files.storage import HDF5_FAILURES, dtype_of, open_hdf5_file
from hpctrain.data.files.walking import Link, identity, objects_in, require_files_behind
from hpctrain.errors import DatasetError
from hpctrain.utils.files import require_regular
from hpctrain.utils.text import listed, plural, printable

MOST_LISTED = 10
"""Names that are told."""
MOST_ENTRIES = 100_000
"""Of a folder, and of those in it, that are looked at."""
_AWAY = " (a link to elsewhere)"
LEAST_ALIKE = 3
"""So many names that differ in numbers only are told as one."""


def unseen_arrays(path: str, seen: Collection[str]) -> set[str]:
    """Return the arrays of a file that are not among these, members of compound types apart.

    Args:
        path: of the file.
        seen: paths of arrays in it, or of members of them.

    Raises:
        DatasetError: if the file cannot be read.
    """
    found: set[str] = set()
    try:
        with open_hdf5_file(path) as file:
            whole, members = _looked_at(file, seen)
            try:
                for name, item in objects_in(file):
                    text = name if isinstance(name, str) else name.decode(errors="backslashreplace")
                    if isinstance(item, Link):
                        if text not in seen and _leads_away(item):
                            found.add(text + _AWAY)
                    elif isinstance(item, h5py.Dataset) and item.shape is not None:
                        own = identity(item)
                        if own not in whole and not is_bare_dimension(item):
                            found |= set(_rest_of(text, item, members.get(own, set())))
            except DatasetError as error:  # more objects than anybody looks at
                found.add(str(error).removeprefix(f"{path}: "))
    except HDF5_FAILURES as error:
        raise DatasetError(f"{path}: HDF5 cannot read this file: {error}") from error
    return found


def unseen_files(pattern: str) -> list[str]:
    """Return the HDF5 files of a folder that belong to no dataset that it is, by relative paths.

    Those in folders of it do not, and those with other suffixes, where there are files of the
    usual ones.
    """
    folder = Path(pattern)
    if not folder.is_dir():
        return []
    seen = {Path(path) for path in find_files(pattern)}
    found = []
    for number, path in enumerate(_entries(folder)):
        if number >= MOST_ENTRIES:
            break
        if path not in seen and (path.name.endswith(HDF5_SUFFIXES) or _is_other_hdf5(path)):
            found.append(str(path.relative_to(folder)))
    return found


def not_looked_at(
    arrays: Iterable[str], files: Collection[str], *, has_checksums: bool = False
) -> str:
    """Return it in words; empty: all was looked at.

    Args:
        arrays: of files that were looked at.
        files: that were not.
        has_checksums: whether all bytes of the former were compared with their checksums.
    """
    arrays = set(arrays)
    compared = {each for each in arrays if has_checksums and not each.endswith(_AWAY)}
    said = [_listed(_starred(arrays - compared))] if arrays - compared else []
    if files:
        said.append(f"{plural(len(files), 'file')}: {_listed(sorted(files))}")
    parts = [f"not looked at: {'; '.join(said)}"] if said else []
    if compared:
        parts.append(f"verified by the checksums of files alone: {_listed(_starred(compared))}")
    return "; ".join(parts)


def _listed(names: Sequence[str]) -> str:
    return listed([printable(name) for name in names], MOST_LISTED)


def not_looked_at_in(dataset: Dataset, pattern: str, left_out: Iterable[str] = ()) -> str:
    """Return what lies in the first file of a dataset, or beside its files, and is not of it.

    Args:
        dataset: what is looked at.
        pattern: that it was opened by.
        left_out: fields that are not looked at either.

    Raises:
        DatasetError: if the file cannot be read.
    """
    path = dataset.shards[0].path
    own = [shard for shard in dataset.shards if shard.path == path]
    seen = {shard.inside(name) for shard in own for name in dataset.fields}
    return not_looked_at({*unseen_arrays(path, seen), *left_out}, unseen_files(pattern))


def _looked_at(
    file: h5py.File, seen: Iterable[str]
) -> tuple[set[tuple[int, int]], dict[tuple[int, int], set[str]]]:
    """Return which arrays are looked at as a whole, and which members of others."""
    whole: set[tuple[int, int]] = set()
    members: dict[tuple[int, int], set[str]] = {}
    for name in seen:
        dataset, inside = find_stored(file, name)
        if dataset is None:
            continue
        if inside:
            members.setdefault(identity(dataset), set()).add(inside[0])
        else:
            whole.add(identity(dataset))
    return whole, members


def _rest_of(path: str, dataset: h5py.Dataset, members: set[str]) -> Iterator[str]:
    """Yield an array, or those of its members that are not looked at."""
    if not members:
        yield path
        return
    yield from (f"{path}/{each}" for each in dtype_of(dataset).names or () if each not in members)


def _leads_away(link: Link) -> bool:
    """Tell whether a link leads out of its file, or to nothing: all else has a path of its own."""
    try:
        require_files_behind(link.group, link.name.decode(errors="surrogateescape"))
        target = link.group.get(link.name)
        return target is None or target.file.filename != link.group.file.filename
    except HDF5_FAILURES:
        return True


def _entries(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _is_other_hdf5(path: Path) -> bool:
    if not path.name.endswith(FURTHER_SUFFIXES):
        return False
    try:
        require_regular(path)
    except OSError:
        return False
    return bool(h5py.is_hdf5(path))


def _starred(names: Iterable[str]) -> list[str]:
    """Return names in their order, those that differ in numbers only as one."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names):
        alike.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return [
        told
        for pattern, each in alike.items()
        for told in ([f"{len(each):,} of {pattern}"] if len(each) >= LEAST_ALIKE else each)
    ]
