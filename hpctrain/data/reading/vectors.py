"""One system call that reads a run of bytes to many places in memory."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.uint64]
"""(pieces, 2): address and bytes of each piece of memory, as `struct iovec` is on 64 bits."""

MOST_VECTORS = 1024
"""Of one call. Source: IOV_MAX of Linux."""

_system = ctypes.CDLL(None)
_preadv = getattr(_system, "preadv", None) if ctypes.sizeof(ctypes.c_void_p) == 8 else None
if _preadv is not None:
    _preadv.restype = ctypes.c_ssize_t
    _preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]


def can_read_vectors() -> bool:
    """Return whether the system has the call."""
    return _preadv is not None


def read_vectors(descriptor: int, address: int, count: int, offset: int) -> int:
    """Read bytes of a file to pieces of memory, one after the other.

    What `os.preadv` does; that takes an object of Python for every piece: for rows of a few KB
    making them takes as long as reading. The memory has to stay until this returns.

    Args:
        descriptor: of an open file.
        address: of the first of consecutive Vectors.
        count: of them, at most MOST_VECTORS.
        offset: bytes from the start of the file.

    Returns:
        How many bytes were read; -1: it failed.
    """
    assert _preadv is not None
    return int(_preadv(descriptor, address, count, offset))
