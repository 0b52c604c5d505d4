"""What the values of options mean: from text to numbers, sizes and names."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from hpctrain.data.dataset import SUPPORTED_DTYPES
from hpctrain.errors import UsageError

T = TypeVar("T")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmg]i?|)b?", re.IGNORECASE)
_PIXELS = re.compile(r"(\d+)x(\d+)")
_LIMITS = re.compile(r"([^=]+)=(-?[\d.e+-]+):(-?[\d.e+-]+)")


def explained(convert: Callable[[str], T]) -> Callable[[str], T]:
    """Return a converter whose UsageErrors argparse tells with the name of the option."""

    def converter(text: str) -> T:
        try:
            return convert(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return converter


@explained
def num_bytes(text: str) -> int:
    """Return the bytes of a size such as 512, 64MB or 1GiB."""
    match = _SIZE.fullmatch(text)
    if match is None or not float(match[1]):
        raise UsageError(f"{text}: write a size as 256MiB or 1GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@explained
def count(text: str) -> int:
    """Return a number of things, at least one."""
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"{text}: this has to be a whole number above 0")
    return int(text)


@explained
def seed(text: str) -> int:
    """Return a seed, 0 to 2**64 - 1."""
    if not text.isdecimal() or int(text) >= 2**64:
        raise UsageError(f"{text}: a seed is a whole number from 0 to 2**64 - 1")
    return int(text)


@explained
def names(text: str) -> list[str]:
    """Return the names of a list such as image,label."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise UsageError(f"{text}: write fields as image,label")
    return found


@explained
def pixels(text: str) -> tuple[int, int]:
    """Return the rows and columns of a text such as 224x224."""
    match = _PIXELS.fullmatch(text)
    if match is None or "0" in match.groups():
        raise UsageError(f"{text}: write rows and columns as 224x224")
    return int(match[1]), int(match[2])


@explained
def axis(text: str) -> tuple[str, int]:
    """Return field and axis of a text such as temperature=1; a number alone is for all others."""
    field, _, number = text.rpartition("=")
    if not re.fullmatch(r"-?\d+", number):
        raise UsageError(f"{text}: write an axis as 1, or as temperature=1")
    return field, int(number)


@explained
def dtype(text: str) -> tuple[str, np.dtype[Any]]:
    """Return field and dtype of a text such as label=int64."""
    field, _, name = text.partition("=")
    if not field or name not in SUPPORTED_DTYPES:
        raise UsageError(f"{text}: write a dtype as label=int64, one of {_joined_dtypes()}")
    return field, np.dtype(name)


@explained
def limits(text: str) -> tuple[str, tuple[float, float]]:
    """Return field and range of a text such as label=0:9."""
    match = _LIMITS.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        least, largest = float(match[2]), float(match[3])
        if least > largest:
            raise ValueError
    except ValueError:
        raise UsageError(f"{text}: write a range as label=0:9") from None
    return match[1], (least, largest)


def _joined_dtypes() -> str:
    return ", ".join(sorted(SUPPORTED_DTYPES))
