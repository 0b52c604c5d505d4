"""Compiled functions that undo filters: those of HDF5 as h5py has loaded it, and of hdf5plugin.

ctypes calls them without Python's lock, so that threads decompress side by side.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
from h5py._objects import phil

from hpctrain.data.storage import load_plugins

DONT_FILTER_PARTIAL_CHUNKS = 0x0002
"""Source: H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS of H5Dpublic.h."""
FIRST_WITH_CHUNK_OPTIONS = (1, 10)
"""Source: H5Pset_chunk_opts: "Since: 1.10.0"; older libraries cannot open such files."""


class FilterClass(ctypes.Structure):
    """Source: H5Z_class2_t of H5Zdevelop.h, version 1, the interface of all filters."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("number", ctypes.c_int),
        ("encodes", ctypes.c_uint),
        ("decodes", ctypes.c_uint),
        ("name", ctypes.c_char_p),
        ("can_apply", ctypes.c_void_p),
        ("set_local", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
    )


FilterFunction = ctypes.CFUNCTYPE(
    ctypes.c_size_t,  # bytes that came out, 0 if it failed
    ctypes.c_uint,  # flags
    ctypes.c_size_t,  # number of the filter's values
    ctypes.POINTER(ctypes.c_uint),  # the filter's values
    ctypes.c_size_t,  # bytes that go in
    ctypes.POINTER(ctypes.c_size_t),  # bytes of the memory, may change
    ctypes.POINTER(ctypes.c_void_p),  # the memory, from malloc, may change
)


@functools.cache
def loaded_function(name: str) -> Any | None:
    """Return a function of the HDF5 that h5py has loaded, or of what HDF5 itself is linked to.

    None where it cannot be found, as in an h5py that holds HDF5 within itself.
    """
    # A handle of the extension finds what is in the libraries that it depends on, and in no other
    # HDF5 that a process may have loaded as well.
    with suppress(OSError, AttributeError):
        return getattr(ctypes.CDLL(h5py.h5z.__file__, use_errno=True), name)
    return None


@functools.cache
def hdf5_filter(name: str, number: int) -> Callable[..., int] | None:
    """Return the function of a filter that comes with HDF5. It is to be called under its lock."""
    found: FilterClass | None = None
    with suppress(OSError, ValueError):
        found = FilterClass.in_dll(ctypes.CDLL(h5py.h5z.__file__), name)
    if found is None or (found.version, found.number) != (1, number):
        return None
    return _locked(FilterFunction(found.function)) if found.decodes else None


@functools.cache
def plugin_filter(name: str) -> Callable[..., int] | None:
    """Return the function of a filter of hdf5plugin; None where it is not installed."""
    library = plugin_library(name)
    if library is None or not hasattr(library, "H5PLget_plugin_info"):
        return None
    ask = library.H5PLget_plugin_info
    ask.restype = ctypes.POINTER(FilterClass)
    about = ask().contents
    return FilterFunction(about.function) if about.version == 1 and about.decodes else None


@functools.cache
def plugin_library(name: str) -> ctypes.CDLL | None:
    """Return the library of a filter of hdf5plugin; None where it is not installed."""
    plugins = load_plugins()
    if plugins is None:
        return None
    # Importing the package has loaded and prepared these libraries: this finds them in memory.
    for path in Path(plugins.PLUGIN_PATH).glob(f"libh5{name}.*"):
        with suppress(OSError):
            return ctypes.CDLL(str(path))
    return None


def leaves_partial_chunks_unfiltered(properties: h5py.h5p.PropDCID) -> bool | None:
    """Tell whether chunks that reach over the edge of the data went through no filter.

    Neither the mask of the filters that a chunk skipped nor its size tells.

    Returns:
        None where the library cannot be asked.
    """
    ask = loaded_function("H5Pget_chunk_opts")
    if ask is None:
        return False if h5py.version.hdf5_version_tuple < FIRST_WITH_CHUNK_OPTIONS else None
    options = ctypes.c_uint()
    with phil:
        failed = ask(ctypes.c_int64(properties.id), ctypes.byref(options)) < 0
    return None if failed else bool(options.value & DONT_FILTER_PARTIAL_CHUNKS)


def _locked(function: Callable[..., int]) -> Callable[..., int]:
    """Return a function of HDF5 that does not run beside others: it tells failures in one place."""

    def call(*arguments: Any) -> int:
        with phil:
            return function(*arguments)

    return call
