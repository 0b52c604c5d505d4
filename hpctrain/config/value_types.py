"""Types of the values that keys take, and how a message puts them: "a whole number from 1"."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Interval, MinLen

from hpctrain.utils.text import did_you_mean

Count = Annotated[int, Ge(1)]
CountOrNever = Annotated[int, Ge(0)]
CountOrPart = Count | Annotated[float, Interval(gt=0, le=1)]
"""A whole number of things, or with a point the part of all: 1 is one of them, 1.0 is all."""
Seconds = Annotated[float, Gt(0)]
Text = Annotated[str, MinLen(1)]
Reference = Text
"""A built-in name, or an import path "package.module:Name"."""


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
        text = expectation(kind)
        for constraint in constraints:
            text = _limited(text, constraint)
        return text
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind not in _UNSAID]
        return " or ".join(expectation(kind) for kind in kinds)
    if origin is Literal:
        words = [f'"{word}"' for word in typing.get_args(annotation)]
        return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)
    if dataclasses.is_dataclass(annotation):
        return "a table"
    return _collection(annotation) or _KINDS[origin or annotation]


_UNSAID = (type(None), tuple[()])
"""Parts of annotations that stand for a key that is left out."""


def _collection(annotation: Any) -> str | None:
    """Return what a list or table of one kind of thing allows."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple and dataclasses.is_dataclass(arguments[0]):
        keys = ", ".join(field.name for field in dataclasses.fields(arguments[0]))
        return f"a list of tables with the keys {keys}"
    if origin is tuple and arguments[0] is int:
        return f"a list of {len(arguments)} whole numbers"
    if origin is dict and arguments[1] is str:
        return "a table of strings"
    return None


def choices(annotation: Any) -> tuple[str, ...]:
    """Return the words that an annotation allows, if it allows only some."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return tuple(word for inner in typing.get_args(annotation) for word in choices(inner))


def remedy(annotation: Any, value: Any) -> str:
    """Return what was perhaps meant by a value that does not fit; empty, or after a semicolon."""
    expected = expectation(annotation)
    whole = "whole number" in expected
    if isinstance(value, str):
        return _remedy_of_text(annotation, value, expected)
    if annotation is bool and value in (0, 1):
        return f"; did you mean {'true' if value else 'false'}?"
    if isinstance(value, float) and value.is_integer() and whole and value >= 1:
        return f"; did you mean {int(value)}?"
    if isinstance(value, int | float) and expected.endswith("string"):
        return "; as a string it needs quotes"
    return ""


def _remedy_of_text(annotation: Any, value: str, expected: str) -> str:
    if near := did_you_mean(value, choices(annotation), quote='"'):
        return near
    if value.lower() in _NULLS:
        return "; TOML has no null: leave the key out"
    if annotation is bool and value.lower() in _BOOLS:
        return f"; did you mean {'true' if value.lower() in _TRUE else 'false'}?"
    if "list of strings" in expected and _WORDS.fullmatch(value):
        parts = ", ".join(f'"{part.strip()}"' for part in value.strip("[]()").split(","))
        return f"; did you mean [{parts}]?"
    if "number" not in expected or not (meant := _number_of(value)):
        return ""
    is_written_so = _NUMBER.fullmatch(value) and (meant == value or "whole" not in expected)
    return "; without quotes it is one" if is_written_so else f"; did you mean {meant}?"


_WORDS = re.compile(r"[\w.*/: ,\[\]()-]{1,60}")
_NULLS = ("none", "null", "nil", "undefined")
_TRUE = ("true", "yes", "on")
_BOOLS = (*_TRUE, "false", "no", "off")
_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
"""A number as TOML writes it: with digits on both sides of the point, and no zeros before it."""


def _number_of(text: str) -> str:
    """Return a number as TOML writes it; empty if a text is none."""
    try:
        number = float(text)
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else str(number)


def _limited(text: str, constraint: Any) -> str:
    if isinstance(constraint, Ge):
        return f"{text} from {constraint.ge}"
    if isinstance(constraint, Gt):
        return f"{text} above {constraint.gt}"
    if isinstance(constraint, Interval):
        low = f"from {constraint.ge}" if constraint.gt is None else f"above {constraint.gt}"
        if constraint.lt is None:
            return f"{text} {low} to {constraint.le}"
        return f"{text} {low} and below {constraint.lt}"
    if isinstance(constraint, MinLen) and constraint.min_length == 1:
        return text.replace("a ", "a non-empty ", 1)
    raise TypeError(f"no words for {constraint!r}")
