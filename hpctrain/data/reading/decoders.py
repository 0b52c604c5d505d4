"""What undoes one filter, within the room that there is for the result.

What comes with HDF5, and LZF and SZIP, is undone by the functions that h5py has loaded, other
filters by those of hdf5plugin.
"""

from __future__ import annotations

import ctypes
import errno
import functools
from collections.abc import Callable

from hpctrain.data.reading.calling import calling
from hpctrain.data.reading.damage import (
    DamagedChunkError,
    UndecodableError,
    require_room,
    too_much,
)
from hpctrain.data.reading.headers import DECLARED, HEADER_BYTES
from hpctrain.data.reading.inflating import best_inflater, unbzip2
from hpctrain.data.reading.libraries import hdf5_filter, loaded_function, plugin_filter
from hpctrain.data.reading.pieces import Bytes
from hpctrain.data.reading.shuffling import unshuffle
from hpctrain.data.reading.zstd import zstd_frames
from hpctrain.data.storage import Filter

Decode = Callable[[Bytes, Bytes], Bytes]
"""From the bytes of a chunk, and room for those before the filter, to these.

They are in the room, or elsewhere; they are never more than it has room for.
"""

DEFLATE, SHUFFLE, FLETCHER32, SZIP, NBIT, SCALE_OFFSET = range(1, 7)
BZIP2, LZF, ZSTD, BITSHUFFLE = 307, 32000, 32015, 32008
_PLUGINS = {32001: "blosc", 32004: "lz4", BITSHUFFLE: "bshuf", 32026: "blosc2"}
"""Filters of hdf5plugin that may run in several threads at once, by their registered numbers."""


def decoder(each: Filter) -> Decode:
    """Return what undoes a filter.

    Raises:
        UndecodableError: naming a filter that only HDF5 can undo.
    """
    made = _FACTORIES.get(each.number, _undone_by_plugin)(each)
    if made is None:
        raise UndecodableError(f"filter {each.number} ({each}) is undone by HDF5 alone")
    return made


def _unshuffler(each: Filter) -> Decode | None:
    # Source: H5Zshuffle.c: any other values are "invalid shuffle parameters".
    if len(each.values) != 1 or each.values[0] < 1:
        return None
    (item_bytes,) = each.values

    def decode(raw: Bytes, room: Bytes) -> Bytes:
        if len(raw) > len(room):
            raise too_much(room)
        content: Bytes = unshuffle(item_bytes, raw[None], room[None, : len(raw)])[0]
        return content

    return decode


def _unsummer(_: Filter) -> Decode | None:
    checksum = loaded_function("H5_checksum_fletcher32")
    if checksum is None:
        return None
    checksum.restype = ctypes.c_uint32
    checksum.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def decode(raw: Bytes, _room: Bytes) -> Bytes:
        content = raw[:-4]
        stored = bytes(raw[-4:])
        if not len(content):
            raise UndecodableError("shorter than its checksum")
        found = int(checksum(content.ctypes.data, len(content))).to_bytes(4, "little")
        # Source: H5Zfletcher32.c: old files of big-endian machines have each half reversed.
        if stored not in (found, bytes([found[1], found[0], found[3], found[2]])):
            raise UndecodableError("its checksum is another")
        return content

    return decode


def _unlzf(_: Filter) -> Decode | None:
    function = loaded_function("lzf_decompress")
    if function is None:
        return None
    # Source: lzf.h: returns the bytes that came out; 0 with errno E2BIG if they need more room.
    function.restype = ctypes.c_uint
    function.argtypes = [ctypes.c_void_p, ctypes.c_uint] * 2

    def decode(raw: Bytes, room: Bytes) -> Bytes:
        ctypes.set_errno(0)
        size = function(raw.ctypes.data, len(raw), room.ctypes.data, len(room))
        if size:
            return room[:size]
        if ctypes.get_errno() == errno.E2BIG:
            raise too_much(room)
        raise UndecodableError("not what LZF has written")

    return decode


class _SzipParameters(ctypes.Structure):
    """Source: SZ_com_t of szlib.h."""

    _fields_ = tuple(
        (name, ctypes.c_int) for name in ("options", "bits_per_pixel", "pixels", "scanline")
    )


def _unszip(each: Filter) -> Decode | None:
    function = loaded_function("SZ_BufftoBuffDecompress")
    if function is None or len(each.values) < 4:
        return None
    function.restype = ctypes.c_int
    options, pixels, bits, scanline = each.values[:4]  # source: H5Zszip.c
    parameters = _SzipParameters(options, bits, pixels, scanline)

    def decode(raw: Bytes, room: Bytes) -> Bytes:
        declared = int.from_bytes(bytes(raw[:4]), "little")
        require_room(declared, room)
        size = ctypes.c_size_t(declared)
        status = function(
            ctypes.c_void_p(room.ctypes.data),
            ctypes.byref(size),
            ctypes.c_void_p(raw[4:].ctypes.data),
            ctypes.c_size_t(max(0, len(raw) - 4)),
            ctypes.byref(parameters),
        )
        if status != 0 or size.value != declared:
            raise UndecodableError("not what SZIP has written")
        return room[:declared]

    return decode


def _undone_by_hdf5(name: str, each: Filter) -> Decode | None:
    """Return what calls a function of HDF5's own that makes as much as the filter's values say."""
    function = hdf5_filter(name, each.number)
    if function is None or len(each.values) < 5:
        return None
    undo = calling(function, each)
    # Source: H5Zscaleoffset.c and H5Znbit.c: number of elements, class, bytes of each.
    declared = each.values[2] * each.values[4]

    def decode(raw: Bytes, room: Bytes) -> Bytes:
        require_room(declared, room)
        return undo(raw)

    return decode


def _undone_by_plugin(each: Filter) -> Decode | None:
    name = _PLUGINS.get(each.number)
    function = None if name is None else plugin_filter(name)
    if function is None:
        return None
    declared, undo = DECLARED[each.number], calling(function, each)

    def decode(raw: Bytes, room: Bytes) -> Bytes:
        try:
            size = declared(raw[:HEADER_BYTES].tobytes(), len(raw), each.values)
        except ValueError as error:
            raise DamagedChunkError(f"its header is not one of {each}: {error}") from error
        require_room(size, room)
        return undo(raw)

    return decode


def _unzstd(_: Filter) -> Decode | None:
    frames = zstd_frames()
    if frames is None:
        return None

    def decode(raw: Bytes, room: Bytes) -> Bytes:
        return room[: frames.decode(raw, room)]

    return decode


_FACTORIES: dict[int, Callable[[Filter], Decode | None]] = {
    DEFLATE: lambda _: best_inflater(),
    SHUFFLE: _unshuffler,
    FLETCHER32: _unsummer,
    SZIP: _unszip,
    NBIT: functools.partial(_undone_by_hdf5, "H5Z_NBIT"),
    SCALE_OFFSET: functools.partial(_undone_by_hdf5, "H5Z_SCALEOFFSET"),
    BZIP2: lambda _: unbzip2,
    LZF: _unlzf,
    ZSTD: _unzstd,
}
