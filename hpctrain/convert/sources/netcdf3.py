"""netCDF files of the classic formats, which are not HDF5: CDF-1, CDF-2 and CDF-5."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.convert.sources.source import ArrayFacts, kept_attributes, optional, reading
from hpctrain.errors import DatasetError

KNOWN = ".nc of netCDF-3"
_MAGIC = b"CDF"
_CDF5 = 5
"""Source: the fourth byte of a file; this version has 64-bit sizes, which scipy does not know."""


class _Variable:
    """One variable of a file that scipy has opened.

    Attributes:
        shape: of it.
        nbytes: of its values.
    """

    def __init__(self, file: Any, key: str) -> None:
        self.file = file
        self._values: Any = file.variables[key].data
        self.shape: tuple[int, ...] = self._values.shape
        self.nbytes: int = self._values.nbytes

    def __getitem__(self, selection: Any) -> Any:
        # A copy: the file cannot be closed while anything refers to its memory.
        return np.array(self._values[selection])

    def close(self) -> None:
        """Close the file, once nothing refers to the memory that it is mapped to."""
        self._values = None
        self.file.close()

    def __del__(self) -> None:
        """Close what nobody has: scipy would warn that its memory is referred to."""
        self.close()


def holds(path: str) -> bool:
    """Tell whether this is such a file, by how it begins."""
    return version(path) is not None


def version(path: str) -> int | None:
    """Return which of the classic formats a file has; None: it is something else."""
    if not Path(path).is_file():
        return None
    with suppress(OSError), Path(path).open("rb") as file:
        head = file.read(4)
        if head[:3] == _MAGIC and head[3:] in (b"\1", b"\2", b"\5"):
            return head[3]
    return None


def arrays_in(path: str, key: str | None = None) -> dict[str, ArrayFacts]:
    """Return the variables of a file, as `Format.arrays_in` does."""
    with reading(path):
        file = _open(path)
        try:
            facts = {
                name: _facts(name, variable)
                for name, variable in file.variables.items()
                if variable.shape
            }
        finally:
            file.close()
    if not facts:
        raise DatasetError(f"{path}: there is no variable with rows in this file")
    return facts


def open_array(path: str, key: str) -> Any:
    """Return a variable, as `Format.open_array` does."""
    with reading(f'{path}: field "{key}"'):
        file = _open(path)
        return file.variables[key] if version(path) == _CDF5 else _Variable(file, key)


def close_array(array: Any) -> None:
    """Close the file of a variable."""
    if isinstance(array, _Variable):
        array.close()
    else:
        array.group().close()


def _open(path: str) -> Any:
    if version(path) == _CDF5:
        netcdf = optional("netCDF4", "netcdf3", "CDF-5 files are")
        file = netcdf.Dataset(path)
        file.set_auto_maskandscale(False)
        return file
    scipy = optional("scipy.io", "netcdf3", "netCDF-3 files are")
    return scipy.netcdf_file(path, "r", mmap=True, maskandscale=False)


def _facts(name: str, variable: Any) -> ArrayFacts:
    if hasattr(variable, "ncattrs"):
        attributes = {each: variable.getncattr(each) for each in variable.ncattrs()}
        dtype = np.dtype(variable.dtype)
    else:
        attributes = dict(variable._attributes)  # scipy has no other way to list them
        dtype = variable.data.dtype
    texts = {
        each: value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        for each, value in attributes.items()
    }
    shape = tuple(int(size) for size in variable.shape)
    is_coordinate = tuple(variable.dimensions) == (name,)
    return ArrayFacts(shape, dtype, kept_attributes(texts), is_coordinate)
