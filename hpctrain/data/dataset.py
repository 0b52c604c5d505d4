"""What a dataset is: shards, fields, and where in the files the rows lie. No I/O.

A file of 1 KB may claim 2^60 rows: what it says of sizes is checked against the bytes that are
there, before anything is allocated, planned or read for hours because a file says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from hpctrain.data.coding import PLAIN, Coding
from hpctrain.data.forms import Form
from hpctrain.errors import DatasetError
from hpctrain.utils.text import listed, nearest, size

SUPPORTED_DTYPES = frozenset(
    ["bool"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
    + [f"float{bits}" for bits in (16, 32, 64)]
    + [f"complex{bits}" for bits in (64, 128)]
)
"""Names of the dtypes that a field may have, in either byte order."""
_DTYPE = re.compile(r"[<>|=]?[A-Za-z]\d*(\[\w+\])?")
DIRECT_FILTERS = frozenset(
    [
        *("shuffle", "deflate", "fletcher32", "szip", "nbit", "scaleoffset", "bzip2", "lzf"),
        *("zstd", "lz4", "bitshuffle", "blosc", "blosc2"),
    ]
)
"""What `hpctrain.data.reading.filters` decodes without HDF5, as it is called in `Layout.reason`."""
MOST_VALUES_PER_BYTE = 2**20
"""Bytes of values that a byte of a file may stand for. Deflate reaches 1032, zstd some 20,000; and
chunks that were never written, which are fill values, take none at all."""
ALWAYS_BYTES = 2**40
"""So much may be fill values that are stored nowhere."""
LARGEST_ROW_BYTES = 2**37
"""Of a row, which memory is to hold several times: a field of 3,200 x 3,200 x 3,200 numbers."""
MOST_SAMPLES = 2**42
"""Of a dataset: the order of an epoch is a list of its blocks."""


@dataclass(frozen=True, slots=True)
class Field:
    """One named array per sample.

    Attributes:
        shape: of one sample; where samples are of unequal length, of one of its rows.
        dtype: as stored, byte order included.
        mean_rows: rows of a sample of unequal length, on average; None: all are of one shape.
        form: how rows as they are stored become these; None: they are these.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    mean_rows: int | None = None
    form: Form | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a sample; on average, where samples are of unequal length."""
        return math.prod(self.shape) * self.dtype.itemsize * (self.mean_rows or 1)


class DatasetFacts(Protocol):
    """What an order, and a run that goes on, have to know of a dataset."""

    @property
    def source(self) -> str:
        """What the user called it."""
        ...

    @property
    def samples(self) -> int: ...
    @property
    def fingerprint(self) -> str:
        """Changes when the samples do, as far as that is seen."""
        ...

    @property
    def bytes_per_sample(self) -> int: ...
    @property
    def chunk_rows(self) -> int:
        """Rows that no read should cut."""
        ...


WHOLE = -1
"""In place of an axis that counts rows: there is none, and all of an array is one."""
ELSEWHERE = frozenset(["virtual", "in an external file", "in another file, by a link"])
"""Reasons of a `Layout` by which the values are in other files than the shard."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of a field lie in one shard.

    Attributes:
        offset: bytes from the start of the file, where the rows lie one after the other exactly
            as memory holds them; None where only HDF5 can read them.
        chunk_rows: rows that are stored, and perhaps compressed, together.
        reason: why they do not, such as "chunked, shuffle, deflate"; empty if `offset` is given.
        base: bytes from the start of the file to all of the values, where they lie as in memory
            but the rows are along another axis than the first.
    """

    offset: int | None
    chunk_rows: int = 1
    reason: str = ""
    base: int | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether the values are in other files, which may come and go by themselves."""
        return self.reason in ELSEWHERE

    @property
    def is_direct(self) -> bool:
        """Whether the rows are read, and decompressed if need be, without HDF5."""
        kind, *filters = self.reason.split(", ")
        return self.offset is not None or (kind == "chunked" and DIRECT_FILTERS.issuperset(filters))


@dataclass(frozen=True, slots=True)
class Shard:
    """One HDF5 file.

    Attributes:
        path: of the file.
        samples: rows in each of its fields.
        size: of the file, bytes.
        checksum: xxh3-64 of the whole file, hexadecimal; None if it was never computed.
        layouts: by field.
        sources: other files that values come from: of virtual datasets, and external storage.
        codings: of the fields whose numbers do not all stand for themselves; None: nobody has
            looked, `hpctrain.data.files.discovery.with_codings` does.
        group: of the file, which alone this is, such as "data/demo_3"; its fields are called by
            patterns, such as "data/demo_*/actions". Empty: it is the whole file.
        grows: whether a program was appending to it (SWMR): the rows that were there are read.
    """

    path: str
    samples: int
    size: int
    checksum: str | None
    layouts: Mapping[str, Layout]
    sources: tuple[str, ...] = ()
    codings: Mapping[str, Coding] | None = None
    group: str = ""
    grows: bool = False

    @property
    def name(self) -> str:
        file = self.path.rpartition("/")[2]
        return f"{file}:{self.group}" if self.group else file

    def inside(self, name: str) -> str:
        """Return the path of a field in the file."""
        if not self.group:
            return name
        below = name.split("/")[self.group.count("/") + 1 :]
        return "/".join([self.group, *below])

    def select(self, names: Sequence[str]) -> Shard:
        """Return the same shard with these fields only."""
        codings = self.codings
        if codings is not None:
            codings = {name: codings[name] for name in names if name in codings}
        layouts = {name: self.layouts[name] for name in names}
        return dataclasses.replace(self, layouts=layouts, codings=codings)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFacts:
    """What mixing, and a run that goes on, have to know of one of several sources.

    Attributes:
        name: in the config.
        samples: of the source.
        fingerprint: of its data.
        bytes_per_sample: of all fields.
        chunk_rows: rows that no read should cut.
    """

    name: str
    samples: int
    fingerprint: str
    bytes_per_sample: int
    chunk_rows: int


@dataclass(frozen=True)
class Dataset:
    """Shards that hold the same fields; their rows, one shard after the other, are the samples.

    Small, immutable and picklable: one rank opens a dataset and broadcasts it.

    Attributes:
        source: what the user called it: a folder or a pattern.
        fields: by name; the name is the path of the HDF5 dataset in every shard.
        shards: none of them empty.
        sources: those that it joins, whose rows follow each other; none: it is one.
    """

    source: str
    fields: Mapping[str, Field]
    shards: tuple[Shard, ...]
    sources: tuple[SourceFacts, ...] = dataclasses.field(default=(), kw_only=True)

    @cached_property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def shard_stops(self) -> npt.NDArray[np.int64]:
        """One past the last sample of every shard, (shards,) int64."""
        return np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)

    @cached_property
    def bytes_per_sample(self) -> int:
        """Bytes of one row of all fields together."""
        return sum(field.row_bytes for field in self.fields.values())

    @cached_property
    def chunk_rows(self) -> int:
        """Rows that no read should cut: the longest chunk of any field."""
        return max(layout.chunk_rows for s in self.shards for layout in s.layouts.values())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what the shards are, 16 hexadecimal digits.

        It stays when the folder moves or other fields are chosen, and changes when a shard is
        added, renamed or written anew.
        """
        facts = [[s.name, s.samples, s.checksum or s.size] for s in self.shards]
        return str(xxhash.xxh3_64_hexdigest(json.dumps(facts).encode()))

    def select(self, names: Sequence[str]) -> Dataset:
        """Return the same dataset with these fields only.

        Raises:
            DatasetError: if one is not there.
        """
        require_fields(names, self.fields, self.source)
        return Dataset(
            source=self.source,
            fields={name: self.fields[name] for name in names},
            shards=tuple(shard.select(names) for shard in self.shards),
        )

    def home(self, name: str) -> tuple[Dataset, str]:
        """Return the dataset whose rows the values of a field are made of, and its name there."""
        return self, name

    def codings(self, name: str) -> tuple[Coding, ...]:
        """Return how the numbers of a field stand for values, for each shard of its home."""
        return tuple((shard.codings or {}).get(name, PLAIN) for shard in self.shards)

    def as_stored(self, names: Iterable[str]) -> Dataset:
        """Return the same dataset, but that every number of these fields stands for itself."""
        stored = frozenset(names)
        if not stored:
            return self
        shards = tuple(
            dataclasses.replace(
                shard,
                codings={k: v for k, v in (shard.codings or {}).items() if k not in stored},
            )
            for shard in self.shards
        )
        return dataclasses.replace(self, shards=shards)

    def shards_of(self, name: str, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return which shard of its home each row of a field is in.

        Returns:
            (samples,), or (samples, steps) where a sample of the field holds several rows.
        """
        del name  # all of a sample is in one shard
        return np.searchsorted(self.shard_stops, samples, side="right")

    def places(self, samples: npt.NDArray[np.int64]) -> list[tuple[Shard, int]]:
        """Return the shard of each sample, and its row there; of a window its first row."""
        stops = self.shard_stops
        indices = np.searchsorted(stops, samples, side="right").tolist()
        return [
            (self.shards[index], sample - int(stops[index]) + self.shards[index].samples)
            for sample, index in zip(samples.tolist(), indices, strict=True)
        ]

    def in_shards(self, row: int, count: int) -> Iterator[tuple[Shard, int, int]]:
        """Yield the parts of a run of rows: a shard, the first row in it, and how many."""
        stops = self.shard_stops
        index = int(np.searchsorted(stops, row, side="right"))
        while count:
            shard = self.shards[index]
            first = row - int(stops[index]) + shard.samples
            size = min(count, shard.samples - first)
            yield shard, first, size
            row, count, index = row + size, count - size, index + 1

    def slow_fields(self) -> dict[str, str]:
        """Return why, for every field that only HDF5 can read in some shard."""
        reasons: dict[str, str] = {}
        for shard in self.shards:
            for name, layout in shard.layouts.items():
                if layout.base is None and not layout.is_direct:
                    reasons.setdefault(name, f"{layout.reason} in {shard.name}")
        return reasons


def require_fields(wanted: Iterable[str], there: Iterable[str], place: str) -> None:
    """Check that all fields are there.

    Raises:
        DatasetError: naming one that is not, and what was perhaps meant.
    """
    there = set(there)
    for name in wanted:
        if name in there:
            continue
        names = sorted(there)
        near = nearest(name, names)
        hint = f' Did you mean "{near}"?' if near else ""
        raise DatasetError(
            f'{place}: there is no field "{name}".{hint} It has: {listed(names, 30)}'
        )


def parse_dtype(text: str) -> np.dtype[Any]:
    """Return the dtype that its own `str` names, such as "<f4".

    Raises:
        ValueError: if it names none.
    """
    if _DTYPE.fullmatch(text):
        with suppress(TypeError, ValueError, OverflowError):
            return np.dtype(text)
    raise ValueError(f"{text!r:.60} is not a dtype of numpy")


def require_supported(name: str, field: Field, place: str) -> None:
    """Check that a field can become a tensor.

    Raises:
        DatasetError: if it is text, compound, of no size, or a number that torch does not know.
    """
    if field.dtype.name not in SUPPORTED_DTYPES:
        raise DatasetError(
            f'{place}: field "{name}" has dtype {field.dtype}, which cannot become a tensor. '
            "Store it as bool, (u)int8 to 64, float16 to 64 or complex"
        )
    if field.row_bytes == 0:
        raise DatasetError(
            f'{place}: field "{name}" has rows of shape {field.shape}, without values'
        )


def require_plausible(name: str, claimed: int, place: str, stored: int) -> None:
    """Check that so many bytes of values may come of so many that are stored.

    Args:
        name: of the field.
        claimed: bytes of values.
        place: where that is said, for the message.
        stored: bytes of the files that they are in.

    Raises:
        DatasetError: if no compression does that.
    """
    if claimed > max(ALWAYS_BYTES, stored * MOST_VALUES_PER_BYTE):
        raise DatasetError(
            f'{place}: field "{name}" is said to have {size(claimed)} of values, and '
            f"{size(stored)} are stored: the file is damaged, or almost nothing was ever written "
            "to it. Bring the whole file back, or make it as long as its data"
        )


def require_row(name: str, row_bytes: int, place: str) -> None:
    """Check that memory may hold a row.

    Raises:
        DatasetError: if that of no node does.
    """
    if row_bytes > LARGEST_ROW_BYTES:
        raise DatasetError(
            f'{place}: field "{name}" is said to have {size(row_bytes)} in a row, more than memory '
            "holds several times: let another axis count the samples (axis in [data.fields])"
        )


def require_countable(samples: int, place: str) -> None:
    """Check that so many samples can be put in an order.

    Raises:
        DatasetError: if not.
    """
    if samples > MOST_SAMPLES:
        raise DatasetError(
            f"{place}: {samples:,} samples, and at most {MOST_SAMPLES:,} can be put in an order: "
            "the files are damaged, or larger rows are to be samples"
        )
