"""A Dataset of the user's as a run knows it: how many samples, which, and how they are read."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from hpctrain.data.dataset import Field, Shard
from hpctrain.data.loading.map_style.draws import kept_draws
from hpctrain.data.loading.map_style.fetch import Fetcher, FetchError
from hpctrain.data.order import sample_keys
from hpctrain.data.permutation import Int64s
from hpctrain.errors import DatasetError, HpctrainError, TrainingError

_LOOKED_AT = 3
"""Samples that a fingerprint is made of."""
_MOST_BYTES = 2**20
"""Of one value that the fingerprint looks at."""


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
    digest = xxhash.xxh3_64()
    for part in _parts(data, values=values):
        digest.update(part)
    return str(digest.hexdigest())


def _parts(data: Any, *, values: bool) -> Any:
    """Yield bytes that stand for a structure, and for what is in it."""
    yield type(data).__name__.encode()
    if isinstance(data, Tensor):
        yield f"{tuple(data.shape)} {data.dtype}".encode()
        if values and data.device.type == "cpu" and not data.is_sparse:
            data = data.detach().resolve_conj().resolve_neg().contiguous()
            if data.numel():
                yield data.reshape(-1).view(torch.uint8)[:_MOST_BYTES].numpy().tobytes()
    elif isinstance(data, np.ndarray):
        yield f"{data.shape} {data.dtype}".encode()
        if values and data.dtype != object:
            yield np.ascontiguousarray(data).reshape(-1).view(np.uint8)[:_MOST_BYTES].tobytes()
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield repr(key).encode()
            yield from _parts(value, values=values)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _parts(value, values=values)
    elif isinstance(data, str | bytes | int | float | complex | bool | None):
        if values:
            yield repr(data).encode()
    elif values:
        yield _pickled(data)


def _pickled(data: Any) -> bytes:
    """Return an object of no known kind as bytes; nothing, where it cannot be."""
    try:
        return pickle.dumps(data, protocol=5)[:_MOST_BYTES]
    except Exception:  # noqa: BLE001 - then its class is all that is known of it
        return b""
