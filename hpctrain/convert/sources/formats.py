"""The kinds of files that hold arrays, each a module of the same few functions.

A further kind is one module more, and one entry in FORMATS.
"""

from __future__ import annotations

from typing import Any, Protocol

from hpctrain.convert.sources import arrays, columns, netcdf3, zarr_stores
from hpctrain.convert.sources.source import ArrayFacts


class Format(Protocol):
    """One kind of files, as their module has it."""

    KNOWN: str
    """How files of this kind are called, for a message."""

    def holds(self, path: str) -> bool:
        """Tell whether this is such a file, or a folder that is one; at most a look inside."""
        ...

    def arrays_in(self, path: str, key: str | None = None) -> dict[str, ArrayFacts]:
        """Return the arrays of a file, by the names that they have in it.

        Args:
            path: of the file.
            key: the only one that is wanted, others may be left out; None: all.

        Raises:
            DatasetError: if it cannot be read, or a library is missing.
        """
        ...

    def open_array(self, path: str, key: str) -> Any:
        """Return an array of a file, which has a shape, an itemsize, and slices.

        Raises:
            DatasetError: if it cannot be read.
        """
        ...

    def close_array(self, array: Any) -> None:
        """Close what `open_array` has opened."""
        ...


FORMATS: tuple[Format, ...] = (zarr_stores, netcdf3, columns, arrays)
"""Those that look inside come before those that go by the name alone."""


def format_of(path: str) -> Format | None:
    """Return which kind a file is of; None: of none that is known."""
    return next((each for each in FORMATS if each.holds(path)), None)


def known() -> str:
    """Return what there is, for a message."""
    return ", ".join(each.KNOWN for each in reversed(FORMATS))
