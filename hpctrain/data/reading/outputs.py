"""Where rows go that are read: runs of them to memory in one piece, or each to its own place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Field
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.order.ragged import as_slice, within
from hpctrain.data.reading.destinations import Box, Destinations
from hpctrain.data.reading.helpers import ThreadMemory
from hpctrain.data.reading.pieces import Bytes, Pieces
from hpctrain.data.reading.targets import LEAST_DIRECT_BYTES, InPieces, RowByRow, Staged, Target
from hpctrain.data.reading.vectors import MOST_VECTORS, can_read_vectors


class Output(Protocol):
    """Takes rows of one field. Several threads may hand over rows of their own."""

    def target(self, field: Field, pieces: Pieces) -> Target:
        """Return where the bytes of pieces go, as they are in the file."""
        ...

    def settle(self, field: Field, pieces: Pieces) -> None:
        """Make values of this machine of pieces whose bytes are there."""
        ...

    def put(self, field: Field, places: Int64s, values: npt.NDArray[Any], box: Box) -> None:
        """Copy values of rows to their places.

        Args:
            field: that they are of.
            places: (rows,) int64, at least one.
            values: (rows, *shape of the box), in any byte order.
            box: the part of each row that they are.
        """
        ...

    def rows(self, field: Field, place: int, count: int) -> AbstractContextManager[Bytes]:
        """Return memory for consecutive rows, (count, row_bytes): native when the context ends."""
        ...


class InRuns:
    """Places are rows of an array: a run stays together."""

    def __init__(self, out: Bytes) -> None:
        """Take (places, row_bytes) uint8, C-contiguous."""
        self._out = out

    def target(self, field: Field, pieces: Pieces) -> Target:
        return InPieces(self._out, pieces.places * field.row_bytes, pieces.counts * field.row_bytes)

    def settle(self, field: Field, pieces: Pieces) -> None:
        if not field.dtype.isnative:
            for place, count in zip(pieces.places.tolist(), pieces.counts.tolist(), strict=True):
                self._out[place : place + count].view(field.dtype).byteswap(inplace=True)

    def put(self, field: Field, places: Int64s, values: npt.NDArray[Any], box: Box) -> None:
        native = field.dtype.newbyteorder("=")
        rows = self._out.view(native).reshape(len(self._out), *field.shape)
        part = (as_slice(places), *box)
        rows[part] = values

    def rows(self, field: Field, place: int, count: int) -> AbstractContextManager[Bytes]:
        return nullcontext(self._out[place : place + count])


class Scattered:
    """Places are indices of a list of destinations: every row goes its own way."""

    def __init__(self, into: Destinations, places: Int64s, staging: ThreadMemory) -> None:
        """Send row i to place `places[i]` of the destinations."""
        self._into = into
        self._rows = into.locate(places)
        self._staging = staging

    def target(self, field: Field, pieces: Pieces) -> Target:
        counts = pieces.counts
        rows = self._rows[np.repeat(pieces.places, counts) + within(counts)]
        # Merged with neighbours, as ExtentReader does, they still fit one call.
        fitting = can_read_vectors() and int(counts.max()) <= MOST_VECTORS // 2
        if fitting and field.row_bytes >= LEAST_DIRECT_BYTES and field.dtype.isnative:
            return RowByRow(self._into, rows, counts)
        return Staged(self._into, field, rows, counts, self._staging)

    def settle(self, field: Field, pieces: Pieces) -> None:
        """Do nothing: what is staged is made native as it is copied."""

    def put(self, field: Field, places: Int64s, values: npt.NDArray[Any], box: Box) -> None:
        self._into.put(field, self._rows[places], values, box)

    @contextmanager
    def rows(self, field: Field, place: int, count: int) -> Iterator[Bytes]:
        rows = self._staging.take(count * field.row_bytes).reshape(count, field.row_bytes)
        yield rows
        self._into.put_rows(self._rows[place : place + count], rows)
