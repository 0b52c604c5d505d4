"""Types of HDF5 in words, also those that a tensor has no counterpart for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import h5py
from h5py import h5t

from hpctrain.utils.text import listed, printable

_MOST_MEMBERS = 6
"""Of a compound type or an enumeration that are shown."""
_DEEPEST = 4
"""Levels of types inside of types that are shown."""


def type_of(dataset: h5py.Dataset) -> str:
    """Return the type of a dataset's values in words, such as "compound {pt: float32}"."""
    return type_text(dataset.id.get_type())


def type_text(kind: h5t.TypeID, depth: int = 0) -> str:
    """Return an HDF5 type in words. Never fails: of what is not known it gives the size.

    Args:
        kind: the type as stored.
        depth: levels of types around it.
    """
    if depth > _DEEPEST:
        return "..."
    try:
        return _text(kind, depth)
    except (TypeError, ValueError, RuntimeError, OSError):
        return f"a type of {kind.get_size()} bytes that h5py does not know"


def _text(kind: h5t.TypeID, depth: int) -> str:
    words = _WORDS.get(kind.get_class())
    if words is not None:
        return words(kind, depth)
    name: str = kind.dtype.name  # also of what is new, such as the complex numbers of HDF5 2.0
    return name


def _opaque(kind: h5t.TypeOpaqueID, _: int) -> str:
    tag = _name(kind.get_tag())
    return f"opaque of {kind.get_size()} bytes" + (f" ({tag})" if tag else "")


def _compound(kind: h5t.TypeCompoundID, depth: int) -> str:
    names = [kind.get_member_name(i) for i in range(min(kind.get_nmembers(), _MOST_MEMBERS))]
    if names == [b"r", b"i"] and kind.get_nmembers() == 2:
        return str(kind.dtype)  # complex, as h5py writes it
    kinds = [type_text(kind.get_member_type(i), depth + 1) for i in range(len(names))]
    members = [f"{_name(name)}: {text}" for name, text in zip(names, kinds, strict=True)]
    more = kind.get_nmembers() - len(members)
    return "compound {" + ", ".join(members) + (f", and {more} more" if more else "") + "}"


def _enumeration(kind: h5t.TypeEnumID, depth: int) -> str:
    if kind.dtype.name == "bool":
        return "bool"
    count = kind.get_nmembers()
    shown = [_name(kind.get_member_name(i)) for i in range(min(count, _MOST_MEMBERS + 1))]
    return f"{type_text(kind.get_super(), depth + 1)}, one of {listed(shown, _MOST_MEMBERS)}"


def _array(kind: h5t.TypeArrayID, depth: int) -> str:
    shape = " x ".join(map(str, kind.get_array_dims()))
    return f"arrays {shape} of {type_text(kind.get_super(), depth + 1)}"


def _name(raw: bytes) -> str:
    return printable(raw.decode(errors="replace"))


_WORDS: dict[int, Callable[[Any, int], str]] = {
    h5t.STRING: lambda kind, _: (
        "text" if kind.is_variable_str() else f"text of {kind.get_size()} bytes"
    ),
    h5t.BITFIELD: lambda kind, _: f"bitfield of {8 * kind.get_size()} bits",
    h5t.OPAQUE: _opaque,
    h5t.COMPOUND: _compound,
    h5t.REFERENCE: lambda _, __: "reference",
    h5t.ENUM: _enumeration,
    h5t.VLEN: lambda kind, depth: f"sequences of {type_text(kind.get_super(), depth + 1)}",
    h5t.ARRAY: _array,
    h5t.TIME: lambda kind, _: f"time of {kind.get_size()} bytes",
}
