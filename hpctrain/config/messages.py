"""What is wrong with a config: one mistake a line, all of them in one message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from hpctrain.errors import ConfigError
from hpctrain.utils.text import printable

KeyPath = tuple[str, ...]

_LONGEST = 60
"""Characters of a value or of a key that are shown."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class _NotGiven:
    """The value of a key that has none: TOML has no null, but None may be shown one day."""


NOT_GIVEN: Final = _NotGiven()


class Verbatim(str):
    """Text to be shown as it was typed, not as a string value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """One thing to mend.

    Attributes:
        key: such as ("data", "train"); empty where not even the key could be read.
        problem: what is wrong, and what would be right.
        value: what was given; NOT_GIVEN for a key that is missing.
        line: in the config file, from 1; None for what stands in no file.
        override: position on the command line, from 0; None for what stands in the file.
    """

    key: KeyPath
    problem: str
    value: Any = NOT_GIVEN
    line: int | None = None
    override: int | None = None

    def place(self) -> str:
        """Return where to mend it, such as "line 34"; empty if that is no place of its own."""
        if self.override is not None:
            return "override"
        return "" if self.line is None else f"line {self.line}"

    def __str__(self) -> str:
        given = "" if self.value is NOT_GIVEN else shown(self.value)
        subject = " = ".join(part for part in (dotted(self.key), given) if part)
        return f"{subject}: {self.problem}"


def config_error(path: str, mistakes: Sequence[Mistake]) -> ConfigError:
    """Return one error with all mistakes: those of the file by line, then the overrides'."""
    ordered = sorted(
        mistakes,
        key=lambda item: (
            item.override is not None,
            item.line is None,
            item.line or item.override or 0,
        ),
    )
    count = "1 mistake" if len(ordered) == 1 else f"{len(ordered)} mistakes"
    width = max(len(item.place()) for item in ordered)
    gap = "  " if width else ""
    lines = [f"  {item.place():{width}}{gap}{item}" for item in ordered]
    return ConfigError("\n".join([f"{printable(path)}: {count}", *lines]))


def reason_of(error: Exception) -> str:
    """Return the reason of an operating system's error, or of a null byte in a path."""
    return getattr(error, "strerror", None) or str(error)


def dotted(key: KeyPath) -> str:
    """Return a key as it stands in TOML, cut where it is long."""
    parts = (part if _BARE_KEY.fullmatch(part) else f'"{part}"' for part in key)
    return _cut(".".join(parts))


def shown(value: Any) -> str:
    """Return a value as it stands in TOML, cut where it is long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{...}" if value else "{}"
    if isinstance(value, list | tuple):
        # Inner lists are not followed: what is shown stays short, however deep the nest.
        items = ["[...]" if isinstance(item, list) else shown(item) for item in value[:_LONGEST]]
        return _cut("[" + ", ".join(items) + "]")
    if isinstance(value, str):
        return _cut(value if isinstance(value, Verbatim) else f'"{value}"')
    if isinstance(value, int) and abs(value) >= 10**_LONGEST:
        return "a very long number"
    return _cut(str(value))


def _cut(text: str) -> str:
    text = printable(text[: _LONGEST + 1])
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
