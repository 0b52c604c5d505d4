"""A dataset that hpctrain can train on already, as a source: to split it, or store it anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import h5py
import numpy as np

from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.finding.discovery import open_dataset
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.reading.access import RowAccess
from hpctrain.data.sources.arrays import plain_attributes
from hpctrain.data.sources.source import Arrays, identity_of, native


@dataclass(frozen=True)
class Indexed:
    """The rows of a dataset, read as training reads them.

    Attributes:
        dataset: as opened.
        attributes: by field, those of the first shard.
    """

    dataset: Dataset
    attributes: Mapping[str, Mapping[str, Any]]

    @classmethod
    def open(cls, pattern: str, fields: Sequence[str] | None = None) -> Indexed:
        """Open a dataset.

        Raises:
            DatasetError: as `open_dataset` does.
        """
        dataset = open_dataset(pattern, fields)
        return cls(dataset, read_attributes(dataset))

    @property
    def name(self) -> str:
        return self.dataset.source

    @property
    def samples(self) -> int:
        return self.dataset.samples

    @cached_property
    def fields(self) -> Mapping[str, Field]:
        return {
            name: native(field.shape, field.dtype, name, self.name)
            for name, field in self.dataset.fields.items()
        }

    @cached_property
    def identity(self) -> str:
        paths = [shard.path for shard in self.dataset.shards]
        return f"{identity_of(paths)} {list(self.dataset.fields)}"

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "attributes": self.attributes}

    def read(self, rows: Int64s) -> Arrays:
        """Return samples, as `Source.read` does."""
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        starts = np.flatnonzero(np.diff(ascending, prepend=-2) != 1)
        counts = np.diff(starts, append=len(rows))
        is_in_order = bool((order == np.arange(len(rows))).all())
        arrays = {}
        for name, field in self.fields.items():
            values = np.empty((len(rows), field.row_bytes), np.uint8)
            self._access.read_runs(name, ascending[starts], counts, values, starts)
            if not is_in_order:
                shuffled = np.empty_like(values)
                shuffled[order] = values
                values = shuffled
            arrays[name] = values.view(field.dtype).reshape(len(rows), *field.shape)
        return arrays

    @cached_property
    def _access(self) -> RowAccess:
        return RowAccess(self.dataset)


def read_attributes(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Return the attributes of every field, as the first shard has them."""
    with h5py.File(dataset.shards[0].path, "r", locking=False) as file:
        return {name: plain_attributes(file[name]) for name in dataset.fields}
