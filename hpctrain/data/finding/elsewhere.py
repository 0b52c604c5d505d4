"""Values that an HDF5 file takes from others: by links, virtual datasets, external storage."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import h5py

from hpctrain.data.finding.links import require_files_behind
from hpctrain.data.finding.walking import Budget, identity
from hpctrain.data.storage import HDF5_FAILURES, open_hdf5_file
from hpctrain.errors import DatasetError


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
