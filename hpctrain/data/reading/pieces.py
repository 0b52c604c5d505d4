"""Runs of rows, none of which leaves its shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpctrain.data.order.permutation import Int64s

Bytes = npt.NDArray[np.uint8]

Piece = tuple[int, int, int, int]
"""(shard, first row in it, rows, place in the output)"""


class Pieces(NamedTuple):
    """Many of them, each an array of int64 of the same length.

    Attributes:
        shards: indices.
        firsts: the first row of each, counted in its shard.
        counts: rows.
        places: where in the output each goes.
    """

    shards: Int64s
    firsts: Int64s
    counts: Int64s
    places: Int64s

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Pieces:
        """Return the same as arrays."""
        return cls(*np.array(pieces, np.int64).reshape(-1, 4).T)

    def only(self, which: Any) -> Pieces:
        """Return some of them, by index or mask."""
        return Pieces(*(each[which] for each in self))

    def listed(self) -> list[Piece]:
        """Return them one by one."""
        return list(zip(*(each.tolist() for each in self), strict=True))
