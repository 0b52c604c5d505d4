"""What reads rows: the one thing that the loader knows of files."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Dataset
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.reading.destinations import Destinations


class RowReader(Protocol):
    """Reads rows of a dataset. For one thread at a time."""

    @property
    def dataset(self) -> Dataset:
        """What is read."""
        ...

    @property
    def files_opened(self) -> int:
        """How often a file was opened; at best once for each."""
        ...

    def read_runs(
        self, name: str, rows: Int64s, counts: Int64s, out: npt.NDArray[np.uint8], places: Int64s
    ) -> None:
        """Read runs of consecutive rows of a field, in native byte order.

        Args:
            name: of the field.
            rows: (runs,) int64, the first row of each run, counted over all shards.
            counts: (runs,) int64, rows.
            out: (places, row_bytes) uint8, C-contiguous.
            places: (runs,) int64, where in `out` each run goes.

        Raises:
            DatasetError: naming file, field and row that cannot be read.
        """
        ...

    def scatter_runs(
        self, name: str, rows: Int64s, counts: Int64s, into: Destinations, places: Int64s
    ) -> None:
        """Read runs of consecutive rows of a field, each row to a place of its own.

        Args:
            name: of the field.
            rows: (runs,) int64, the first row of each run, counted over all shards.
            counts: (runs,) int64, rows.
            into: where the rows go, in native byte order.
            places: (rows of all runs,) int64, run after run; -1: the row is not wanted.

        Raises:
            DatasetError: naming file, field and row that cannot be read.
        """
        ...

    def close(self) -> None:
        """Close all files. Reading on opens them again."""
        ...


class SteadyReader(RowReader, Protocol):
    """Reads rows of a dataset, and counts what goes wrong. For one thread at a time."""

    @property
    def failed_reads(self) -> int:
        """How often a read failed, whatever came of it."""
        ...
