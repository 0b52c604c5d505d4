"""Text for people: counts, sizes, durations, lists that are cut, the word that was meant."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hpctrain.errors import one_line

_DAY_SECONDS = 86_400
_SIZE_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
_LONGEST_WORD = 60
"""Characters; nothing longer is a slip of the finger, and it is slow to compare."""


def number(value: float) -> str:
    """Return about three digits of `value`, those before the point in full: 4,560, 12.3, 0.42."""
    if not math.isfinite(value):
        return str(value)
    magnitude = abs(value)
    if magnitude >= 99.95:
        return f"{value:,.0f}"
    if magnitude >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}"


def metric(value: float) -> str:
    """Return four significant digits of a loss or a metric."""
    return f"{value:.4g}"


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return a count with its noun: "1 rank", "1,024 ranks"."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def size(num_bytes: int) -> str:
    """Return a size in decimal units: "640 bytes", "95.8 kB", "1.20 GB"."""
    value, unit = float(num_bytes), 0
    while value >= 999.5 and unit < len(_SIZE_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return plural(num_bytes, "byte") if unit == 0 else f"{number(value)} {_SIZE_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Return whole hours, minutes and seconds: "0:00:31", "2 days 3:04:05"."""
    days, rest = divmod(max(0, round(seconds)), _DAY_SECONDS)
    minutes, second = divmod(rest, 60)
    hour, minute = divmod(minutes, 60)
    clock = f"{hour}:{minute:02}:{second:02}"
    return f"{plural(days, 'day')} {clock}" if days else clock


def percent(part: float, whole: float) -> str:
    """Return the share of `part` in `whole`: "65 %", "<1 %"; of nothing it is "0 %"."""
    share = 100 * part / whole if whole > 0 else 0.0
    return "<1 %" if 0 < share < 0.5 else f"{share:.0f} %"


def ranges(numbers: Iterable[int], to: str = " to ") -> list[str]:
    """Return sorted numbers as ranges: "0", "4 to 7"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return [to.join(map(str, ends)) for ends in found]


def listed(items: Sequence[str], most: int = 4, *, separator: str = ", ") -> str:
    """Return the first of some names, and how many more there are: "a, b and 1,022 more"."""
    more = f" and {len(items) - most:,} more" if items[most:] else ""
    return separator.join(items[:most]) + more


def first_lines(lines: Sequence[str], most: int, indent: str = "", noun: str = "") -> list[str]:
    """Return the first lines, and one that says how many more there are of `noun`."""
    more = " ".join(filter(None, (f"and {len(lines) - most:,} more", noun)))
    return [indent + line for line in lines[:most]] + ([indent + more] if lines[most:] else [])


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of text as lines whose columns stand below each other."""
    rows = [[printable(text) for text in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "", quote: str = "") -> str:
    """Return "; did you mean ...?" for a near miss, else nothing."""
    close = nearest(word, known)
    return "" if close is None else f"; did you mean {prefix}{quote}{close}{quote}?"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return which of the known words was meant, if one is close."""
    if len(word) > _LONGEST_WORD:
        return None
    import difflib

    by_case = {item.lower(): item for item in known}
    close = difflib.get_close_matches(word.lower(), list(by_case), n=1)
    return by_case[close[0]] if close else None


def printable(text: str) -> str:
    """Escape what would garble a terminal or a log: control characters, line feeds, bidi marks."""
    return one_line(text)


def printable_lines(text: str) -> str:
    """Escape the same in text of several lines, which stay lines."""
    return "\n".join(printable(line) for line in text.split("\n"))
