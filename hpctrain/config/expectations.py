"""What a field of the schema expects, in words, read off its annotation."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Interval, MinLen

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    tuple: "a list of strings",
    dict: "a table",
}


def expectation(annotation: Any) -> str:
    """Return what values an annotation allows, such as "a whole number from 1"."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        kind, *constraints = typing.get_args(annotation)
        return expectation(kind) + "".join(_limit(constraint) for constraint in constraints)
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return " or ".join(expectation(kind) for kind in kinds)
    if origin is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in typing.get_args(annotation))
    if dataclasses.is_dataclass(annotation):
        return "a table"
    return _KINDS[origin or annotation]


def choices(annotation: Any) -> tuple[str, ...]:
    """Return the words that an annotation allows, if it allows only some."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return tuple(word for inner in typing.get_args(annotation) for word in choices(inner))


def _limit(constraint: Any) -> str:
    if isinstance(constraint, Ge):
        return f" from {constraint.ge}"
    if isinstance(constraint, Gt):
        return f" above {constraint.gt}"
    if isinstance(constraint, Interval):
        lower = f" from {constraint.ge}" if constraint.ge is not None else ""
        upper = f" to {constraint.le}" if constraint.le is not None else ""
        return lower + upper + (f" below {constraint.lt}" if constraint.lt is not None else "")
    if isinstance(constraint, MinLen):
        return " that is not empty"
    raise TypeError(f"no words for {constraint!r}")
