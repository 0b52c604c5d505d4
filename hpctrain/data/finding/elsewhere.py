"""Values that an HDF5 file takes from others: by links, virtual datasets, external storage."""

from __future__ import annotations

import math
from pathlib import Path

import h5py

from hpctrain.data.storage import HDF5_FAILURES
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
    folder = Path(own).parent
    if dataset.is_virtual:
        found += require_sources(dataset)
    found += [str(folder / name) for name, _, _ in dataset.external or ()]
    return found


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
        with h5py.File(path, "r", locking=False) as file:
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
