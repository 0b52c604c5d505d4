"""Which batch had no finite gradient, on which rank, and what its samples were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpctrain.data.loading.loader import TrainLoader
from hpctrain.data.permutation import Int64s
from hpctrain.errors import HpctrainError
from hpctrain.launch.process_group import World
from hpctrain.utils.text import listed

_SHOWN_RUNS = 8
_SHOWN_RANKS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BadBatch:
    """A global batch that was not applied.

    Attributes:
        step: that it led to.
        epoch: that it is of.
        start: samples of the epoch before it.
        global_size: samples of all ranks.
        loss_is_finite: on this rank; where it is so on all, the gradient alone overflowed.
    """

    step: int
    epoch: int
    start: int
    global_size: int
    loss_is_finite: bool


def explain(batches: Sequence[BadBatch], loader: TrainLoader, world: World) -> str:
    """Return where the newest run of bad batches began. Collective: all ranks.

    Ranks whose own loss was not finite read their samples of that batch again and look for values
    that are not.

    Args:
        batches: those that are still known, oldest first; the same on all ranks but for
            `loss_is_finite`.
        loader: that served them.
        world: the ranks.
    """
    if not batches:
        return "which batch it was is not known any more"
    first = batches[-1]
    for batch in reversed(batches):
        if batch.step < first.step - 1:
            break
        first = batch
    story = None if first.loss_is_finite else _suspects(first, loader)
    stories = world.communicator.all_gather(None if story is None else (world.topology.host, story))
    where = (
        f"first in step {first.step} (epoch {first.epoch}, samples {first.start + 1} to "
        f"{first.start + first.global_size} of it)"
    )
    told = [
        f"rank {rank} on {found[0]}: {found[1]}"
        for rank, found in enumerate(stories)
        if found is not None
    ]
    if not told:
        return f"{where}; the loss was finite on every rank, the gradient overflowed"
    more = f"; and on {len(told) - _SHOWN_RANKS} more ranks" if told[_SHOWN_RANKS:] else ""
    return f"{where}; the loss was not finite on {'; '.join(told[:_SHOWN_RANKS])}{more}"


def _suspects(batch: BadBatch, loader: TrainLoader) -> str:
    """Return this rank's samples of a batch: those with values that are not finite, or all."""
    rows = loader.rows(batch.epoch, batch.start, batch.start + batch.global_size)
    try:
        values = loader.read(rows)
    except HpctrainError as error:
        return f"{listed_rows(loader, rows)}, which cannot be read again: {error}"
    bad = {
        name: rows[~np.isfinite(array.reshape(len(rows), -1)).all(axis=1)]
        for name, array in values.items()
        if array.dtype.kind in "fc"
    }
    found = [f"{name} of {listed_rows(loader, those)}" for name, those in bad.items() if len(those)]
    if found:
        return f"not finite in the data: {', '.join(found)}"
    return f"{listed_rows(loader, rows)} (all values of the data are finite)"


def listed_rows(loader: TrainLoader, rows: Int64s) -> str:
    """Return rows of the dataset as shards and their rows, such as "a.h5 rows 3, 7-9"."""
    texts: list[str] = []
    shard = ""
    runs = loader.runs(np.sort(rows))
    for name, first, last in runs:
        run = str(first) if first == last else f"{first}-{last}"
        texts.append(run if name == shard else f"{name} row{'s' * (last > first)} {run}")
        shard = name
    return listed(texts, _SHOWN_RUNS)
