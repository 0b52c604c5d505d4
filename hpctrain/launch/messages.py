"""Messages as bytes, of a closed set of types.

Where there is no MPI, messages pass through torch's store, which is open to the network. So they
are not pickled, and no code runs that the bytes name. A message is made of None, numbers, text,
bytes, paths, lists, tuples, sets, dicts, NumPy arrays and dtypes, tensors on the host, errors of
hpctrain's, and dataclasses, named tuples and enums of the modules that
`hpctrain.launch.message_types` lists. Every size is checked against the bytes that are there before
memory is taken for it.

Layout: a tag of one byte, then a count of 8 bytes where the type needs one, then the content.
"""

from __future__ import annotations

import math
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from hpctrain.errors import HpctrainError
from hpctrain.launch.message_types import ClassTable
from hpctrain.utils.text import printable_lines

MOST_DEPTH = 100
"""Of values inside each other."""

CLASSES = ClassTable()

_FLOAT = struct.Struct("<d")
_TAGGED_INTEGER = struct.Struct("<cq")
_TAGGED_COUNT = struct.Struct("<cQ")

# A value of a class is some levels deeper than the encoder counts.
_MOST_DEPTH = MOST_DEPTH + MOST_DEPTH // 2
_MOST_INTEGER_BYTES = 4096
_COUNT = struct.Struct("<Q")
_INTEGER = struct.Struct("<q")
_TENSOR_DTYPES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)


_FAULTS = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError),
    *(ImportError, struct.error),
)


def encode(value: object) -> bytes:
    """Return a message as bytes.

    Raises:
        TypeError: if it holds what no message may hold.
    """
    out = bytearray()
    _put(out, value, 0)
    return bytes(out)


def _put(out: bytearray, value: object, depth: int) -> None:
    """Append a value."""
    kind = type(value)
    put = _PUTS.get(kind)
    if put is not None:
        if depth > MOST_DEPTH:
            raise TypeError("a message is nested too deep")
        put(out, value, depth + 1)
    else:
        _put_object(out, value, depth + 1)


def _put_object(out: bytearray, value: object, depth: int) -> None:
    """Append a value of one of the listed classes."""
    kind = type(value)
    if isinstance(value, Enum):
        _put_named(out, b"e", kind)
        _put(out, value.name, depth)
    elif isinstance(value, HpctrainError):
        _put_named(out, b"x", kind)
        _put(out, (str(value), value.everywhere, value.reported), depth)
    elif is_dataclass(value):
        names = _put_named(out, b"o", kind)
        state = _state_of(value)
        for name in names:
            _put(out, state[name] if name in state else getattr(value, name), depth)
    elif isinstance(value, tuple) and hasattr(kind, "_fields"):
        _put_named(out, b"n", kind)
        for item in value:
            _put(out, item, depth)
    else:
        _put_of_library(out, value, depth)


def _put_of_library(out: bytearray, value: object, depth: int) -> None:
    """Append a value of Python's libraries, of NumPy or of torch."""
    if isinstance(value, PurePath):
        _put_bytes(out, b"p", str(value).encode("utf-8", "surrogatepass"))
    elif isinstance(value, np.generic):
        out += b"g"
        _put_array(out, np.asarray(value), depth)
    elif isinstance(value, np.dtype):
        out += b"d"
        _put_dtype(out, value, depth)
    elif isinstance(value, np.ndarray):
        _put_array(out, value, depth)
    else:
        _put_of_torch(out, value, depth)


def _put_of_torch(out: bytearray, value: object, depth: int) -> None:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Size):
        _put(out, tuple(value), depth)
    elif torch is not None and isinstance(value, torch.dtype):
        _put_bytes(out, b"D", str(value).removeprefix("torch.").encode())
    elif torch is not None and type(value) in (torch.Tensor, torch.nn.Parameter):
        from hpctrain.checkpoint.tensors import tensor_bytes

        tensor: Any = value
        out += b"t"
        _put(out, tensor.dtype, depth)
        _put(out, tuple(tensor.shape), depth)
        content: Any = tensor_bytes(tensor.cpu()).numpy()
        _put_bytes(out, b"b", memoryview(content))
    else:
        raise TypeError(
            f"{type(value).__module__}.{type(value).__qualname__} cannot be part of a message "
            "between ranks; hpctrain/launch/messages.py says what can"
        )


def _state_of(value: object) -> Mapping[str, Any]:
    """Return what a dataclass with a state of its own wants to be sent in place of its fields."""
    own = type(value).__dict__.get("__getstate__")
    state = own(value) if own is not None else None
    return state if isinstance(state, dict) else {}


def _put_named(out: bytearray, tag: bytes, kind: type) -> tuple[str, ...]:
    """Append the name of a class, and return the names of its fields."""
    name = CLASSES.name_of(kind)
    _put_bytes(out, tag, name)
    return CLASSES.find(name)[1]


def _put_bytes(out: bytearray, tag: bytes, data: bytes | bytearray | memoryview) -> None:
    out += _TAGGED_COUNT.pack(tag, len(data))
    out += data


def _put_integer(out: bytearray, value: Any, _depth: int) -> None:
    if -(2**63) <= value < 2**63:
        out += _TAGGED_INTEGER.pack(b"i", value)
    else:
        _put_bytes(out, b"I", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _put_items(tag: bytes) -> Callable[[bytearray, Any, int], None]:
    def put(out: bytearray, value: Any, depth: int) -> None:
        out += _TAGGED_COUNT.pack(tag, len(value))
        for item in value:
            _put(out, item, depth)

    return put


def _put_dict(out: bytearray, value: Any, depth: int) -> None:
    out += _TAGGED_COUNT.pack(b"m", len(value))
    for key, item in value.items():
        _put(out, key, depth)
        _put(out, item, depth)


def _put_array(out: bytearray, value: np.ndarray[Any, Any], depth: int) -> None:
    out += b"a"
    _put(out, tuple(value.shape), depth)
    if value.dtype == object:  # such as text of any length, in attributes of HDF5 files
        out += b"O"
        _put(out, value.reshape(-1).tolist(), depth)
        return
    if value.dtype.hasobject:
        raise TypeError(f"values of dtype {value.dtype} cannot be part of a message between ranks")
    _put_dtype(out, value.dtype, depth)
    _put_bytes(out, b"b", np.ascontiguousarray(value).tobytes())


def _put_dtype(out: bytearray, value: np.dtype[Any], depth: int) -> None:
    if value.names is None and value.subdtype is None:
        _put_bytes(out, b"s", value.str.encode())
        return
    # Structured: NumPy's own description of it, texts and numbers.
    _put(out, np.lib.format.dtype_to_descr(value), depth)


_PUTS: dict[type, Callable[[bytearray, Any, int], None]] = {
    type(None): lambda out, _, __: out.extend(b"N"),
    bool: lambda out, value, _: out.extend(b"T" if value else b"F"),
    int: _put_integer,
    float: lambda out, value, _: out.extend(b"f" + _FLOAT.pack(value)),
    complex: lambda out, value, _: out.extend(
        b"c" + _FLOAT.pack(value.real) + _FLOAT.pack(value.imag)
    ),
    str: lambda out, value, _: _put_bytes(out, b"s", value.encode("utf-8", "surrogatepass")),
    bytes: lambda out, value, _: _put_bytes(out, b"b", value),
    bytearray: lambda out, value, _: _put_bytes(out, b"b", value),
    list: _put_items(b"l"),
    tuple: _put_items(b"u"),
    set: _put_items(b"h"),
    frozenset: _put_items(b"H"),
    dict: _put_dict,
    OrderedDict: _put_dict,
}


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
        message, everywhere, reported = self.value(depth)
        error = kind(printable_lines(str(message)), everywhere=bool(everywhere))
        error.reported = bool(reported)
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
        if dtype.hasobject:
            raise DecodingError("not a message of hpctrain: values of a dtype of objects")
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
        return np.lib.format.descr_to_dtype(self.value(depth))

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
