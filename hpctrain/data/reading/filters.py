"""HDF5's filters, decoded outside HDF5 and the lock that it holds: one by one, and in pipelines.

Nothing is decoded to more bytes than there is room for. What comes with HDF5, and LZF and SZIP, is
decoded by the functions that h5py has loaded, gzip (zlib's own format) by Intel's library where it
is installed, other filters by hdf5plugin's.
"""

from __future__ import annotations

import bz2
import ctypes
import errno
import functools
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from hpctrain.data.arrays import Bytes
from hpctrain.data.files.storage import Filter
from hpctrain.data.reading.damage import (
    DECLARED,
    HEADER_BYTES,
    DamagedChunkError,
    UndecodableError,
    bitshuffle_compresses,
    require_room,
    too_much,
)
from hpctrain.data.reading.filter_libraries import (
    ZstdFrames,
    calling,
    hdf5_filter,
    loaded_function,
    plugin_filter,
    zstd_frames,
)
from hpctrain.data.reading.threads import ThreadMemory

DEFLATE, SHUFFLE, FLETCHER32, SZIP, NBIT, SCALE_OFFSET = range(1, 7)
BZIP2, LZF, ZSTD, BITSHUFFLE = 307, 32000, 32015, 32008
_PLUGINS = {32001: "blosc", 32004: "lz4", BITSHUFFLE: "bshuf", 32026: "blosc2"}
"""Filters of hdf5plugin that may run in several threads at once, by their registered numbers."""
OVERHEAD = (8, 2**16)
"""What does not compress grows: by at most 1/8, and so many bytes of headers and tables."""
VALUES_IN_CACHE = 2**18
"""Values that are unshuffled in one go, in several passes over them."""

Decode = Callable[[Bytes, Bytes], Bytes]
"""From the bytes of a chunk, and room for those before the filter, to these.

They are in the room, or elsewhere; they are never more than it has room for.
"""

_isal: Any = None
with suppress(ImportError):
    _isal = import_module("isal.igzip_lib")  # up to twice as fast as zlib


class _Step(NamedTuple):
    """One filter to decode.

    Attributes:
        decode: decodes it.
        most: bytes that may come out.
        size: bytes that have to, where that is known.
    """

    decode: Decode
    most: int
    size: int | None


class Pipeline:
    """Decodes the filters of one dataset. Any thread may use it.

    Attributes:
        most_stored: bytes that a chunk may take in the file.
    """

    def __init__(self, filters: Sequence[Filter], chunk_bytes: int) -> None:
        """Prepare for chunks of so many bytes.

        Raises:
            UndecodableError: naming a filter that only HDF5 can decode.
        """
        self._chunk_bytes = chunk_bytes
        part, some = OVERHEAD
        self.most_stored = chunk_bytes + chunk_bytes // part + some if filters else chunk_bytes
        self._filters = list(filters)
        self._decoders = [decoder(each) for each in filters]
        self._all = (1 << len(filters)) - 1
        # By the mask of the filters that a chunk skipped.
        self._steps: dict[int, list[_Step]] = {}
        # What decodes neighbouring chunks in one go, if anything does.
        numbers = [each.number for each in filters]
        self._item_bytes = filters[0].values[0] if numbers == [SHUFFLE, ZSTD] else 1
        self._frames = zstd_frames() if numbers in ([ZSTD], [SHUFFLE, ZSTD]) else None

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to decode."""
        return not self._filters

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
            DamagedChunkError: if a chunk becomes other than `chunk_bytes`, or asks for memory out
                of proportion to them. It never gets more.
            UndecodableError: if the bytes are damaged otherwise.
        """
        if self._frames is not None and not any(skipped):
            with suppress(DamagedChunkError, UndecodableError):  # which chunk, is found below
                return self._decode_frames(self._frames, raw, sizes, memory)
        chunks = len(sizes)
        scratch = self.most_stored if len(self._filters) > 1 else 0
        room = memory.take(chunks * self._chunk_bytes + 2 * scratch)
        out: Bytes = room[2 * scratch :].reshape(chunks, -1)
        between = [room[:scratch], room[scratch : 2 * scratch]]
        end = 0
        for i, size in enumerate(sizes):
            end += size
            try:
                content = self._decode_one(raw[end - size : end], skipped[i], out[i], between)
            except DamagedChunkError as error:
                error.number = i
                raise
            if chunks == 1:
                return content[None]
            if content.ctypes.data != out[i].ctypes.data:
                out[i] = content
            del content  # a filter's own memory is the next chunk's, still in the cache
        return out

    def _decode_frames(
        self, frames: ZstdFrames, raw: Bytes, sizes: Sequence[int], memory: ThreadMemory
    ) -> Bytes:
        """Decode chunks of Zstd in one call, if each is one frame of the right size."""
        chunks = len(sizes)
        if not frames.are_of(self._chunk_bytes, raw, sizes):
            raise UndecodableError("not one frame a chunk")
        rooms = chunks if self._item_bytes == 1 else 2 * chunks
        room: Bytes = memory.take(rooms * self._chunk_bytes).reshape(rooms, -1)
        _require_size(frames.decode(raw, room[:chunks]), chunks * self._chunk_bytes)
        return unshuffle(self._item_bytes, room[:chunks], room[chunks:])

    def _decode_one(self, raw: Bytes, skipped: int, out: Bytes, between: list[Bytes]) -> Bytes:
        """Decode a chunk, to its place if that is free, by way of memory between two filters."""
        content = raw
        steps = self._steps_of(skipped)
        for i, (decode, most, size) in enumerate(steps):
            room = out if i == len(steps) - 1 else between[i % 2][:most]
            content = decode(content, room)
            _require_size(len(content), len(content) if size is None else size)
        _require_size(len(content), self._chunk_bytes)
        return content

    def _steps_of(self, skipped: int) -> list[_Step]:
        """Return what is to be done, in its order, for chunks that skipped some of the filters."""
        mask = skipped & self._all
        if mask not in self._steps:
            steps: list[_Step] = []
            size: int | None = self._chunk_bytes  # before each filter, as long as it is known
            for i, (each, decode) in enumerate(zip(self._filters, self._decoders, strict=True)):
                if not mask >> i & 1:
                    steps.append(_Step(decode, self.most_stored if size is None else size, size))
                    size = _size_after(each, size)
            self._steps[mask] = steps[::-1]
        return self._steps[mask]


def _size_after(each: Filter, size: int | None) -> int | None:
    """Return how many bytes a filter makes of so many, if that does not depend on them."""
    if size is None:
        return None
    if each.number == SHUFFLE:
        return size
    if each.number == FLETCHER32:
        return size + 4
    if each.number == BITSHUFFLE and not bitshuffle_compresses(each.values):
        return size
    return None


def _require_size(found: int, wanted: int) -> None:
    if found != wanted:
        raise DamagedChunkError(f"it becomes {found:,} bytes, and is to have {wanted:,}")


def decoder(each: Filter) -> Decode:
    """Return what decodes one filter.

    Raises:
        UndecodableError: naming a filter that only HDF5 can decode.
    """
    made = _FACTORIES.get(each.number, _decoded_by_plugin)(each)
    if made is None:
        raise UndecodableError(f"filter {each.number} ({each}) is decoded by HDF5 alone")
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


def _decoded_by_hdf5(name: str, each: Filter) -> Decode | None:
    """Return what calls a function of HDF5's own that makes as much as the filter's values say."""
    function = hdf5_filter(name, each.number)
    if function is None or len(each.values) < 5:
        return None
    call = calling(function, each)
    # Source: H5Zscaleoffset.c and H5Znbit.c: number of elements, class, bytes of each.
    declared = each.values[2] * each.values[4]

    def decode(raw: Bytes, room: Bytes) -> Bytes:
        require_room(declared, room)
        return call(raw)

    return decode


def _decoded_by_plugin(each: Filter) -> Decode | None:
    name = _PLUGINS.get(each.number)
    function = None if name is None else plugin_filter(name)
    if function is None:
        return None
    declared, call = DECLARED[each.number], calling(function, each)

    def decode(raw: Bytes, room: Bytes) -> Bytes:
        try:
            size = declared(raw[:HEADER_BYTES].tobytes(), len(raw), each.values)
        except ValueError as error:
            raise DamagedChunkError(f"its header is not one of {each}: {error}") from error
        require_room(size, room)
        return call(raw)

    return decode


def _unzstd(_: Filter) -> Decode | None:
    frames = zstd_frames()
    if frames is None:
        return None

    def decode(raw: Bytes, room: Bytes) -> Bytes:
        return room[: frames.decode(raw, room)]

    return decode


def best_inflater() -> Decode:
    """Return the faster of the two below that can be had."""
    return inflate if _isal is None else inflate_by_isal


def inflate_by_isal(raw: Bytes, room: Bytes) -> Bytes:
    """Inflate a stream of zlib's format by ISA-L."""
    return _decompress(_isal.IgzipDecompressor(_isal.DECOMP_ZLIB), _isal.error, raw, room)


def inflate(raw: Bytes, room: Bytes) -> Bytes:
    """Inflate a stream of zlib's format by zlib itself."""
    return _decompress(zlib.decompressobj(), zlib.error, raw, room)


def unbzip2(raw: Bytes, room: Bytes) -> Bytes:
    """Decompress a stream of bzip2."""
    return _decompress(bz2.BZ2Decompressor(), OSError, raw, room)


def _decompress(stream: Any, failure: type[Exception], raw: Bytes, room: Bytes) -> Bytes:
    """Return what a stream becomes, of which one byte more is asked for than there is room for.

    Args:
        stream: decompressor of one stream, as the standard library has them.
        failure: what it raises for bytes that it cannot decompress.
        raw: the stream.
        room: for what it becomes.
    """
    try:
        content: bytes = stream.decompress(raw.data, len(room) + 1)
    except failure as error:
        raise UndecodableError(str(error)) from error
    if len(content) > len(room):
        raise too_much(room)
    if not stream.eof:
        raise UndecodableError("the stream does not end")
    return np.frombuffer(content, np.uint8)


def unshuffle(item_bytes: int, chunks: Bytes, out: Bytes) -> Bytes:
    """Put the bytes of every value side by side again; what is left over was not touched.

    Args:
        item_bytes: of a value.
        chunks: (chunks, bytes) uint8.
        out: of the same shape: what is returned, where there is anything to do.
    """
    values = chunks.shape[1] // item_bytes
    if item_bytes < 2 or values < 2:
        return chunks
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


_FACTORIES: dict[int, Callable[[Filter], Decode | None]] = {
    DEFLATE: lambda _: best_inflater(),
    SHUFFLE: _unshuffler,
    FLETCHER32: _unsummer,
    SZIP: _unszip,
    NBIT: functools.partial(_decoded_by_hdf5, "H5Z_NBIT"),
    SCALE_OFFSET: functools.partial(_decoded_by_hdf5, "H5Z_SCALEOFFSET"),
    BZIP2: lambda _: unbzip2,
    LZF: _unlzf,
    ZSTD: _unzstd,
}
