"""Zstd's own decoder, which writes to memory that it is given, and no more than that."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

from hpctrain.data.reading.damage import UndecodableError, too_much
from hpctrain.data.reading.libraries import plugin_library
from hpctrain.data.reading.pieces import Bytes

TOO_LITTLE_ROOM = 2**64 - 70
"""Source: ZSTD_error_dstSize_tooSmall of zstd_errors.h: what is returned is its negative."""


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
        """Tell whether chunks, one after the other, each begin a frame that becomes so many bytes.

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
