"""What HDF5's filters did to a chunk, undone outside HDF5 and the lock that it holds.

gzip is zlib's own format; shuffle is undone by numpy. The filters of hdf5plugin are shared
libraries with one function each, which HDF5 calls and anybody may: ctypes does so without Python's
lock, so that threads decompress side by side.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from hpctrain.data.reading.pieces import Bytes
from hpctrain.data.storage import Filter, load_plugins

Decode = Callable[[Bytes, int], Bytes]
"""From the bytes of a chunk, and how many there will be, to those before the filter."""

DEFLATE, SHUFFLE = 1, 2
_LIBRARIES = {32001: "blosc", 32004: "lz4", 32008: "bshuf", 32015: "zstd", 32026: "blosc2"}
"""Filters of hdf5plugin that may run in several threads at once, by their registered numbers."""
_REVERSE = 0x0100
"""Source: H5Z_FLAG_REVERSE of H5Zpublic.h: undo the filter."""

# Calls so short that to let go of Python's lock for them, and to wait for it, takes longer.
_short = ctypes.PyDLL(None)
_malloc, _free, _copy = _short.malloc, _short.free, _short.memcpy
_malloc.restype, _malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_free.restype, _free.argtypes = None, [ctypes.c_void_p]
LEAST_LONG_COPY = 2**18
"""Bytes from which on a copy takes longer than to let go of Python's lock for it."""
_copy.restype = ctypes.c_void_p
_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class UndecodableError(Exception):
    """These bytes are not what the filter made. HDF5 is to look at them, and to say what it is."""


class Pipeline:
    """Undoes the filters of one dataset. Any thread may use it."""

    def __init__(self, filters: Sequence[Filter], chunk_bytes: int) -> None:
        """Prepare for chunks of so many bytes.

        Raises:
            UndecodableError: naming a filter that only HDF5 can undo.
        """
        self._chunk_bytes = chunk_bytes
        # In the order of undoing; each with its bit in the mask of filters that a chunk skipped.
        self._steps = [(1 << i, _decoder(each)) for i, each in enumerate(filters)][::-1]

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to undo."""
        return not self._steps

    def decode(self, raw: Bytes, skipped: int) -> Bytes:
        """Return the values of a chunk.

        Args:
            raw: as in the file.
            skipped: mask of the filters that this chunk did not go through.

        Raises:
            UndecodableError: if the bytes are damaged.
        """
        content = raw
        for bit, decode in self._steps:
            if not skipped & bit:
                content = decode(content, self._chunk_bytes)
        if len(content) != self._chunk_bytes:
            raise UndecodableError(f"{len(content)} bytes in place of {self._chunk_bytes}")
        return content


def _decoder(each: Filter) -> Decode:
    if each.number == DEFLATE:
        return _inflate
    if each.number == SHUFFLE and each.values:
        return functools.partial(_unshuffle, each.values[0])
    if each.number in _LIBRARIES:
        function = _plugin(_LIBRARIES[each.number])
        if function is not None:
            values = (ctypes.c_uint * max(1, len(each.values)))(*each.values)
            return functools.partial(_undo, function, values, len(each.values))
    raise UndecodableError(f"filter {each.number} ({each}) is undone by HDF5 alone")


def _inflate(raw: Bytes, size: int) -> Bytes:
    try:
        return np.frombuffer(zlib.decompress(raw.data, bufsize=size), np.uint8)
    except zlib.error as error:
        raise UndecodableError(str(error)) from error


def _unshuffle(item_bytes: int, raw: Bytes, _: int) -> Bytes:
    """Put the bytes of every value side by side again; what is left over was not touched."""
    if item_bytes < 2:
        return raw
    values = len(raw) // item_bytes
    content = np.empty_like(raw)
    content[values * item_bytes :] = raw[values * item_bytes :]
    for i in range(item_bytes):
        content[i : values * item_bytes : item_bytes] = raw[i * values : (i + 1) * values]
    return content


class _FilterClass(ctypes.Structure):
    """Source: H5Z_class2_t of H5Zdevelop.h, version 1, the interface of all HDF5 plugins."""

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


_FilterFunction = ctypes.CFUNCTYPE(
    ctypes.c_size_t,  # bytes that came out, 0 if it failed
    ctypes.c_uint,  # flags
    ctypes.c_size_t,  # number of the filter's values
    ctypes.POINTER(ctypes.c_uint),  # the filter's values
    ctypes.c_size_t,  # bytes that go in
    ctypes.POINTER(ctypes.c_size_t),  # bytes of the memory, may change
    ctypes.POINTER(ctypes.c_void_p),  # the memory, from malloc, may change
)


@functools.cache
def _plugin(name: str) -> Callable[..., int] | None:
    """Return the function of a filter of hdf5plugin; None where it is not installed."""
    plugins = load_plugins()
    if plugins is None:
        return None
    # Importing the package has loaded and prepared these libraries: this finds them in memory.
    for path in Path(plugins.PLUGIN_PATH).glob(f"libh5{name}.*"):
        with suppress(OSError, AttributeError):
            ask = ctypes.CDLL(str(path)).H5PLget_plugin_info
            ask.restype = ctypes.POINTER(_FilterClass)
            about = ask().contents
            if about.version == 1 and about.decodes:
                return _FilterFunction(about.function)
    return None


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


def _undo(
    function: Callable[..., int],
    values: ctypes.Array[ctypes.c_uint],
    count: int,
    raw: Bytes,
    _: int,
) -> Bytes:
    memory = ctypes.c_void_p(_malloc(len(raw) or 1))
    if memory.value is None:
        raise MemoryError
    copy = _copy if len(raw) < LEAST_LONG_COPY else ctypes.memmove
    copy(memory, raw.ctypes.data, len(raw))
    room = ctypes.c_size_t(len(raw))
    size = function(_REVERSE, count, values, len(raw), ctypes.byref(room), ctypes.byref(memory))
    if size == 0 or memory.value is None:
        _free(memory)
        raise UndecodableError("the filter cannot undo it")
    return np.asarray(_Memory(memory.value, size))
