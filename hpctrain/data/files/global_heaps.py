"""Global heaps of HDF5 files, looked at before HDF5 reads in them: in a zeroed one it never ends.

Texts and sequences of variable length, and references to regions, lie in collections of a heap,
wherever they are of: values of datasets in whatever layout, members of compound types, attributes.
HDF5 goes through all objects of a collection at once, and over one without a number and a size it
does not get. A disk that lost a page leaves such.

Source: the HDF5 file format specification, III.E (global heaps), IV.A (object headers), IV.B.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5py import h5d, h5f, h5i, h5o, h5p, h5s, h5t

MOST_HEADER_BYTES = 2**24
"""Of an object, its attributes among them, that are searched for what they refer to."""
MOST_OBJECTS = 2**17
"""Of a collection: twice as many as have a number."""
AT_ONCE_BYTES = 2**24
"""Of values that are looked at."""
DEEPEST = 8
"""Types inside of types, and heaps behind heaps."""
_COLLECTION, _OBJECT = struct.Struct("<4sB3xQ"), struct.Struct("<HH4xQ")
_SHUFFLE = 2
_FILL_VALUE, _DATA_LAYOUT, _ATTRIBUTE, _CONTINUATION, _ATTRIBUTE_INFO = 5, 8, 12, 16, 21


class _Place(NamedTuple):
    """Where in a stored value something refers to a heap.

    Attributes:
        offset: bytes before it.
        of: type of the values there; None: what refers no further.
        has_length: whether their number is stored before the address.
    """

    offset: int
    of: h5t.TypeID | None
    has_length: bool


def require_sound_heap(dataset: h5py.Dataset, rows: slice = slice(None)) -> None:
    """Check the heaps that the values of rows of a dataset are in, if they are in any.

    Raises:
        OSError: if one of them is damaged so that HDF5 would not return.
    """
    kind = dataset.id.get_type()
    if not _may_refer(kind) or not _is_usual(dataset.file.id) or dataset.shape is None:
        return
    with _opened(dataset.file.filename, dataset.file.id) as file:
        _require_sound_fill(file, dataset, kind)
        if dataset.is_virtual or dataset.external:
            return
        for raw in _stored(file, dataset, _stored_size(kind), rows):
            file.require_sound(raw, kind)


def require_sound_fill(dataset: h5py.Dataset) -> None:
    """Check the heap that the fill value of a dataset is in: HDF5 reads it to tell of chunks.

    Raises:
        OSError: if it is damaged so that HDF5 would not return.
    """
    kind = dataset.id.get_type()
    if _may_refer(kind) and _is_usual(dataset.file.id):
        with _opened(dataset.file.filename, dataset.file.id) as file:
            _require_sound_fill(file, dataset, kind)


def _require_sound_fill(file: _File, dataset: h5py.Dataset, kind: h5t.TypeID) -> None:
    for message, content in _messages(file, h5o.get_info(dataset.id).addr):
        if message != _FILL_VALUE or len(content) < 2:
            continue
        begin = {1: 8, 2: 8, 3: 6}.get(content[0], len(content))
        size = _stored_size(kind)
        if len(content) >= begin + size:
            file.require_sound(content[begin : begin + size], kind)


def require_sound_attribute(attributes: h5py.AttributeManager, name: str) -> None:
    """Check the heaps that the values of an attribute are in, if they are in any.

    Raises:
        OSError: if one of them is damaged so that HDF5 would not return.
    """
    about = attributes.get_id(name)
    kind = about.get_type()
    if not _may_refer(kind) or about.shape is None:
        return
    of = attributes._id
    root = h5i.get_file_id(of)
    if not _is_usual(root):
        return
    size = math.prod(about.shape) * _stored_size(kind)
    with _opened(os.fsdecode(h5f.get_name(of)), root) as file:
        for raw in _attributes_called(file, h5o.get_info(of).addr, about.name, size):
            file.require_sound(raw, kind)


@contextmanager
def _opened(path: str, root: h5f.FileID) -> Iterator[_File]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield _File(descriptor, root.get_create_plist().get_userblock())
    finally:
        os.close(descriptor)


def _is_usual(file: h5f.FileID) -> bool:
    """Tell whether addresses and sizes have 8 bytes, as they always have."""
    return bool(file.get_create_plist().get_sizes() == (8, 8))


def _may_refer(kind: h5t.TypeID, depth: int = 0) -> bool:
    """Tell whether values of a type may refer to a heap."""
    if depth > DEEPEST:
        return False
    if isinstance(kind, h5t.TypeCompoundID):
        inside = (kind.get_member_type(i) for i in range(kind.get_nmembers()))
        return any(_may_refer(each, depth + 1) for each in inside)
    if isinstance(kind, h5t.TypeArrayID):
        return _may_refer(kind.get_super(), depth + 1)
    return _is_sequence(kind) or _is_region(kind)


def _is_sequence(kind: h5t.TypeID) -> bool:
    is_text = isinstance(kind, h5t.TypeStringID) and kind.is_variable_str()
    return is_text or isinstance(kind, h5t.TypeVlenID)


def _is_region(kind: h5t.TypeID) -> bool:
    return isinstance(kind, h5t.TypeReferenceID) and bool(kind.equal(h5t.STD_REF_DSETREG))


def _stored_size(kind: h5t.TypeID, depth: int = 0) -> int:
    """Return the bytes of a value as it is stored: HDF5 tells those of memory, of pointers."""
    if depth > DEEPEST:
        return int(kind.get_size())
    if _is_sequence(kind):
        return 16
    if isinstance(kind, h5t.TypeCompoundID):
        inside = [kind.get_member_type(i) for i in range(kind.get_nmembers())]
        more = sum(_stored_size(each, depth + 1) - each.get_size() for each in inside)
        return int(kind.get_size() + more)
    if isinstance(kind, h5t.TypeArrayID):
        of = kind.get_super()
        return int(np.prod(kind.get_array_dims())) * _stored_size(of, depth + 1)
    return int(kind.get_size())


def _places(kind: h5t.TypeID, offset: int = 0, depth: int = 0) -> Iterator[_Place]:
    """Yield where values of a type, as they are stored, refer to heaps."""
    if depth > DEEPEST or not _may_refer(kind):
        return
    if _is_region(kind):
        yield _Place(offset, None, has_length=False)
    elif isinstance(kind, h5t.TypeVlenID):
        of = kind.get_super()
        yield _Place(offset, of if _may_refer(of) else None, has_length=True)
    elif isinstance(kind, h5t.TypeStringID):
        yield _Place(offset, None, has_length=True)
    elif isinstance(kind, h5t.TypeArrayID):
        of = kind.get_super()
        for number in range(int(np.prod(kind.get_array_dims()))):
            yield from _places(of, offset + number * _stored_size(of), depth + 1)
    elif isinstance(kind, h5t.TypeCompoundID):
        members = [
            (kind.get_member_offset(i), kind.get_member_type(i)) for i in range(kind.get_nmembers())
        ]
        grown = 0
        for begin, of in sorted(members, key=lambda each: each[0]):
            yield from _places(of, offset + begin + grown, depth + 1)
            grown += _stored_size(of) - of.get_size()


class _File:
    """A file whose heaps are looked at, each once."""

    def __init__(self, descriptor: int, base: int) -> None:
        """Take an open file, and the bytes in it before the first that HDF5 counts from."""
        self.base = base
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._known: dict[int, dict[int, tuple[int, int]]] = {}

    def read(self, address: int, size: int) -> bytes:
        """Return bytes of the file, fewer at its end."""
        if not 0 <= address <= self._size:
            return b""
        return os.pread(self._descriptor, min(size, self._size), self.base + address)

    def require_sound(self, raw: bytes, kind: h5t.TypeID, depth: int = 0) -> None:
        """Check the heaps that stored values refer to, and those that what is there refers to.

        Raises:
            OSError: if HDF5 would not return of one.
        """
        size = _stored_size(kind)
        for place in _places(kind):
            values = np.frombuffer(raw, _dtype_of(place, size), len(raw) // size)
            used = values["heap"] > 0  # HDF5 looks there also for no values
            for heap in np.unique(values["heap"][used]).tolist():
                self._objects(heap)
            if place.of is None or depth > DEEPEST:
                continue
            for heap, number in set(zip(*(values[used][key].tolist() for key in _AT), strict=True)):
                at, stored = self._objects(heap).get(number, (0, 0))
                self.require_sound(self.read(at, stored) if at else b"", place.of, depth + 1)

    def _objects(self, heap: int) -> dict[int, tuple[int, int]]:
        """Return where the objects of a collection are, by number.

        Raises:
            OSError: if HDF5 would not return of it.
        """
        if heap in self._known:
            return self._known[heap]
        head = self.read(heap, _COLLECTION.size)
        found: dict[int, tuple[int, int]] = {}
        self._known[heap] = found
        if len(head) < _COLLECTION.size or head[:4] != b"GCOL":
            return found  # HDF5 itself says what is wrong with that
        _, _, size = _COLLECTION.unpack(head)
        at, block, begin = _COLLECTION.size, b"", 0
        for _ in range(MOST_OBJECTS):
            if at + _OBJECT.size > size:
                break
            if not begin <= at <= begin + len(block) - _OBJECT.size:
                begin, block = at, self.read(heap + at, 2**16)
            if len(block) < _OBJECT.size:
                break
            number, _, length = _OBJECT.unpack_from(block, at - begin)
            step = (_OBJECT.size + (length + 7) // 8 * 8) % 2**64 if number else length
            if not step:
                del self._known[heap]
                raise OSError(
                    f"the global heap at byte {heap:,} is damaged, and HDF5 would read in it for "
                    "ever: bring the file back"
                )
            if number:
                found[number] = (heap + at + _OBJECT.size, length)
            at += step
        return found


_AT = ("heap", "number")


def _dtype_of(place: _Place, size: int) -> np.dtype[Any]:
    """Return how a reference to a heap lies in stored values of so many bytes."""
    begin = place.offset + (4 if place.has_length else 0)
    offsets = [begin, begin + 8]
    return np.dtype({"names": _AT, "formats": ["<u8", "<u4"], "offsets": offsets, "itemsize": size})


def _stored(file: _File, dataset: h5py.Dataset, size: int, rows: slice) -> Iterator[bytes]:
    """Yield the values of rows as they are stored, and perhaps those of others beside them."""
    length = dataset.shape[0] if dataset.shape else 1
    start, stop, _ = rows.indices(length)
    each = dataset.size // max(1, length) * size
    if dataset.chunks is not None:
        yield from _chunks(dataset, size, start, stop)
        return
    offset = dataset.id.get_offset()
    if offset is not None:
        step = max(1, AT_ONCE_BYTES // size) * size
        for begin in range(start * each, stop * each, step):
            yield file.read(offset - file.base + begin, min(stop * each - begin, step))
        return
    for kind, content in _messages(file, h5o.get_info(dataset.id).addr):
        # Compact: in the header itself.
        if kind == _DATA_LAYOUT and content[:2] in (b"\x03\x00", b"\x04\x00"):
            yield content[4 : 4 + dataset.size * size]


def _chunks(dataset: h5py.Dataset, size: int, start: int, stop: int) -> Iterator[bytes]:
    """Yield the chunks that hold some of these rows, through their filters, as they are stored."""
    assert dataset.chunks is not None
    lengths = dataset.chunks
    first = range(start // lengths[0] * lengths[0], stop, lengths[0])
    others = [
        range(0, all_, length) for all_, length in zip(dataset.shape[1:], lengths[1:], strict=True)
    ]
    reading = _AsStored(dataset, size)
    for place in itertools.product(first, *others):
        yield reading.chunk(place)


class _AsStored:
    """Chunks of a dataset through its filters, without HDF5's look at what their values mean.

    HDF5 itself is asked, of a file in memory whose dataset holds as many bytes of no meaning.
    """

    def __init__(self, dataset: h5py.Dataset, size: int) -> None:
        self._dataset = dataset
        self._values = math.prod(dataset.chunks)
        self._size = size
        self._filters = dataset.id.get_create_plist()

    def chunk(self, place: tuple[int, ...]) -> bytes:
        """Return a chunk by its first value's place; empty, if there is none that can be decoded.

        What filters cannot undo, HDF5 does not come to look for in a heap.
        """
        try:
            mask, raw = self._dataset.id.read_direct_chunk(place)
            if not self._filters.get_nfilters():
                return bytes(raw)
            return self._decoded(mask, raw)
        except (OSError, RuntimeError, ValueError):
            return b""

    def _decoded(self, mask: int, raw: bytes) -> bytes:
        made = h5p.create(h5p.DATASET_CREATE)
        made.set_chunk((self._values,))
        kept = 0
        for number in range(self._filters.get_nfilters()):
            code, flags, values, _ = self._filters.get_filter(number)
            # Of what refers to a heap, HDF5 shuffles nothing, and says so by no size.
            if not mask >> number & 1 and (code != _SHUFFLE or values):
                made.set_filter(code, flags, values)
                kept += 1
        if not kept:
            return bytes(raw)
        with h5py.File("chunk", "w", driver="core", backing_store=False) as file:
            kind = h5t.create(h5t.OPAQUE, self._size)
            kind.set_tag(b"stored")
            space = h5s.create_simple((self._values,))
            there = h5d.create(file.id, b"x", kind, space, made)
            there.write_direct_chunk((0,), raw)
            out = np.empty(self._values, f"V{self._size}")
            there.read(h5s.ALL, h5s.ALL, out, kind)
            return out.tobytes()


def _messages(file: _File, header: int) -> Iterator[tuple[int, bytes]]:
    """Yield the messages of an object's header that are in it: their type, and what they say."""
    head = file.read(header, 64)
    if head[:4] == b"OHDR":
        flags = head[5] if len(head) == 64 else 0
        at = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        blocks = [(header + at + width, int.from_bytes(head[at : at + width], "little"))]
        entry, is_new = 6 if flags & 4 else 4, True
    elif head[:1] == b"\x01" and len(head) >= 16:
        blocks = [(header + 16, int.from_bytes(head[8:12], "little"))]
        entry, is_new = 8, False
    else:
        return
    left = MOST_HEADER_BYTES
    while blocks and left > 0:
        begin, size = blocks.pop(0)
        block = file.read(begin, min(size, left))
        left -= max(1, len(block))
        at = 0
        while at + entry <= len(block):
            kind, length, flags = struct.unpack_from("<BHB" if is_new else "<HHB", block, at)
            content = block[at + entry : at + entry + length]
            at += entry + length
            if kind == _CONTINUATION and len(content) >= 16:
                begin, size = struct.unpack_from("<QQ", content)
                blocks.append((begin + 4, size - 8) if is_new else (begin, size))
            elif not flags & 2:  # it is not elsewhere, shared by several objects
                yield kind, content


def _attributes_called(file: _File, header: int, name: bytes, size: int) -> Iterator[bytes]:
    """Yield the values, so many bytes, of what may be the attribute of this name of an object."""
    for kind, content in _messages(file, header):
        if kind == _ATTRIBUTE:
            found = _value_of(content, name, size)
            if found is not None:
                yield found
        elif kind == _ATTRIBUTE_INFO and len(content) >= 18:
            (heap,) = struct.unpack_from("<Q", content, 4 if content[1] & 1 else 2)
            for block in _blocks(file, heap):
                begin = block.find(name + b"\0")
                while begin >= 0:
                    found = _value_of(block[max(0, begin - 9) :], name, size)
                    if found is not None:
                        yield found
                    begin = block.find(name + b"\0", begin + 1)


def _value_of(message: bytes, name: bytes, size: int) -> bytes | None:
    """Return the values of an attribute by its message; None: it is that of another."""
    if len(message) < 9 or message[0] not in (1, 2, 3):
        return None
    lengths = struct.unpack_from("<HHH", message, 2)
    if message[0] == 1:
        lengths = tuple((each + 7) // 8 * 8 for each in lengths)
    at = 9 if message[0] == 3 else 8
    if message[at : at + lengths[0]].rstrip(b"\0") != name:
        return None
    begin = at + sum(lengths)
    return message[begin : begin + size]


_FRACTAL_HEAP = struct.Struct("<4sBHHB4x96xHQQHHQH")


def _blocks(file: _File, address: int) -> Iterator[bytes]:
    """Yield the blocks of a fractal heap in which many attributes of an object are."""
    head = file.read(address, _FRACTAL_HEAP.size)
    if len(head) < _FRACTAL_HEAP.size:
        return
    mark, _, _, filters, _, width, first, largest, bits, _, root, rows = _FRACTAL_HEAP.unpack(head)
    if mark != b"FRHP" or filters or not first:
        return
    if not rows:
        yield file.read(root, min(first, MOST_HEADER_BYTES))
        return
    sizes = [min(first << max(0, row - 1), MOST_HEADER_BYTES) for row in range(min(rows, 64))]
    direct = [size for size in sizes if size <= largest for _ in range(min(width, 64))]
    begin = 13 + (bits + 7) // 8
    table = file.read(root, begin + 8 * len(direct))[begin:]
    table = table[: len(table) // 8 * 8]
    for (block,), size in zip(struct.iter_unpack("<Q", table), direct, strict=False):
        yield file.read(block, size)
