"""A torch Dataset as a run knows it, and what a DataLoader says of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
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

from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Field, Shard
from hpctrain.data.loading.batch import bytes_of
from hpctrain.data.loading.map_style.fetch import Fetcher, FetchError, kept_draws
from hpctrain.data.order.order import sample_keys
from hpctrain.errors import ConfigError, DatasetError, HpctrainError, TrainingError
from hpctrain.utils.text import plural

_LOOKED_AT = 3
"""Samples that a fingerprint is made of."""
_MOST_BYTES = 2**20
"""Of one value that the fingerprint looks at."""
_MOST_OBJECTS = 10_000
"""Of no known kind that it looks into, in one sample: one may know the whole of its Dataset."""
_DEEPEST = 100


@dataclass(frozen=True, kw_only=True)
class MapDataset:
    """A Dataset with all that its DataLoader said of it.

    Attributes:
        source: what the user calls it.
        dataset: the object, with `__len__` and `__getitem__`.
        collate: its `collate_fn`; None: torch's.
        workers: processes of each rank that read; 0: the rank itself does.
        prefetch: passes that each of them is ahead.
        worker_init: its `worker_init_fn`; None: there is none.
        seeded: whether each sample has draws of its own.
        samples: how many there are, as `len()` said when the job began.
    """

    source: str
    dataset: Any
    collate: Callable[[Any], Any] | None = None
    workers: int = 0
    prefetch: int = 2
    worker_init: Callable[[int], Any] | None = None
    seeded: bool = True
    samples: int = 0
    fields: Mapping[str, Field] = field(default_factory=dict)
    shards: Sequence[Shard] = ()
    # Of no file, so that rows of any number of bytes cost the same wherever they are.
    bytes_per_sample: int = 1
    chunk_rows: int = 1
    fingerprint: str = ""

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.dataset).__qualname__

    def places(self, samples: Int64s) -> list[tuple[Shard, int]]:
        """Return where samples are: each in the Dataset, by its number."""
        here = Shard(self.source, self.samples, 0, None, {})
        return [(here, sample) for sample in samples.tolist()]

    def failed(self, error: FetchError, rows: Int64s, whose: str = "") -> HpctrainError:
        """Return what to raise where samples cannot be had."""
        at = "" if error.index is None else f"sample {int(rows[error.index])} of "
        if error.index is None and len(rows):
            at = f"samples {_listed(rows)} of "
        message = f"{at}{self.source} ({self.kind}){whose}:"
        if not error.of_data:
            gap = "\n" if error.text.startswith("Traceback") else " "
            return TrainingError(f"{message}{gap}{error.text}")
        first, *lines = error.text.splitlines()
        return DatasetError(f"{message} {_last(error.text) or first}", first, *lines)


def _listed(rows: Int64s) -> str:
    shown = ", ".join(str(row) for row in rows[:8].tolist())
    return f"{shown}, ..." if len(rows) > 8 else shown


def _last(text: str) -> str:
    """Return what the exception said, where a text is a traceback."""
    return text.splitlines()[-1] if "Traceback" in text else ""


def length_of(dataset: Any, source: str) -> int:
    """Return how many samples a Dataset has.

    Raises:
        DatasetError: if it does not say, or has none.
    """
    try:
        samples = len(dataset)
    except Exception as error:
        raise DatasetError(
            f"{source}: len() of {type(dataset).__qualname__} failed: {type(error).__name__}: "
            f"{error}. The order of an epoch is drawn from the number of samples: give the Dataset "
            "a __len__, or pack it with `python -m hpctrain data pack`"
        ) from error
    if samples < 1:
        raise DatasetError(f"{source}: {type(dataset).__qualname__} has no samples")
    return samples


def looked_at(found: MapDataset, fetcher: Fetcher, seed: int) -> list[str]:
    """Return what identifies a Dataset: its class, its length, and a hash of some samples each.

    Samples that are not the same when they are read again count by their structure alone. It is
    weaker than the checksums of files: other samples may have changed since.

    Raises:
        DatasetError, TrainingError: if one cannot be read.
    """
    rows = np.unique(np.linspace(0, found.samples - 1, _LOOKED_AT).astype(np.int64))
    keys = sample_keys(seed, 0, rows)
    facts = [f"{found.kind} of {found.samples} samples"]
    if (indices := getattr(found.dataset, "indices", None)) is not None:  # of a Subset
        facts.append(f"indices {_hash(np.asarray(indices))}")
    with kept_draws():
        for at in range(len(rows)):
            where = slice(at, at + 1)
            try:
                first, again = (_hash(fetcher.samples(rows[where], keys[where])) for _ in range(2))
                if first != again:
                    sample = fetcher.samples(rows[where], keys[where])
                    first = f"{_hash(sample, values=False)}, drawn anew each time"
            except FetchError as error:
                raise found.failed(error, rows[where]) from error
            facts.append(f"sample {rows[at]} {first}")
    return facts


def fingerprint_of(facts: Sequence[str]) -> str:
    """Return a hash of facts, 16 hexadecimal digits."""
    return str(xxhash.xxh3_64_hexdigest("\n".join(facts).encode()))


def _hash(data: Any, *, values: bool = True) -> str:
    return _Look(values).of(data)


class _Look:
    """A look at a structure, as a hash of it and of what is in it."""

    def __init__(self, values: bool, seen: Mapping[int, Any] | None = None) -> None:
        """Begin.

        Args:
            values: whether what is in it counts.
            seen: objects of no known kind that it lies within, by their id.
        """
        self._values = values
        self._seen = dict(seen or {})
        self._digest = xxhash.xxh3_64()

    def of(self, data: Any) -> str:
        """Return the hash of data of any kind."""
        self._add(data, 0)
        return str(self._digest.hexdigest())

    def _add(self, data: Any, depth: int) -> None:
        self._digest.update(type(data).__name__.encode())
        if depth > _DEEPEST:
            return
        if isinstance(data, Tensor):
            self._digest.update(f"{tuple(data.shape)} {data.dtype}".encode())
            if self._values and data.device.type == "cpu" and data.layout is torch.strided:
                self._digest.update(bytes_of(data)[:_MOST_BYTES].numpy().tobytes())
        elif isinstance(data, np.ndarray):
            self._add_array(data, depth)
        elif isinstance(data, Mapping):
            for key, value in data.items():
                self._digest.update(repr(key).encode())
                self._add(value, depth + 1)
        elif isinstance(data, list | tuple):
            for value in data:
                self._add(value, depth + 1)
        elif isinstance(data, str | bytes | int | float | complex | None):
            if self._values:
                self._digest.update(repr(data).encode())
        elif self._values:
            self._add_object(data, depth)

    def _add_array(self, data: Any, depth: int) -> None:
        self._digest.update(f"{data.shape} {data.dtype}".encode())
        if data.dtype.hasobject:
            self._add(data.tolist(), depth + 1)
        elif self._values:
            data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
            self._digest.update(data[:_MOST_BYTES].tobytes())

    def _add_object(self, data: Any, depth: int) -> None:
        """Add an object of a class of somebody's, such as a graph.

        What pickle would put together again counts, and not pickle's own bytes: in these a tensor
        has its place in memory.
        """
        if isinstance(data, set | frozenset):
            # Strings in a set have another order in every process.
            for each in sorted(_Look(self._values, self._seen).of(each) for each in data):
                self._digest.update(each.encode())
            return
        if (name := getattr(data, "__qualname__", None)) is not None:  # a class or a function
            self._digest.update(str(name).encode())
            return
        if id(data) in self._seen or len(self._seen) >= _MOST_OBJECTS:
            return
        self._seen[id(data)] = data
        try:
            made_of: Any = data.__reduce_ex__(2)
            if not isinstance(made_of, str):
                made_of = [list(each) if isinstance(each, Iterator) else each for each in made_of]
        except Exception:  # noqa: BLE001 - then its class is all that is known of it
            return
        self._seen[id(made_of)] = made_of  # kept, or another object would have its id
        self._add(made_of, depth + 1)


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
