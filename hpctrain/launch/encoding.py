"""Messages as bytes, of a closed set of types: see `decoding` for the way back.

Where there is no MPI, messages pass through torch's store, which is open to the network. So they
are not pickled. A message is made of None, numbers, text, bytes, paths, lists, tuples, sets, dicts,
NumPy arrays and dtypes, tensors on the host, errors of hpctrain's, and dataclasses, named tuples
and enums of the modules that are listed here. Every size is checked against the bytes that are
there before memory is taken for it.

Layout: a tag of one byte, then a count of 8 bytes where the type needs one, then the content.
"""

from __future__ import annotations

import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np

from hpctrain.errors import HpctrainError
from hpctrain.launch.message_types import ClassTable

MOST_DEPTH = 100
"""Of values inside each other."""

CLASSES = ClassTable()

_FLOAT = struct.Struct("<d")
_TAGGED_INTEGER = struct.Struct("<cq")
_TAGGED_COUNT = struct.Struct("<cQ")


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
        tensor: Any = value
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1).contiguous()
        out += b"t"
        _put(out, plain.dtype, depth)
        _put(out, tuple(tensor.shape), depth)
        _put_bytes(out, b"b", memoryview(plain.view(torch.uint8).numpy()).cast("B"))
    else:
        raise TypeError(
            f"{type(value).__module__}.{type(value).__qualname__} cannot be part of a message "
            "between ranks; hpctrain/launch/encoding.py says what can"
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
    _put_dtype(out, value.dtype, depth)
    _put_bytes(out, b"b", np.ascontiguousarray(value).tobytes())


def _put_dtype(out: bytearray, value: np.dtype[Any], depth: int) -> None:
    if value.hasobject:
        raise TypeError(f"values of dtype {value} cannot be part of a message between ranks")
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
