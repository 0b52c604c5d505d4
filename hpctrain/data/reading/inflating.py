"""gzip and bzip2, undone within the room that there is for the result.

gzip is zlib's own format, which Intel's library reads faster where it is installed.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np

from hpctrain.data.reading.damage import UndecodableError, too_much
from hpctrain.data.reading.pieces import Bytes

_isal: Any = None
with suppress(ImportError):
    _isal = import_module("isal.igzip_lib")  # up to twice as fast as zlib


Inflate = Callable[[Bytes, Bytes], Bytes]
"""From a stream, and room for what it becomes, to that, which is never more."""


def best_inflater() -> Inflate:
    """Return the faster of the two below that can be had."""
    return inflate if _isal is None else inflate_by_isal


def inflate_by_isal(raw: Bytes, room: Bytes) -> Bytes:
    """Inflate a stream of zlib's format by ISA-L."""
    stream = _isal.IgzipDecompressor(_isal.DECOMP_ZLIB)
    try:
        content = stream.decompress(raw.data, len(room) + 1)
    except _isal.error as error:
        raise UndecodableError(str(error)) from error
    return _whole(content, room, is_whole=stream.eof)


def inflate(raw: Bytes, room: Bytes) -> Bytes:
    """Inflate a stream of zlib's format by zlib itself."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(raw.data, len(room) + 1)
    except zlib.error as error:
        raise UndecodableError(str(error)) from error
    return _whole(content, room, is_whole=stream.eof)


def unbzip2(raw: Bytes, room: Bytes) -> Bytes:
    """Undo bzip2."""
    stream = bz2.BZ2Decompressor()
    try:
        content = stream.decompress(raw.data, len(room) + 1)
    except OSError as error:
        raise UndecodableError(str(error)) from error
    return _whole(content, room, is_whole=stream.eof)


def _whole(content: bytes, room: Bytes, *, is_whole: bool) -> Bytes:
    """Return what a stream became, that was asked for one byte more than there is room for."""
    if len(content) > len(room):
        raise too_much(room)
    if not is_whole:
        raise UndecodableError("the stream does not end")
    return np.frombuffer(content, np.uint8)
