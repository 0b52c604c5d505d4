"""A dataset whose samples are made of rows of other datasets: chosen, joined, windows of several.

To partition, shuffle and loader it is a dataset like any other: N samples. Only who reads its rows
(`hpctrain.data.reading.rows`) knows what a sample is made of.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hpctrain.data.arrays import Int64s, within
from hpctrain.data.coding import PLAIN, Coding
from hpctrain.data.dataset import Dataset, Field, Shard, SourceFacts, require_fields
from hpctrain.data.order.ragged import Heap, Lengths, Packing, Raggedness, cut_by_values
from hpctrain.data.order.selection import SampleSelection, Spans
from hpctrain.errors import DatasetError


@dataclass(frozen=True, slots=True)
class Part:
    """Files that hold some of the fields.

    Attributes:
        dataset: their rows.
        axis: of the HDF5 datasets, which counts the rows.
        lengths: which of these rows make a row of the view, where that is not one each.
        documents: (documents,) int64, the first row of each, where samples are cut from them.
        heap: where the values are that the rows only count, of variable-length HDF5 datasets.
        constants: by field, (shards, *shape), the value of all rows of each shard; None: rows are
            in the files.
    """

    dataset: Dataset
    axis: int = 0
    lengths: Lengths | None = None
    documents: Int64s | None = None
    heap: Heap | None = None
    constants: Mapping[str, npt.NDArray[Any]] | None = None

    @property
    def samples(self) -> int:
        """Rows of the view that it has values for."""
        return self.dataset.samples if self.lengths is None else self.lengths.samples

    @property
    def stops(self) -> Int64s:
        """One past the last row of the view in every file, (shards,) int64."""
        return self.dataset.shard_stops if self.lengths is None else self.lengths.stops

    def places(self, rows: Int64s) -> list[tuple[Shard, int]]:
        """Return the file that each of these rows of the view is in, and its number there."""
        if self.lengths is None:
            return self.dataset.places(rows)
        stops, shards = self.lengths.stops, self.dataset.shards
        indices = np.searchsorted(stops, rows, side="right")
        inside = rows - np.concatenate(([0], stops))[indices]
        return [(shards[i], row) for i, row in zip(indices, inside.tolist(), strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """How the values of one field come about.

    Attributes:
        part: index of the part that holds them.
        name: of the field there.
        steps: rows of one sample, along a first axis of their own; None: one row, no such axis.
        lead: rows from the sample's own row to the first of them.
        every: rows from one of them to the next.
        is_stored: whether numbers stand for themselves, whatever their files say.
        ragged: how samples of unequal length are put into a batch; None: all are of one shape.
        packing: facts of the documents that samples are cut from; None: of none.
    """

    part: int
    name: str
    steps: int | None = None
    lead: int = 0
    every: int = 1
    is_stored: bool = False
    ragged: Raggedness | None = None
    packing: Packing | None = None

    @property
    def num_rows(self) -> int:
        return self.steps or 1

    @property
    def reach(self) -> int:
        """Rows from the sample's own to the last that this field needs, both counted."""
        return self.lead + (self.num_rows - 1) * self.every + 1

    def field(self, part: Part) -> Field:
        """Return what a sample of this field is, made of rows such as its part has."""
        stored = part.dataset.fields[self.name]
        if self.ragged is not None:
            assert part.lengths is not None
            mean = int(self.ragged.kept(np.array([part.lengths.mean]))[0])
            return Field(stored.shape, stored.dtype, mean)
        return stored if self.steps is None else Field((self.steps, *stored.shape), stored.dtype)


@dataclass(frozen=True)
class View(Dataset):
    """Samples made of rows of its parts, all of which have the same number of rows.

    Attributes:
        parts: where the rows are.
        columns: by field.
        selection: the rows that are samples.
        notes: what the header of a run should say of them.
        static: by name, what is one array for all samples, decoded.
    """

    parts: tuple[Part, ...]
    columns: Mapping[str, Column]
    selection: SampleSelection
    notes: tuple[str, ...] = ()
    static: Mapping[str, npt.NDArray[Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        source: str,
        parts: Sequence[Part],
        columns: Mapping[str, Column],
        selection: SampleSelection,
    ) -> View:
        """Put a view together."""
        return cls(
            source=source,
            fields={name: column.field(parts[column.part]) for name, column in columns.items()},
            shards=_files(parts),
            parts=tuple(parts),
            columns=dict(columns),
            selection=selection,
        )

    @cached_property
    def samples(self) -> int:
        return self.selection.samples

    @cached_property
    def shard_stops(self) -> npt.NDArray[np.int64]:
        """A sample may be made of rows of several shards; `places` gives one."""
        raise TypeError("the samples of a view do not follow its shards")

    @cached_property
    def chunk_rows(self) -> int:
        """Samples that no read should cut; of unequal length, those of a chunk on average."""
        if not self.ragged:
            return super().chunk_rows
        longest = 1
        for column in self.columns.values():
            part = self.parts[column.part]
            rows = max(shard.layouts[column.name].chunk_rows for shard in part.dataset.shards)
            longest = max(longest, rows if part.lengths is None else rows // part.lengths.mean)
        return longest

    @cached_property
    def ragged(self) -> dict[str, Raggedness]:
        """The fields whose samples are of unequal length, and how they are batched."""
        named = {name: column.ragged for name, column in self.columns.items()}
        return {name: ragged for name, ragged in named.items() if ragged is not None}

    @property
    def bounded(self) -> dict[str, Raggedness]:
        """Those of them whose values a pass has as many of as its samples happen to have."""
        return {name: how for name, how in self.ragged.items() if how.batch in ("pad", "concat")}

    def values_of(self, name: str, samples: Int64s) -> tuple[Int64s, Int64s]:
        """Return which rows of its home a field of unequal length has in each of these samples.

        Returns:
            The first row of each sample, and how many, (samples,) int64 each.
        """
        column = self.columns[name]
        lengths, ragged = self.parts[column.part].lengths, column.ragged
        assert lengths is not None
        assert ragged is not None
        rows = self.selection.rows(samples) + column.lead
        return lengths.firsts[rows], ragged.kept(lengths.counts[rows])

    def cut_by_values(
        self, samples: Int64s, most: int, most_samples: int | None
    ) -> list[tuple[int, int]]:
        """Cut samples into passes, as `hpctrain.data.order.ragged.cut_by_values` does."""
        counts = [
            (self.values_of(name, samples)[1], ragged.batch == "pad")
            for name, ragged in self.bounded.items()
        ]
        return cut_by_values(counts, most, most_samples)

    def require_at_most(self, most: int) -> None:
        """Check that every sample fits into a pass of so many values.

        Raises:
            DatasetError: naming the field that has more in some.
        """
        for name, ragged in self.bounded.items():
            lengths = self.parts[self.columns[name].part].lengths
            assert lengths is not None
            longest = int(ragged.kept(lengths.counts).max())
            if longest > most:
                raise DatasetError(
                    f"{self.source}: data.max_tokens = {most}, but a sample has {longest} values "
                    f'of "{name}": raise it, or cut samples by data.fields.{name}.max_length'
                )

    @property
    def packs(self) -> bool:
        """Whether samples are cut from documents."""
        return any(column.packing is not None for column in self.columns.values())

    def documents_in(self, name: str, samples: Int64s) -> tuple[Int64s, Int64s]:
        """Return where documents begin in samples of a field that are cut from some.

        Returns:
            (begins,) int64 each: which of the samples, ascending, and after how many of its rows,
            0 left out.
        """
        column = self.columns[name]
        documents = self.parts[column.part].documents
        assert documents is not None
        rows = self.selection.rows(samples) + column.lead
        first, stop = np.searchsorted(documents, [rows + 1, rows + column.num_rows])
        counts = stop - first
        begins = documents[np.repeat(first, counts) + within(counts)]
        return np.repeat(np.arange(len(rows)), counts), begins - np.repeat(rows, counts)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what the parts are, and which rows are samples."""
        picked = xxhash.xxh3_64()
        for numbers in (self.selection.firsts, self.selection.counts):
            picked.update(numbers.tobytes())
        facts = [
            [[part.dataset.fingerprint, part.axis, *_lengths_of(part)] for part in self.parts],
            [picked.hexdigest(), self.selection.stride],
        ]
        if self.static:
            facts.append([[n, _hash_of(values)] for n, values in sorted(self.static.items())])
        return str(xxhash.xxh3_64_hexdigest(json.dumps(facts).encode()))

    def select(self, names: Sequence[str]) -> View:
        """Return the same view with these fields only.

        Raises:
            DatasetError: if one is not there.
        """
        require_fields(names, self.fields, self.source)
        ragged = [self.ragged[name] for name in names if name in self.ragged]
        names = list(dict.fromkeys([*names, *(each.indices for each in ragged if each.indices)]))
        return dataclasses.replace(
            self,
            fields={name: self.fields[name] for name in names},
            columns={name: self.columns[name] for name in names},
        )

    def home(self, name: str) -> tuple[Dataset, str]:
        """Return the dataset whose rows the values of a field are made of, and its name there."""
        column = self.columns[name]
        return self.parts[column.part].dataset, column.name

    def codings(self, name: str) -> tuple[Coding, ...]:
        """Return how the numbers of a field stand for values, for each shard of its home."""
        dataset, inside = self.home(name)
        found = dataset.codings(inside)
        return (PLAIN,) * len(found) if self.columns[name].is_stored else found

    def as_stored(self, names: Iterable[str]) -> View:
        """Return the same view, but that every number of these fields stands for itself."""
        stored = frozenset(names)
        columns = {
            name: dataclasses.replace(column, is_stored=True) if name in stored else column
            for name, column in self.columns.items()
        }
        return dataclasses.replace(self, columns=columns)

    def shards_of(self, name: str, samples: Int64s) -> Int64s:
        """Return which shard of its home each row of a field is in, as `Dataset.shards_of`."""
        column = self.columns[name]
        rows = self.selection.rows(samples) + column.lead
        if column.ragged is not None:
            return np.searchsorted(self.parts[column.part].stops, rows, side="right")
        if column.steps is not None:
            rows = rows[:, None] + np.arange(column.steps) * column.every
        return np.searchsorted(self.home(name)[0].shard_stops, rows, side="right")

    def places(self, samples: Int64s) -> list[tuple[Shard, int]]:
        """Return the shard of the first row of each sample, and that row there."""
        first = next(iter(self.columns.values()))
        return self.parts[first.part].places(self.selection.rows(samples) + first.lead)

    def slow_fields(self) -> dict[str, str]:
        """Return why, for every field that only HDF5 can read in some shard."""
        slow = [part.dataset.slow_fields() for part in self.parts]
        return {
            name: slow[column.part][column.name]
            for name, column in self.columns.items()
            if column.name in slow[column.part]
        }


def _hash_of(values: npt.NDArray[Any]) -> str:
    facts = f"{values.dtype.str} {values.shape}".encode()
    return xxhash.xxh3_64_hexdigest(facts + values.tobytes())


def _lengths_of(part: Part) -> list[str]:
    found = [] if part.lengths is None else [part.lengths.fingerprint]
    if part.documents is not None:
        found.append(xxhash.xxh3_64_hexdigest(part.documents.tobytes()))
    for name, values in sorted((part.constants or {}).items()):
        found.append(f"{name} {_hash_of(values)}")
    return found


def join_sources(named: Mapping[str, Dataset]) -> Dataset:
    """Return several sources as one dataset, whose rows are those of one after the other.

    Args:
        named: the sources, by their names.

    Raises:
        DatasetError: naming two whose fields differ.
    """
    ordered = dict(sorted(named.items()))
    _require_like_fields(ordered)
    facts = tuple(
        SourceFacts(
            name=name,
            samples=each.samples,
            fingerprint=each.fingerprint,
            bytes_per_sample=each.bytes_per_sample,
            chunk_rows=each.chunk_rows,
        )
        for name, each in ordered.items()
    )
    first, *_ = datasets = list(ordered.values())
    source = " + ".join(ordered)
    if not any(isinstance(each, View) for each in datasets):
        shards = tuple(shard for each in datasets for shard in each.shards)
        return Dataset(source=source, fields=first.fields, shards=shards, sources=facts)
    views = [each if isinstance(each, View) else _as_view(each) for each in datasets]
    parts = [
        dataclasses.replace(
            part,
            dataset=dataclasses.replace(
                part.dataset,
                shards=tuple(shard for each in views for shard in each.parts[index].dataset.shards),
            ),
            constants=_joined_constants([each.parts[index] for each in views]),
        )
        for index, part in enumerate(views[0].parts)
    ]
    rows = [view.parts[0].dataset.samples for view in views]
    before = np.cumsum(rows) - rows
    selections = [view.selection for view in views]
    selection = SampleSelection(
        np.concatenate([each.firsts + skip for each, skip in zip(selections, before, strict=True)]),
        np.concatenate([each.counts for each in selections]),
        selections[0].stride,
    )
    view = View.of(source, parts, views[0].columns, selection)
    notes = tuple(f"{name}: {note}" for name, each in ordered.items() for note in _notes(each))
    return dataclasses.replace(
        view,
        sources=facts,
        notes=notes,
        static=_same_static(dict(zip(ordered, views, strict=True))),
    )


def _joined_constants(parts: Sequence[Part]) -> dict[str, npt.NDArray[Any]] | None:
    """Return the values of all shards of the same part of several sources."""
    constants = [part.constants for part in parts if part.constants is not None]
    if not constants:
        return None
    return {name: np.concatenate([each[name] for each in constants]) for name in constants[0]}


def _same_static(named: Mapping[str, View]) -> Mapping[str, npt.NDArray[Any]]:
    """Return what is one array for all samples of sources.

    Raises:
        DatasetError: if it is another in one of them.
    """
    (first, like), *others = named.items()
    for name, view in others:
        for field, values in like.static.items():
            if _hash_of(values) != _hash_of(view.static[field]):
                raise DatasetError(
                    f'data.sources: the static field "{field}" is another in "{name}" '
                    f'({view.source}) than in "{first}" ({like.source}), and a batch holds '
                    "samples of both: name files that fit together"
                )
    return like.static


def _notes(dataset: Dataset) -> tuple[str, ...]:
    return dataset.notes if isinstance(dataset, View) else ()


def _as_view(dataset: Dataset) -> View:
    """Return a dataset whose samples are its rows as one that may have others."""
    columns = {name: Column(part=0, name=name) for name in dataset.fields}
    selection = SampleSelection.of(Spans.of(0, dataset.samples), 1, 1)
    return View.of(dataset.source, [Part(dataset)], columns, selection)


def _require_like_fields(named: Mapping[str, Dataset]) -> None:
    """Check that sources can be mixed in a batch: their fields have the same shapes and dtypes."""
    for name, dataset in named.items():
        parts = dataset.parts if isinstance(dataset, View) else ()
        if any(part.lengths is not None or part.documents is not None for part in parts):
            raise DatasetError(
                f'data.sources: "{name}" ({dataset.source}) has fields of unequal length, which '
                "are not mixed: pack the sources to samples of one length, or name all of their "
                "files in data.train"
            )
    (first, like), *others = named.items()
    for name, dataset in others:
        for field, there in like.fields.items():
            here = dataset.fields[field]
            if here != there:
                raise DatasetError(
                    f'data.sources: field "{field}" is {there.dtype} of shape {there.shape} in '
                    f'"{first}" ({like.source}), and {here.dtype} of shape {here.shape} in '
                    f'"{name}" ({dataset.source}): a batch holds samples of all sources, so their '
                    "fields have to be alike; `python -m hpctrain data pack --dtype` writes "
                    "another dtype"
                )


def _files(parts: Sequence[Part]) -> tuple[Shard, ...]:
    """Return every file of the parts once, with what all of them read of it."""
    files: dict[str, Shard] = {}
    for shard in (shard for part in parts for shard in part.dataset.shards):
        known = files.get(shard.path, shard)
        files[shard.path] = dataclasses.replace(
            known,
            layouts={**known.layouts, **shard.layouts},
            sources=tuple(sorted({*known.sources, *shard.sources})),
            codings={**(known.codings or {}), **(shard.codings or {})},
        )
    return tuple(files.values())
