"""Single keys from the command line: `section.key=value`, on top of the file's."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from hpctrain.config.messages import Mistake, Verbatim, shown
from hpctrain.config.source import DEEPEST, Source
from hpctrain.utils.text import printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")


def apply_overrides(source: Source, overrides: Sequence[str]) -> list[Mistake]:
    """Set the keys in the source's table; the last of several for the same key counts.

    A word that is no TOML value is taken as a string, so that names and paths need no quotes
    inside those of the shell.

    Returns:
        What could not be set; the other overrides are applied.
    """
    mistakes = []
    for position, override in enumerate(overrides):
        problem = _apply(source, override, position)
        if problem is not None:
            given = Verbatim(override)
            mistakes.append(Mistake(key=(), value=given, problem=problem, override=position))
    return mistakes


def _apply(source: Source, override: str, position: int) -> str | None:
    """Set one key; return why not, if not."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if any("\ud800" <= char <= "\udfff" for char in override):
        return "not UTF-8, which TOML has to be"  # bytes of a command line in another encoding
    if not equals or not _KEY.fullmatch(name):
        return "expected SECTION.KEY=VALUE"
    key = tuple(name.split("."))
    if len(key) > DEEPEST:
        return f"nested more than {DEEPEST} levels deep"
    try:
        value = _value(text.strip())
    except ValueError as error:
        return str(error)
    table = source.table
    for depth, part in enumerate(key[:-1], start=1):
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            return f"{'.'.join(key[:depth])} is {shown(inner)}, which has no keys"
        table = inner
    table[key[-1]] = value
    source.overrides[key] = position
    return None


def _value(text: str) -> Any:
    """Return the value of an override.

    Raises:
        ValueError: with the reason, if there is none.
    """
    if not text:
        raise ValueError("no value; an empty string is '\"\"', quotes and all")
    if "\n" in text:
        raise ValueError("more than one line")
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None
    except tomllib.TOMLDecodeError as error:
        if text[0] not in "[{\"'":
            return text
        reason = re.sub(r"\s*\(at [^()]*\)$", "", str(error))
        raise ValueError(f"not a TOML value: {printable(reason)}") from None
    except ValueError:
        raise ValueError("a number of thousands of digits") from None
