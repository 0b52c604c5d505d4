"""A Dataset of the user's as a run knows it: how many samples, which, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Field, Shard
from hpctrain.data.loading.map_style.draws import kept_draws
from hpctrain.data.loading.map_style.fetch import Fetcher, FetchError
from hpctrain.data.loading.nested import bytes_of
from hpctrain.data.order.order import sample_keys
from hpctrain.errors import DatasetError, HpctrainError, TrainingError

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
