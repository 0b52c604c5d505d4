"""Text for people."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of text as lines whose columns stand below each other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def plural(number: int, noun: str) -> str:
    """Return a number with its noun: "1 shard", "1,024 shards"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
