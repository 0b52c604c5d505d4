"""Damaged chunks: what may be wrong with their bytes, and how large their headers say they become.

The filters of hdf5plugin allocate what a header asks for before they look at anything else: so it
is read here first.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Mapping, Sequence

from hpctrain.data.arrays import Bytes
from hpctrain.errors import DatasetError

Declared = Callable[[bytes, int, Sequence[int]], int]
"""From the first bytes of a chunk, how many it has, and the values of its filter, to its size.

It raises ValueError if they have no such header, or ask for other memory out of proportion.
"""

HEADER_BYTES = 1024
"""The first bytes of a chunk, which hold all of the headers below."""
BITSHUFFLE_BLOCK_BYTES = 2**16
"""Source: bitshuffle_core.h: blocks of 8 KB unless a file asks for others."""
FRAME_MAGIC = b"b2frame\0"
"""Source: README_CFRAME_FORMAT.rst of c-blosc2, which has the places below too."""
_SIZE_AND_BLOCK = struct.Struct(">QI")
_BLOSC = struct.Struct("<3I")
_FRAME_SIZE = struct.Struct(">xq")
_FRAME = struct.Struct(">xixixi")
"""Bytes of one value, of a block, of a chunk, after what was compressed."""
_REST_BEGINS = 47


class UndecodableError(Exception):
    """These bytes are not what the filter made. HDF5 is to read them, and to say what is wrong."""


class DamagedChunkError(Exception):
    """A chunk becomes other bytes than its shape and dtype have, or asks for other memory.

    HDF5 is not to read it: it would allocate whatever the chunk asks for.

    Attributes:
        number: which one of several.
    """

    number = 0


def damaged_rows(path: str, name: str, rows: tuple[int, int], error: Exception) -> DatasetError:
    """Return the error of a damaged chunk of some rows, the first and the last of them."""
    first, last = rows
    return DatasetError(
        f'{path}: field "{name}", row {first}: a chunk of the rows up to {last} is damaged: '
        f"{error}. Bring the file back, or write it anew"
    )


def too_much(room: Bytes) -> DamagedChunkError:
    """Return what to say of a chunk that becomes larger than its room."""
    return DamagedChunkError(f"it becomes more than the {len(room)} bytes that it is to have")


def require_room(size: int, room: Bytes) -> None:
    """Check that what a chunk asks for is not more than it is to become.

    Raises:
        DamagedChunkError: if it is.
    """
    if size > len(room):
        raise DamagedChunkError(
            f"it asks for {size:,} bytes in place of the {len(room):,} that it is to have"
        )


def lz4_bytes(header: bytes, _: int, __: Sequence[int]) -> int:
    """Read the header of the LZ4 filter: size, then bytes of a block, big-endian."""
    size, _block = _unpack(_SIZE_AND_BLOCK, header, 0)
    return size


def bitshuffle_bytes(header: bytes, stored: int, values: Sequence[int]) -> int:
    """Read the header of Bitshuffle, which chunks have that are compressed as well."""
    if not bitshuffle_compresses(values):
        return stored
    size, block = _unpack(_SIZE_AND_BLOCK, header, 0)
    asked = values[2] * values[3] if len(values) > 3 else 0
    if block > max(BITSHUFFLE_BLOCK_BYTES, asked, size):
        raise ValueError(f"blocks of {block} bytes")
    return size


def bitshuffle_compresses(values: Sequence[int]) -> bool:
    """Return whether Bitshuffle has done more than to move bits."""
    return len(values) > 4 and values[4] != 0


def blosc_bytes(header: bytes, _: int, __: Sequence[int]) -> int:
    """Read the header of Blosc: after four bytes size, bytes of a block, bytes of the whole."""
    size, block, _whole = _unpack(_BLOSC, header, 4)
    if block > max(size, 1):
        raise ValueError(f"blocks of {block} bytes")
    return size


def blosc2_bytes(header: bytes, stored: int, _: Sequence[int]) -> int:
    """Read the header of Blosc2's frame, and the shape in it where it has one.

    The frame then holds whole blocks, more than the chunk itself.
    """
    size = int.from_bytes(header[11:15], "big")
    # All but the sizes of the compressed bytes, which is the same in all chunks of a dataset.
    declared, padded = _frame_bytes(header[:15], header[29:38], header[47:size])
    if stored > size + 32 and int.from_bytes(header[size + 4 : size + 8], "little") > padded:
        raise ValueError("a chunk larger than its frame")
    return declared


@functools.lru_cache(maxsize=64)
def _frame_bytes(magic: bytes, size_field: bytes, rest: bytes) -> tuple[int, int]:
    """Return how many bytes a frame becomes, and how many it has with what fills its blocks."""
    if magic[2:10] != FRAME_MAGIC:
        raise ValueError("no frame of Blosc2")
    (size,) = _unpack(_FRAME_SIZE, size_field, 0)
    item, block, chunk = _unpack(_FRAME, rest, 0)
    found = rest.find(b"\xa4b2nd\xd2")
    padded = declared = size
    if found >= 0:
        place = int.from_bytes(rest[found + 6 : found + 10], "big") - _REST_BEGINS
        shape, blocks = _b2nd_shape(rest, place + 5)
        declared = math.prod(shape) * item
        padded = math.prod(-(-one // part) * part for one, part in zip(shape, blocks, strict=True))
        padded *= item
    if item < 1 or size != padded or chunk != padded or not 0 <= block <= padded:
        raise ValueError(f"a frame of {size} bytes in chunks of {chunk} and blocks of {block}")
    return declared, padded


def _b2nd_shape(header: bytes, place: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return the shapes of the array, and of its blocks: numbers of MessagePack, each marked."""
    axes = header[place + 2] if 0 <= place < len(header) - 2 else 0
    numbers = struct.Struct(f">{'xq' * axes}x{'xi' * axes}x{'xi' * axes}")
    found = _unpack(numbers, header, place + 4)
    shape, chunk, blocks = found[:axes], found[axes : 2 * axes], found[2 * axes :]
    if shape != chunk or min(blocks, default=0) < 1 or any(map(int.__gt__, blocks, shape)):
        raise ValueError(f"an array of shape {shape} in chunks of {chunk}, blocks of {blocks}")
    return shape, blocks


def _unpack(numbers: struct.Struct, header: bytes, place: int) -> tuple[int, ...]:
    if place + numbers.size > len(header):
        raise ValueError("it ends within its header")
    return numbers.unpack_from(header, place)


DECLARED: Mapping[int, Declared] = {
    32001: blosc_bytes,
    32004: lz4_bytes,
    32008: bitshuffle_bytes,
    32026: blosc2_bytes,
}
"""By the registered number of the filter."""
