"""What a DataLoader of the user's says of its Dataset, and what gives way to the one order.

Its batch size is that of all ranks, its order one that does not depend on how many there are. What
cannot be had in that order, such as streams and batches that a sampler puts together, is refused
with the command that packs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from hpctrain.data.loading.map_style.dataset import MapDataset, length_of
from hpctrain.errors import ConfigError
from hpctrain.utils.text import plural


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """A Dataset, and what its DataLoader says of how it is to be served; None: it says nothing.

    Attributes:
        dataset: with its `collate_fn` and workers.
        batch_size: of all ranks.
        shuffle: whether epochs differ in their order.
        drop_last: whether the last, smaller batch is left out.
        weights: how often each sample is drawn, relative to others.
        draws: samples of an epoch, where they are drawn by weight.
    """

    dataset: MapDataset
    batch_size: int | None = None
    shuffle: bool | None = None
    drop_last: bool | None = None
    weights: Any = None
    draws: int | None = None

    @property
    def from_loader(self) -> bool:
        """Whether there was a DataLoader."""
        return self.batch_size is not None


def in_turn(given: Any, source: str) -> list[Any]:
    """Return the loaders that an evaluation goes through, as Lightning flattens them.

    Args:
        given: a loader, a Dataset, a CombinedLoader, or a collection of them, nested or not.
        source: what to call it.

    Raises:
        ConfigError: if they would be gone through at the same time.
    """
    mode = getattr(given, "_mode", None)
    if mode is not None and hasattr(given, "flattened"):  # Lightning's CombinedLoader
        if mode != "sequential" and len(given.flattened) > 1:
            raise ConfigError(
                f'{source}: CombinedLoader(..., "{mode}") gives a batch of each loader at a time, '
                'cut as one process would cut them: "sequential" goes through them in turn, and '
                "torch.utils.data.StackDataset gives a sample of each at a time"
            )
        return list(given.flattened)
    if not _is_collection(given):
        return [given]
    items = given.values() if isinstance(given, Mapping) else given
    return [each for item in items for each in in_turn(item, source)]


def _is_collection(given: Any) -> bool:
    """Tell whether there are loaders or Datasets in it: a list of samples is a Dataset itself."""
    if not isinstance(given, Mapping | list | tuple):
        return False
    items = list(given.values() if isinstance(given, Mapping) else given)
    return bool(items) and all(
        isinstance(each, DataLoader | Dataset | Intake)
        or hasattr(each, "flattened")
        or _is_collection(each)
        for each in items
    )


def taken_in(given: Any, source: str, *, workers: int, seeded: bool) -> Intake:
    """Return what to serve of what the user gave.

    Args:
        given: a Dataset, or a DataLoader.
        source: what to call it, such as `my_data:make_train`.
        workers: where there is no DataLoader that says it.
        seeded: whether each sample has draws of its own.

    Raises:
        ConfigError: if it cannot be served in the one order.
        DatasetError: if it has no samples.
    """
    several = in_turn(given, source)
    if len(several) == 1 and several != [given]:
        raise ConfigError(
            f"{source}: one loader in a {type(given).__name__}, of which Lightning makes batches "
            f"that are a {type(given).__name__}, too: give the loader itself"
        )
    if several != [given]:
        raise ConfigError(
            f"{source}: {plural(len(several), 'loader')} in a {type(given).__name__}; one order is "
            "of one Dataset. Put theirs together: torch.utils.data.StackDataset for a sample of "
            "each at a time, torch.utils.data.ConcatDataset for all of one after the other"
        )
    if not isinstance(given, DataLoader):
        dataset = _map_style(given, source)
        made = MapDataset(
            source=source,
            dataset=dataset,
            workers=workers,
            seeded=seeded,
            samples=length_of(dataset, source),
        )
        return Intake(dataset=made)
    dataset = _map_style(given.dataset, source)
    batches: Any = given.batch_sampler
    if batches is None:
        raise ConfigError(
            f"{source}: batch_size=None leaves batches to the Dataset, and passes are cut of "
            f"samples: have it return samples, or {_packed(source)}"
        )
    if type(batches) is not BatchSampler:
        raise ConfigError(
            f"{source}: {type(batches).__name__} puts batches together, whose samples no other "
            f"number of ranks could find: give a batch_size, or {_packed(source)}"
        )
    sampler: Any = batches.sampler
    if type(sampler) is SubsetRandomSampler:
        dataset = Subset(dataset, list(sampler.indices))
    samples = length_of(dataset, source)
    shuffle, weights = _order_of(sampler, samples, source)
    made = MapDataset(
        source=source,
        dataset=dataset,
        collate=_collate_of(given),
        workers=given.num_workers,
        prefetch=given.prefetch_factor or 2,
        worker_init=given.worker_init_fn,
        seeded=seeded,
        samples=samples,
    )
    return Intake(
        dataset=made,
        batch_size=batches.batch_size,
        shuffle=shuffle,
        drop_last=batches.drop_last,
        weights=weights,
        draws=None if weights is None else sampler.num_samples,
    )


def only_samples(intake: Intake) -> Intake:
    """Return the same for an evaluation: every sample once, whatever a DataLoader says."""
    return dataclasses.replace(intake, shuffle=None, drop_last=None, weights=None, draws=None)


def _map_style(dataset: Any, source: str) -> Any:
    """Return a Dataset whose samples can be asked for by number.

    Raises:
        ConfigError: if it is none.
    """
    if isinstance(dataset, IterableDataset) or (
        hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")
    ):
        raise ConfigError(
            f"{source}: {type(dataset).__qualname__} is a stream, whose samples cannot be asked "
            f"for by number, as a run that goes on has to: {_packed(source)}"
        )
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        missing = "__getitem__" if not hasattr(dataset, "__getitem__") else "__len__"
        raise ConfigError(
            f"{source}: {type(dataset).__qualname__} is no Dataset: it has no {missing}"
        )
    return dataset


def _packed(source: str) -> str:
    return f"pack it: `python -m hpctrain data pack dataset={source} data/x`"


def _order_of(sampler: Any, samples: int, source: str) -> tuple[bool, Any]:
    """Return whether a sampler shuffles, and its weights.

    Raises:
        ConfigError: if what it does is neither.
    """
    kind = type(sampler)
    if kind is SequentialSampler:
        return False, None
    if kind is SubsetRandomSampler:
        return True, None
    if kind is DistributedSampler:
        return bool(sampler.shuffle), None
    if kind is RandomSampler and not sampler.replacement and sampler.num_samples == samples:
        return True, None
    if kind is WeightedRandomSampler and sampler.replacement:
        return True, sampler.weights
    what = kind.__name__
    if kind is RandomSampler:
        what += " with replacement or num_samples"
    if kind is WeightedRandomSampler:
        what += " without replacement"
    raise ConfigError(
        f"{source}: {what} chooses samples in an order of its own, which no other number of ranks "
        "has: leave it out, and give shuffle=True or False, a WeightedRandomSampler, or a Subset; "
        f"or {_packed(source)}"
    )


def _collate_of(loader: DataLoader[Any]) -> Any:
    """Return a `collate_fn` that is not torch's own."""
    from torch.utils.data import default_collate

    return None if loader.collate_fn is default_collate else loader.collate_fn
