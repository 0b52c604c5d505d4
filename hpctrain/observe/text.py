"""Numbers as people read them: counts, sizes, durations, rates."""

from __future__ import annotations

import math

_DAY_SECONDS = 86_400
_SIZE_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


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
