"""What `[data.normalize]` says of each field: numbers, or where to take them from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpctrain.utils.text import did_you_mean

STATISTICS = ("stats", "channel_stats")
"""Words for the numbers in `stats.json` of the training data: of a whole field, or a channel."""

EXPECTED = '"stats", "channel_stats", or a table with mean and std'
_KEYS = ("mean", "std")


@dataclass(frozen=True, slots=True)
class Normalization:
    """Values become (value - mean) / std.

    Attributes:
        mean: one number, or one a channel; the first axis of a sample is its channels.
        std: the same, above 0.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


def normalization_of(given: Any) -> Normalization | str:
    """Return what a field's entry says, a word of STATISTICS as it is; `problems_of` found none."""
    if isinstance(given, str):
        return given
    return Normalization(**{key: _numbers(value) for key, value in given.items()})


def problems_of(given: Any) -> dict[tuple[str, ...], str]:
    """Return what is wrong with a field's entry, by the key inside it; () is the entry itself."""
    if isinstance(given, str):
        near = did_you_mean(given, STATISTICS, quote='"')
        return {} if given in STATISTICS else {(): f"expected {EXPECTED}{near}"}
    if not isinstance(given, Mapping) or not given:
        return {(): f"expected {EXPECTED}"}
    problems: dict[tuple[str, ...], str] = {}
    for key, value in given.items():
        if key not in _KEYS:
            problems[key,] = f"unknown key{did_you_mean(key, _KEYS)}; there are mean and std"
        elif (problem := _problem(key, value)) is not None:
            problems[key,] = problem
    if not problems:
        lengths = {len(_numbers(value)) for value in given.values()} - {1}
        if len(lengths) > 1:
            problems["std",] = "mean and std are lists of different length"
    return problems


def _numbers(value: Any) -> tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(float(each) for each in values)


def _problem(key: str, value: Any) -> str | None:
    above = " above 0" if key == "std" else ""
    expected = f"expected a number{above}, or a list of them, one a channel"
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(each) in (int, float) for each in values):
        return expected
    if not all(math.isfinite(each) for each in values):
        return None  # told already, of any number in the file
    return expected if key == "std" and min(values) <= 0 else None
