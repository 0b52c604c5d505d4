"""What is wrong with a config: one mistake a line, all of them in one message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.errors import ConfigError

_LONGEST_VALUE = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """One thing to mend.

    Attributes:
        key: dotted, such as "data.train".
        text: what is wrong, and what would be right.
        line: in the config file; None for what stands nowhere, or in an override.
        override: the command-line override that the value comes from.
    """

    key: str
    text: str
    line: int | None = None
    override: str | None = None

    def __str__(self) -> str:
        where = ""
        if self.override is not None:
            where = f"override {printable(self.override)}: "
        elif self.line is not None:
            where = f"line {self.line}: "
        return f"{where}{printable(self.key)}{self.text}"


def config_error(path: str, mistakes: Sequence[Mistake]) -> ConfigError:
    """Return one error that tells all mistakes, in the order of the file."""
    ordered = sorted(mistakes, key=lambda item: (item.override is not None, item.line or 0))
    count = "1 mistake" if len(ordered) == 1 else f"{len(ordered)} mistakes"
    lines = [f"{printable(path)}: {count}", *(f"  {mistake}" for mistake in ordered)]
    return ConfigError("\n".join(lines))


def shown(value: Any) -> str:
    """Return a value as it stands in TOML, cut where it is long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        text = "[" + ", ".join(shown(item) for item in value[:8]) + "]"
    else:
        try:
            text = f'"{value}"' if isinstance(value, str) else str(value)
        except ValueError:  # an integer with more digits than Python prints
            return "a number of thousands of digits"
    return printable(text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "...")


def printable(text: str) -> str:
    """Escape what would garble a terminal or a log."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" for a near miss, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
