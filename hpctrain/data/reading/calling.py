"""The functions of compiled filters, called as HDF5 calls them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np

from hpctrain.data.reading.damage import UndecodableError
from hpctrain.data.reading.pieces import Bytes
from hpctrain.data.storage import Filter

Undo = Callable[[Bytes], Bytes]
"""From the bytes of a chunk to those before the filter, in memory of the filter's own."""

_REVERSE = 0x0100
"""Source: H5Z_FLAG_REVERSE of H5Zpublic.h: undo the filter."""
LEAST_LONG_COPY = 2**18
"""Bytes from which on a copy takes longer than to let go of Python's lock for it."""

# Calls so short that to let go of Python's lock for them, and to wait for it, takes longer.
_short = ctypes.PyDLL(None)
_malloc, _free, _copy = _short.malloc, _short.free, _short.memcpy
_malloc.restype, _malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_free.restype, _free.argtypes = None, [ctypes.c_void_p]
_copy.restype = ctypes.c_void_p
_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


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


def calling(function: Callable[..., int], each: Filter) -> Undo:
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
        raise UndecodableError("the filter cannot undo it")
    return np.asarray(_Memory(memory.value, size))
