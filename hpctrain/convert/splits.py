"""Which rows go to which split: pure arithmetic, the same on every machine."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hpctrain.data.arrays import Int64s
from hpctrain.data.order.permutation import derive_key, permutation
from hpctrain.errors import DatasetError, UsageError

# What a key is for: which rows a split gets and their order share nothing.
_SPLITS, _ORDER = 0, 1
_SPLIT = re.compile(r"([A-Za-z0-9_][\w.-]*)=(\d*\.?\d+)")


def parse_splits(text: str) -> dict[str, float]:
    """Return the fractions of a text such as "train=0.9,validation=0.1", by name.

    Raises:
        UsageError: if they are none, or make more than the whole.
    """
    fractions: dict[str, float] = {}
    for part in text.split(","):
        match = _SPLIT.fullmatch(part.strip())
        if match is None or match[1] in fractions:
            raise UsageError(f"{text}: write splits as train=0.9,validation=0.1")
        fractions[match[1]] = float(match[2])
    if min(fractions.values()) <= 0 or math.fsum(fractions.values()) > 1 + 1e-9:
        raise UsageError(f"{text}: the fractions have to be above 0, and at most 1 together")
    return fractions


def split_sizes(samples: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """Return how many samples each split gets; fractions of 1 together give all of them.

    Raises:
        DatasetError: if one gets none.
    """
    stops = [round(samples * stop) for stop in np.cumsum(list(fractions.values())).tolist()]
    sizes = dict(zip(fractions, np.diff([0, *stops]).tolist(), strict=True))
    for name, size in sizes.items():
        if size == 0:
            raise DatasetError(
                f'the split "{name}" gets none of {samples} samples: give it a larger fraction'
            )
    return sizes


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows of a source, in the order in which they are written.

    Attributes:
        samples: how many.
        rows: (samples,) int64; None: the rows 0 to samples - 1.
    """

    samples: int
    rows: Int64s | None

    def part(self, start: int, stop: int) -> Int64s:
        """Return the rows at some places, (stop - start,) int64."""
        if self.rows is None:
            return np.arange(start, stop, dtype=np.int64)
        return self.rows[start:stop]


def select(
    samples: int, fractions: Mapping[str, float], seed: int, shuffle: bool
) -> dict[str, Selection]:
    """Return the rows of every split; without fractions, all of them under the name "".

    Rows are in the order of the source unless they are to be shuffled.
    """
    if not fractions:
        rows = permutation(derive_key(seed, _ORDER), samples) if shuffle else None
        return {"": Selection(samples, rows)}
    drawn = permutation(derive_key(seed, _SPLITS), samples)
    selections: dict[str, Selection] = {}
    begin = 0
    for name, size in split_sizes(samples, fractions).items():
        rows = drawn[begin : begin + size]
        # Drawn at random, they are shuffled as they are.
        selections[name] = Selection(size, rows if shuffle else np.sort(rows))
        begin += size
    return selections
