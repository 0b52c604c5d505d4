"""What HDF5's filters did to a chunk, undone outside HDF5 and the lock that it holds.

gzip is zlib's own format, which Intel's library reads faster where it is installed; shuffle is
undone by numpy. The filters of hdf5plugin are shared
libraries with one function each, which HDF5 calls and anybody may: ctypes does so without Python's
lock, so that threads decompress side by side. Chunks of Zstd that lie side by side in the file are
what Zstd itself undoes in one call.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.data.reading.helpers import ThreadMemory
from hpctrain.data.reading.pieces import Bytes
from hpctrain.data.storage import Filter, load_plugins

Decode = Callable[[Bytes, int], Bytes]
"""From the bytes of a chunk, and how many there will be, to those before the filter."""

DEFLATE, SHUFFLE, ZSTD = 1, 2, 32015
_LIBRARIES = {32001: "blosc", 32004: "lz4", 32008: "bshuf", ZSTD: "zstd", 32026: "blosc2"}
"""Filters of hdf5plugin that may run in several threads at once, by their registered numbers."""
VALUES_IN_CACHE = 2**18
"""Values that are put together in one go, in several passes over them."""
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


_zlib: Any = zlib
with suppress(ImportError):
    _zlib = import_module("isal.isal_zlib")  # the same functions, up to twice as fast


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
        # What undoes neighbouring chunks in one go, if anything does.
        numbers = [each.number for each in filters]
        self._item_bytes = filters[0].values[0] if numbers == [SHUFFLE, ZSTD] else 1
        self._frames = _zstd_frames() if numbers in ([ZSTD], [SHUFFLE, ZSTD]) else None

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to undo."""
        return not self._steps

    def decode(
        self, raw: Bytes, sizes: Sequence[int], skipped: Sequence[int], memory: ThreadMemory
    ) -> Bytes:
        """Return the values of chunks, (chunks, chunk_bytes) uint8, for as long as `memory` is.

        Args:
            raw: the chunks one after the other, as in the file.
            sizes: bytes of each.
            skipped: of each, the mask of the filters that it did not go through.
            memory: to decode to.

        Raises:
            UndecodableError: if the bytes are damaged.
        """
        chunks = len(sizes)
        if self._frames is not None and not any(skipped):
            rooms = chunks if self._item_bytes == 1 else 2 * chunks
            room = memory.take(rooms * self._chunk_bytes).reshape(rooms, -1)
            self._frames(raw, room[:chunks])
            return _unshuffle(self._item_bytes, room[:chunks], room[chunks:])
        if chunks == 1:
            return self._decode_one(raw, skipped[0])[None]
        out: Bytes = memory.take(chunks * self._chunk_bytes).reshape(chunks, -1)
        end = 0
        for i, size in enumerate(sizes):
            end += size
            out[i] = self._decode_one(raw[end - size : end], skipped[i])
        return out

    def _decode_one(self, raw: Bytes, skipped: int) -> Bytes:
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
        return functools.partial(_unshuffle_one, each.values[0])
    if each.number in _LIBRARIES:
        function = _plugin(_LIBRARIES[each.number])
        if function is not None:
            values = (ctypes.c_uint * max(1, len(each.values)))(*each.values)
            return functools.partial(_undo, function, values, len(each.values))
    raise UndecodableError(f"filter {each.number} ({each}) is undone by HDF5 alone")


def _inflate(raw: Bytes, size: int) -> Bytes:
    try:
        return np.frombuffer(_zlib.decompress(raw.data, bufsize=size), np.uint8)
    except _zlib.error as error:
        raise UndecodableError(str(error)) from error


def _unshuffle_one(item_bytes: int, raw: Bytes, _: int) -> Bytes:
    content: Bytes = _unshuffle(item_bytes, raw[None], np.empty((1, len(raw)), np.uint8))[0]
    return content


def _unshuffle(item_bytes: int, chunks: Bytes, out: Bytes) -> Bytes:
    """Put the bytes of every value side by side again; what is left over was not touched.

    Args:
        item_bytes: of a value.
        chunks: (chunks, bytes) uint8.
        out: of the same shape: what is returned, where there is anything to do.
    """
    if item_bytes < 2:
        return chunks
    values = chunks.shape[1] // item_bytes
    done = values * item_bytes
    parts = [chunks[:, i * values : (i + 1) * values] for i in range(item_bytes)]
    if item_bytes in (2, 4) and done == chunks.shape[1]:
        # Shifts of whole values: up to three times as fast as copies of single bytes.
        whole = out.view(f"<u{item_bytes}")
        for first in range(0, values, VALUES_IN_CACHE):
            some = slice(first, first + VALUES_IN_CACHE)
            whole[:, some] = parts[-1][:, some]
            for part in reversed(parts[:-1]):
                np.left_shift(whole[:, some], 8, out=whole[:, some])
                np.bitwise_or(whole[:, some], part[:, some], out=whole[:, some])
        return out
    out[:, done:] = chunks[:, done:]
    for i, part in enumerate(parts):
        out[:, i:done:item_bytes] = part
    return out


@functools.cache
def _zstd_frames() -> Callable[[Bytes, Bytes], None] | None:
    """Return what decodes frames that follow each other; None if hdf5plugin has no such thing."""
    library = _library("zstd")
    if library is None or not hasattr(library, "ZSTD_decompress"):
        return None
    # Source: zstd.h, ZSTD_decompress(dst, dstCapacity, src, compressedSize): "compressedSize:
    # must be the exact size of some number of compressed and/or skippable frames".
    function = library.ZSTD_decompress
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t] * 2

    def decode(raw: Bytes, out: Bytes) -> None:
        if function(out.ctypes.data, out.nbytes, raw.ctypes.data, raw.nbytes) != out.nbytes:
            raise UndecodableError("not what Zstd has written")

    return decode


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
    library = _library(name)
    if library is None or not hasattr(library, "H5PLget_plugin_info"):
        return None
    ask = library.H5PLget_plugin_info
    ask.restype = ctypes.POINTER(_FilterClass)
    about = ask().contents
    return _FilterFunction(about.function) if about.version == 1 and about.decodes else None


def _library(name: str) -> ctypes.CDLL | None:
    """Return the library of a filter of hdf5plugin; None where it is not installed."""
    plugins = load_plugins()
    if plugins is None:
        return None
    # Importing the package has loaded and prepared these libraries: this finds them in memory.
    for path in Path(plugins.PLUGIN_PATH).glob(f"libh5{name}.*"):
        with suppress(OSError):
            return ctypes.CDLL(str(path))
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
