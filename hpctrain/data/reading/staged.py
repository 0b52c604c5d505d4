"""Rows to places of their own, by a reader that only knows runs."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hpctrain.data.dataset import Dataset
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.order.ragged import groups_of
from hpctrain.data.reading.destinations import Destinations
from hpctrain.data.reading.helpers import ThreadMemory
from hpctrain.data.reading.pieces import Bytes
from hpctrain.data.reading.targets import STAGED_BYTES


class RunReader(Protocol):
    """Reads runs of rows, as `RowReader.read_runs` does."""

    @property
    def dataset(self) -> Dataset: ...

    def read_runs(
        self, name: str, rows: Int64s, counts: Int64s, out: Bytes, places: Int64s
    ) -> None: ...


def scatter_by_runs(
    reader: RunReader,
    staging: ThreadMemory,
    name: str,
    rows: Int64s,
    counts: Int64s,
    into: Destinations,
    places: Int64s,
) -> None:
    """Read runs of consecutive rows, each to its place, as `RowReader.scatter_runs` does.

    They are read by `reader` to the memory of `staging`, and copied from there.
    """
    row_bytes = reader.dataset.fields[name].row_bytes
    to = into.locate(places)
    done = 0
    for group in groups_of(counts * row_bytes, STAGED_BYTES):
        some = counts[group]
        size = int(some.sum())
        out = staging.take(size * row_bytes).reshape(size, row_bytes)
        reader.read_runs(name, rows[group], some, out, np.cumsum(some) - some)
        into.put_rows(to[done : done + size], out)
        done += size
