"""torch Datasets as sources: what an import path makes, `dataset=my_data:make`.

A map-style Dataset is made on every rank, each of which reads its part. A stream has no numbers to
ask for: one rank reads it to its end, to files of its own, and packs it from there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from hpctrain.config.importing import imported
from hpctrain.convert.sources.source import Arrays
from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Field, require_supported
from hpctrain.data.loading.map_style.dataset import MapDataset, fingerprint_of, length_of, looked_at
from hpctrain.data.loading.map_style.fetch import Fetcher, FetchError
from hpctrain.data.order.order import sample_keys
from hpctrain.errors import ConfigError, DatasetError

PREFIX = "dataset="
"""What the source is called by, before the import path."""


def made(reference: str) -> Any:
    """Return the Dataset that an import path makes; of a DataLoader, its Dataset.

    Raises:
        ConfigError: if it cannot be imported, or wants arguments.
    """
    try:
        target = imported(reference)
    except ConfigError as error:
        raise ConfigError(f"{PREFIX}{reference}: {error}") from error
    try:
        inspect.signature(target).bind()
    except TypeError as error:
        raise ConfigError(
            f"{PREFIX}{reference}: it is called without arguments: {error}. Name a function "
            "without any that makes the Dataset"
        ) from error
    except ValueError:  # written in C without a signature: the call will tell
        pass
    found: Any = target()
    return found.dataset if isinstance(found, DataLoader) else found


def is_stream(dataset: Any) -> bool:
    """Tell whether samples come in their turn only."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


@dataclass(frozen=True)
class ObjectSource:
    """A map-style Dataset, which every rank makes for itself.

    Attributes:
        reference: what makes it.
        samples: of it.
        fields: of its samples.
        identity: of class, length and some samples.
    """

    reference: str
    samples: int
    fields: Mapping[str, Field]
    identity: str

    @classmethod
    def of(cls, reference: str) -> ObjectSource:
        """Look at some samples.

        Raises:
            DatasetError, TrainingError: if one cannot be had, or cannot become fields.
        """
        found, fetcher = _opened(reference)
        first = values_of(_fetched(reference, np.zeros(1, np.int64))[0], found.source, 0)
        return cls(
            reference,
            found.samples,
            fields_of(first, found.source),
            fingerprint_of(looked_at(found, fetcher, 0)),
        )

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.reference}"

    @property
    def attributes(self) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def read(self, rows: Int64s) -> Arrays:
        """Return the samples of these numbers, as `Source.read` does."""
        out = {n: np.empty((len(rows), *f.shape), f.dtype) for n, f in self.fields.items()}
        for at in range(len(rows)):  # one by one: only what is packed is in memory
            (sample,) = _fetched(self.reference, rows[at : at + 1])
            values = values_of(sample, self.name, int(rows[at]))
            require_alike(values, self.fields, self.name, int(rows[at]))
            for name, value in values.items():
                out[name][at] = value
        return out


@functools.cache
def _opened(reference: str) -> tuple[MapDataset, Fetcher]:
    """Return the Dataset of an import path, made once in this process."""
    dataset, source = made(reference), f"{PREFIX}{reference}"
    found = MapDataset(source=source, dataset=dataset, samples=length_of(dataset, source))
    return found, Fetcher(dataset, None, seeded=True)


def _fetched(reference: str, rows: Int64s) -> list[Any]:
    found, fetcher = _opened(reference)
    try:
        return fetcher.samples(rows, sample_keys(0, 0, rows))
    except FetchError as error:
        raise found.failed(error, rows) from error


@dataclass(frozen=True)
class SpooledStream:
    """A stream that was read to its end, its samples in files.

    Attributes:
        reference: what made it.
        samples: that came.
        fields: of its samples.
        identity: of all samples.
        folder: of the files.
    """

    reference: str
    samples: int
    fields: Mapping[str, Field]
    identity: str
    folder: str

    @classmethod
    def of(cls, reference: str, stream: Iterable[Any], folder: Path) -> SpooledStream:
        """Read a stream.

        Args:
            reference: what made it.
            stream: to read once.
            folder: for the files.

        Raises:
            DatasetError: if it has no samples, or they cannot become fields.
        """
        source, samples = f"{PREFIX}{reference}", 0
        fields: Mapping[str, Field] = {}
        digest = xxhash.xxh3_64()
        with ExitStack() as stack:
            files: list[IO[bytes]] = []
            for number, sample in enumerate(stream):
                values = values_of(sample, source, number)
                if not files:
                    fields = fields_of(values, source)
                    paths = [folder / f"{place}.raw" for place in range(len(fields))]
                    files = [stack.enter_context(path.open("wb")) for path in paths]
                require_alike(values, fields, source, number)
                for file, value in zip(files, values.values(), strict=True):
                    content = np.ascontiguousarray(value).tobytes()
                    digest.update(content)
                    file.write(content)
                samples += 1
        if not samples:
            raise DatasetError(f"{source}: the stream ended without a sample")
        return cls(reference, samples, fields, str(digest.hexdigest()), str(folder))

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.reference}"

    @property
    def attributes(self) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def read(self, rows: Int64s) -> Arrays:
        """Return the samples of these numbers, as `Source.read` does."""
        arrays: Arrays = {}
        for place, (name, field) in enumerate(self.fields.items()):
            path, shape = Path(self.folder, f"{place}.raw"), (self.samples, *field.shape)
            arrays[name] = np.memmap(path, field.dtype, "r", shape=shape)[rows]
        return arrays


@contextmanager
def spooled(reference: str, beside: Path) -> Iterator[SpooledStream]:
    """Read a stream to files that are gone after the body.

    Args:
        reference: what makes it.
        beside: which folder the files are to be, where all ranks see them.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{beside.name}-", dir=beside.parent) as folder:
        yield SpooledStream.of(reference, made(reference), Path(folder))


def values_of(sample: Any, source: str, number: int) -> dict[str, npt.NDArray[Any]]:
    """Return what a sample holds, by name: of a tuple its places, of what is nested a path.

    Raises:
        DatasetError: if something in it is no number, nor an array or a tensor of them.
    """
    values = dict(_named(sample, ""))
    for name, value in values.items():
        if value.dtype.kind not in "biufc":
            raise DatasetError(
                f'{source}: "{name}" of sample {number} is {_kind(value)}, which is no number: '
                "leave it out of the samples, or make numbers of it"
            )
    if not values:
        raise DatasetError(f"{source}: sample {number} is {type(sample).__name__}, without values")
    return values


def _named(value: Any, name: str) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    inner: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    else:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        yield name or "x", array
        return
    for key, each in inner:
        yield from _named(each, f"{name}.{key}" if name else str(key))


def _kind(value: npt.NDArray[Any]) -> str:
    return type(value.item()).__name__ if value.ndim == 0 else f"an array of {value.dtype}"


def fields_of(values: Mapping[str, npt.NDArray[Any]], source: str) -> dict[str, Field]:
    """Return the fields that samples like this one have.

    Raises:
        DatasetError: if one cannot become a tensor.
    """
    fields = {
        name: Field(value.shape, value.dtype.newbyteorder("=")) for name, value in values.items()
    }
    for name, field in fields.items():
        require_supported(name, field, source)
    return fields


def require_alike(
    values: Mapping[str, npt.NDArray[Any]], fields: Mapping[str, Field], source: str, number: int
) -> None:
    """Check that a sample has the fields of the first.

    Raises:
        DatasetError: naming what differs.
    """
    if values.keys() != fields.keys():
        raise DatasetError(
            f"{source}: sample {number} has {', '.join(values)}, and the first {', '.join(fields)}"
        )
    for name, value in values.items():
        field = fields[name]
        if value.shape != field.shape or value.dtype != field.dtype:
            raise DatasetError(
                f'{source}: "{name}" of sample {number} is {value.dtype} {value.shape}, and of the '
                f"first {field.dtype} {field.shape}: shards hold samples of one shape"
            )
