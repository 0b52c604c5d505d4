"""Rows that are the same in all of a file, or of a group of one: attributes, which are known."""

from __future__ import annotations

import numpy as np

from hpctrain.data.arrays import Bytes, Int64s, within
from hpctrain.data.dataset import Dataset
from hpctrain.data.reading.scatter import Destinations, scatter_by_runs
from hpctrain.data.reading.threads import ThreadMemory
from hpctrain.data.view import Part


class ConstantReader:
    """Hands out values that each shard has one of. Reads no file."""

    def __init__(self, part: Part) -> None:
        """Take the values of a part."""
        self.dataset: Dataset = part.dataset
        self.files_opened = 0
        self._stops = part.dataset.shard_stops
        self._staging = ThreadMemory()
        self._rows = {
            name: np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
            for name, values in (part.constants or {}).items()
        }

    def read_runs(
        self, name: str, rows: Int64s, counts: Int64s, out: Bytes, places: Int64s
    ) -> None:
        """Copy the values of runs of rows, as `RowReader.read_runs` does."""
        inside = within(counts)
        shards = np.searchsorted(self._stops, np.repeat(rows, counts) + inside, side="right")
        out[np.repeat(places, counts) + inside] = self._rows[name][shards]

    def scatter_runs(
        self, name: str, rows: Int64s, counts: Int64s, into: Destinations, places: Int64s
    ) -> None:
        """Copy the values of runs of rows, each to its place, as `RowReader.scatter_runs` does."""
        scatter_by_runs(self, self._staging, name, rows, counts, into, places)

    def close(self) -> None:
        """Do nothing: no file is open."""
