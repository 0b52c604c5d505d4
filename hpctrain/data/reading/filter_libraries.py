"""Compiled functions that decode filters: those of HDF5 as h5py has loaded it, and of hdf5plugin.

ctypes calls them without Python's lock, so that threads decompress side by side.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py._objects import phil

from hpctrain.data.arrays import Bytes
from hpctrain.data.files.storage import Filter, load_plugins
from hpctrain.data.reading.damage import UndecodableError, too_much

DONT_FILTER_PARTIAL_CHUNKS = 0x0002
"""Source: H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS of H5Dpublic.h."""
FIRST_WITH_CHUNK_OPTIONS = (1, 10)
"""Source: H5Pset_chunk_opts: "Since: 1.10.0"; older libraries cannot open such files."""
_REVERSE = 0x0100
"""Source: H5Z_FLAG_REVERSE of H5Zpublic.h: decode."""
TOO_LITTLE_ROOM = 2**64 - 70
"""Source: ZSTD_error_dstSize_tooSmall of zstd_errors.h: what is returned is its negative."""
LEAST_LONG_COPY = 2**18
"""Bytes from which on a copy takes longer than to let go of Python's lock for it."""

Call = Callable[[Bytes], Bytes]
"""From the bytes of a chunk to those before the filter, in memory of the filter's own."""

# Calls so short that to let go of Python's lock for them, and to wait for it, takes longer.
_short = ctypes.PyDLL(None)
_malloc, _free, _copy = _short.malloc, _short.free, _short.memcpy
_malloc.restype, _malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_free.restype, _free.argtypes = None, [ctypes.c_void_p]
_copy.restype = ctypes.c_void_p
_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


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
    """Return whether chunks that reach over the edge of the data went through no filter.

    Neither the mask of the filters that a chunk skipped nor its size says so.

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
    """Return a function of HDF5 that does not run beside others: it keeps failures in one place."""

    def call(*arguments: Any) -> int:
        with phil:
            return function(*arguments)

    return call


class _Memory:
    """Memory of malloc, as long as an array of numpy refers to it."""

    def __init__(self, address: int, size: int) -> None:
        self._address = address
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (size,),
            "data": (address, False),
        }

    def __del__(self) -> None:
        _free(self._address)


def calling(function: Callable[..., int], each: Filter) -> Call:
    """Return what calls the function of a filter as HDF5 does."""
    values = (ctypes.c_uint * max(1, len(each.values)))(*each.values)
    return functools.partial(_call, function, values, len(each.values))


def _call(
    function: Callable[..., int],
    values: ctypes.Array[ctypes.c_uint],
    count: int,
    raw: Bytes,
) -> Bytes:
    memory = ctypes.c_void_p(_malloc(len(raw) or 1))
    if memory.value is None:
        raise MemoryError
    copy = _copy if len(raw) < LEAST_LONG_COPY else ctypes.memmove
    copy(memory, raw.ctypes.data, len(raw))
    size_of_memory = ctypes.c_size_t(len(raw))
    size = function(
        _REVERSE, count, values, len(raw), ctypes.byref(size_of_memory), ctypes.byref(memory)
    )
    if size == 0 or memory.value is None:
        _free(memory)
        raise UndecodableError("the filter cannot decode it")
    return np.asarray(_Memory(memory.value, size))


class ZstdFrames:
    """Frames of Zstd, several of which are decoded in one call where they follow each other."""

    def __init__(self, library: ctypes.CDLL) -> None:
        # Source: zstd.h, ZSTD_decompress(dst, dstCapacity, src, compressedSize): "compressedSize:
        # must be the exact size of some number of compressed and/or skippable frames".
        self._decompress = library.ZSTD_decompress
        self._decompress.restype = ctypes.c_size_t
        self._decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t] * 2
        # Source: ZSTD_getFrameContentSize(src, srcSize): the two largest numbers mean that it is
        # not known, and that this is no frame.
        self._content_size = ctypes.PyDLL(library._name).ZSTD_getFrameContentSize
        self._content_size.restype = ctypes.c_ulonglong
        self._content_size.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def are_of(self, size: int, raw: Bytes, sizes: Sequence[int]) -> bool:
        """Return whether each chunk begins a frame that becomes so many bytes.

        Decoded together they would else make up for each other's sizes.
        """
        address = raw.ctypes.data
        for each in sizes:
            if self._content_size(address, each) != size:
                return False
            address += each
        return True

    def decode(self, raw: Bytes, room: Bytes) -> int:
        """Decode frames that follow each other, and return how many bytes they became.

        Raises:
            DamagedChunkError: if there is too little room.
            UndecodableError: if they are damaged otherwise.
        """
        size = int(self._decompress(room.ctypes.data, room.nbytes, raw.ctypes.data, raw.nbytes))
        if size == TOO_LITTLE_ROOM:
            raise too_much(room)
        if size > room.nbytes:
            raise UndecodableError("not what Zstd has written")
        return size


@functools.cache
def zstd_frames() -> ZstdFrames | None:
    """Return what decodes frames that follow each other; None if hdf5plugin has no such thing."""
    library = plugin_library("zstd")
    names = ("ZSTD_decompress", "ZSTD_getFrameContentSize")
    if library is None or not all(hasattr(library, name) for name in names):
        return None
    return ZstdFrames(library)
