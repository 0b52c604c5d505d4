"""Bytes as messages, the way back of `encoding`: no code runs that the bytes name."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.errors import HpctrainError
from hpctrain.launch.encoding import CLASSES, MOST_DEPTH
from hpctrain.utils.text import printable_lines

# A value of a class is some levels deeper than the encoder counts.
_MOST_DEPTH = MOST_DEPTH + MOST_DEPTH // 2
_MOST_INTEGER_BYTES = 4096
_COUNT = struct.Struct("<Q")
_INTEGER = struct.Struct("<q")
_FLOAT = struct.Struct("<d")
_TENSOR_DTYPES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)


_FAULTS = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError),
    *(ImportError, struct.error),
)


class DecodingError(ValueError):
    """Bytes are no message of ours."""


def decode(data: bytes | bytearray | memoryview) -> Any:
    """Return the message that bytes hold.

    Raises:
        DecodingError: if they hold none.
    """
    reader = _Reader(memoryview(data))
    try:
        value = reader.value(0)
    except DecodingError:
        raise
    except _FAULTS as error:
        raise DecodingError(f"not a message of hpctrain: {error}") from error
    if reader.left:
        raise DecodingError(f"not a message of hpctrain: {reader.left} bytes after its end")
    return value


class _Reader:
    """Takes bytes apart, from the front."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def value(self, depth: int) -> Any:
        """Return the next value."""
        if depth > _MOST_DEPTH:
            raise DecodingError("not a message of hpctrain: it is nested too deep")
        tag = bytes(self._take(1))
        read = _READS.get(tag)
        if read is None:
            raise DecodingError(f"not a message of hpctrain: a value of unknown type {tag!r}")
        return read(self, depth + 1)

    def _take(self, count: int) -> memoryview:
        if count > self.left:
            raise DecodingError(f"not a message of hpctrain: {count} bytes where {self.left} are")
        self._at += count
        return self._data[self._at - count : self._at]

    def _count(self) -> int:
        """Return a number of bytes, or of items, each of which is one byte at least."""
        count: int = _COUNT.unpack(self._take(8))[0]
        if count > self.left:
            raise DecodingError(f"not a message of hpctrain: {count} bytes where {self.left} are")
        return count

    def data(self, _depth: int = 0) -> bytes:
        return bytes(self._take(self._count()))

    def text(self, _depth: int = 0) -> str:
        return self.data().decode("utf-8", "surrogatepass")

    def integer(self, _depth: int) -> int:
        value: int = _INTEGER.unpack(self._take(8))[0]
        return value

    def large_integer(self, _depth: int) -> int:
        data = self.data()
        if len(data) > _MOST_INTEGER_BYTES:
            raise DecodingError("not a message of hpctrain: a number of unlikely size")
        return int.from_bytes(data, "little", signed=True)

    def real(self, _depth: int = 0) -> float:
        value: float = _FLOAT.unpack(self._take(8))[0]
        return value

    def items(self, depth: int) -> list[Any]:
        return [self.value(depth) for _ in range(self._count())]

    def mapping(self, depth: int) -> dict[Any, Any]:
        return {self.value(depth): self.value(depth) for _ in range(self._count())}

    def member(self, depth: int) -> Any:
        kind, _ = CLASSES.find(self.data())
        if not issubclass(kind, Enum):
            raise DecodingError(f"not a message of hpctrain: {kind.__name__} is not an enum")
        return kind[self._typed(str, depth)]

    def error(self, depth: int) -> HpctrainError:
        kind, _ = CLASSES.find(self.data())
        if not issubclass(kind, HpctrainError):
            raise DecodingError(f"not a message of hpctrain: {kind.__name__} is not an error")
        message, everywhere, told = self.value(depth)
        error = kind(printable_lines(str(message)), everywhere=bool(everywhere))
        error.reported = bool(told)
        return error

    def dataclass(self, depth: int) -> Any:
        """Return a dataclass as it was sent: what its class does at its making is not done."""
        kind, names = CLASSES.find(self.data())
        if not is_dataclass(kind):
            raise DecodingError(f"not a message of hpctrain: {kind.__name__} is not a dataclass")
        made = object.__new__(kind)
        for name in names:
            object.__setattr__(made, name, self.value(depth))
        return made

    def named_tuple(self, depth: int) -> Any:
        kind, names = CLASSES.find(self.data())
        if not (issubclass(kind, tuple) and names):
            raise DecodingError(f"not a message of hpctrain: {kind.__name__} is not a named tuple")
        return tuple.__new__(kind, [self.value(depth) for _ in names])

    def array(self, depth: int) -> np.ndarray[Any, Any]:
        shape = self._shape(depth)
        if bytes(self._data[self._at : self._at + 1]) == b"O":
            self._take(1)
            items = self._typed(list, depth)
            array = np.empty(len(items), object)
            array[:] = items
            return array.reshape(shape)
        dtype = self.dtype(depth)
        data = self._typed(bytes, depth)
        count = math.prod(shape)
        if count * dtype.itemsize != len(data) or count > max(1, len(data)):
            raise DecodingError("not a message of hpctrain: an array of another size")
        array = np.empty(shape, dtype)
        array[...] = np.frombuffer(data, dtype).reshape(shape) if data else 0
        return array

    def scalar(self, depth: int) -> Any:
        return self._typed(np.ndarray, depth)[()]

    def dtype(self, depth: int) -> np.dtype[Any]:
        described = self.value(depth)
        dtype = np.lib.format.descr_to_dtype(described)
        if dtype.hasobject:
            raise DecodingError("not a message of hpctrain: a dtype of objects")
        return dtype

    def tensor_dtype(self, _depth: int = 0) -> Any:
        import torch

        name = self.text()
        if name not in _TENSOR_DTYPES:
            raise DecodingError("not a message of hpctrain: an unknown dtype")
        return getattr(torch, name)

    def tensor(self, depth: int) -> Any:
        import torch

        dtype = self._typed(torch.dtype, depth)
        shape = self._shape(depth)
        data = self._typed(bytes, depth)
        if math.prod(shape) * dtype.itemsize != len(data):
            raise DecodingError("not a message of hpctrain: a tensor of another size")
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(shape)

    def _shape(self, depth: int) -> tuple[int, ...]:
        shape = self._typed(tuple, depth)
        if any(type(size) is not int or size < 0 for size in shape):
            raise DecodingError("not a message of hpctrain: a shape that is none")
        return tuple(shape)

    def _typed(self, kind: type[Any], depth: int) -> Any:
        value = self.value(depth)
        if not isinstance(value, kind):
            raise DecodingError(f"not a message of hpctrain: {type(value).__name__} out of place")
        return value


_READS: dict[bytes, Callable[[_Reader, int], Any]] = {
    b"N": lambda reader, _: None,
    b"T": lambda reader, _: True,
    b"F": lambda reader, _: False,
    b"i": _Reader.integer,
    b"I": _Reader.large_integer,
    b"f": _Reader.real,
    b"c": lambda reader, _: complex(reader.real(), reader.real()),
    b"s": _Reader.text,
    b"b": _Reader.data,
    b"p": lambda reader, _: Path(reader.text()),
    b"l": _Reader.items,
    b"u": lambda reader, depth: tuple(reader.items(depth)),
    b"h": lambda reader, depth: set(reader.items(depth)),
    b"H": lambda reader, depth: frozenset(reader.items(depth)),
    b"m": _Reader.mapping,
    b"e": _Reader.member,
    b"x": _Reader.error,
    b"o": _Reader.dataclass,
    b"n": _Reader.named_tuple,
    b"a": _Reader.array,
    b"g": _Reader.scalar,
    b"d": _Reader.dtype,
    b"D": _Reader.tensor_dtype,
    b"t": _Reader.tensor,
}
