"""Batches in groups that are read at once: how large a sample is, and where groups end."""

from __future__ import annotations

from collections.abc import Iterator

from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.preparation import SamplePreparation


def sample_bytes(dataset: Dataset, preparation: SamplePreparation | None) -> tuple[int, int]:
    """Return what a sample takes as it goes to the device, and besides before that."""
    return (
        (dataset.bytes_per_sample, 0)
        if preparation is None
        else (preparation.row_bytes, preparation.staging_bytes)
    )


def group_bounds(start: int, stop: int, batch: int, batches: int) -> Iterator[list[int]]:
    """Cut start to stop into batches, and yield the bounds of so many batches at a time."""
    for first in range(start, stop, batch * batches):
        last = min(first + batch * batches, stop)
        yield [*range(first, last, batch), last]
