"""In which order files follow each other: as people number them, or by the letters of their names.

A run keeps the order that it began with, so who opens files is told which one it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any, Literal

FileOrder = Literal["natural", "name"]
"""2 before 10; or 10 before 2, as their letters sort."""

_DIGITS = re.compile("([0-9]+)")


def in_order(paths: Iterable[str], order: FileOrder = "natural") -> list[str]:
    """Return paths in an order that depends on nothing but them."""
    return sorted(paths, key=order_key(order))


def order_key(order: FileOrder) -> Callable[[str], Any]:
    """Return what sorts paths in this order."""
    return natural_key if order == "natural" else str


def natural_key(path: str) -> tuple[object, ...]:
    """Return what sorts paths folder by folder, and the numbers in their names by value.

    Equal numbers that are written differently, 7 and 007, follow by their letters.
    """
    parts = [_DIGITS.split(part) for part in PurePath(path).parts]
    # Text and numbers alternate, so that numbers meet numbers only.
    return (
        [[int(each) if i % 2 else each for i, each in enumerate(part)] for part in parts],
        path,
    )
