"""A dataset that hpctrain can train on already, as a source: to split it, or store it anew."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hpctrain.convert.sources.arrays import plain_attributes
from hpctrain.convert.sources.source import Arrays, identity_of, native, require_same_units
from hpctrain.data.arrays import Int64s
from hpctrain.data.coding import without_coding
from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.decoding import FieldDecoding, decoded_rows, decodings
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.files.storage import open_hdf5_file
from hpctrain.data.order.selection import SampleSelection, Spans
from hpctrain.data.reading.rows import open_rows
from hpctrain.data.reading.scatter import RowReader
from hpctrain.data.view import Column, Part, View
from hpctrain.errors import DatasetError


@dataclass(frozen=True)
class Indexed:
    """The rows of a dataset, read as training reads them.

    Attributes:
        dataset: as opened.
        attributes: by field, those of the first shard that hold for all that `read` returns.
        decoded: fields that are read decoded, since their files say different things of them, or
            since they get another dtype. Of all others the numbers stay, and what is said of them.
    """

    dataset: Dataset
    attributes: Mapping[str, Mapping[str, Any]]
    decoded: Mapping[str, FieldDecoding]

    @classmethod
    def open(
        cls, pattern: str, fields: Sequence[str] | None = None, to_decode: Container[str] = ()
    ) -> Indexed:
        """Open a dataset.

        Args:
            pattern: as `open_dataset` takes it.
            fields: the same.
            to_decode: fields that are read decoded in any case.

        Raises:
            DatasetError: as `open_dataset` does, or if what is to be decoded cannot be.
        """
        dataset = open_dataset(pattern, fields)
        return cls._of(dataset, to_decode)

    @classmethod
    def of_groups(
        cls,
        source: str,
        pattern: str,
        paths: Mapping[str, str],
        axis: int,
        to_decode: Container[str] = (),
    ) -> Indexed:
        """Open arrays that many groups have.

        Args:
            source: what to call it.
            pattern: of the files.
            paths: of the arrays, with a star, by field.
            axis: of them, which counts the samples; WHOLE: each is one.
            to_decode: fields that are read decoded in any case.

        Raises:
            DatasetError: as `open` does.
        """
        dataset = open_dataset(pattern, list(paths.values()), axis)
        columns = {name: Column(part=0, name=path) for name, path in paths.items()}
        selection = SampleSelection.of(Spans.of(0, dataset.samples), 1, 1)
        return cls._of(View.of(source, [Part(dataset, axis)], columns, selection), to_decode)

    @classmethod
    def _of(cls, dataset: Dataset, to_decode: Container[str]) -> Indexed:
        names = [
            name
            for name in dataset.fields
            if name in to_decode or len(set(dataset.codings(name))) > 1
        ]
        decoded = decodings([dataset.select(names)])[0] if names else {}
        _require_same_units(dataset)
        attributes = {
            name: without_coding(each) if name in decoded else each
            for name, each in read_attributes(dataset).items()
        }
        return cls(dataset, attributes, decoded)

    @property
    def name(self) -> str:
        return self.dataset.source

    @property
    def samples(self) -> int:
        return self.dataset.samples

    @cached_property
    def fields(self) -> Mapping[str, Field]:
        return {
            name: native(field.shape, self._dtype(name), name, self.name)
            for name, field in self.dataset.fields.items()
        }

    def _dtype(self, name: str) -> np.dtype[Any]:
        decoding = self.decoded.get(name)
        return self.dataset.fields[name].dtype if decoding is None else decoding.decoded

    @cached_property
    def identity(self) -> str:
        paths = [shard.path for shard in self.dataset.shards]
        codings = [[coding.to_json() for coding in each.codings] for each in self.decoded.values()]
        decoded = f" {list(self.decoded)} {codings}" if self.decoded else ""
        fields = list(self.dataset.fields)
        if isinstance(self.dataset, View):
            fields = [self.dataset.home(name)[1] for name in fields]
        return f"{identity_of(paths)} {fields}{decoded}"

    def __getstate__(self) -> dict[str, Any]:
        kept = ("dataset", "attributes", "decoded")
        return {name: getattr(self, name) for name in kept}

    def read(self, rows: Int64s) -> Arrays:
        """Return samples, as `Source.read` does."""
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        starts = np.flatnonzero(np.diff(ascending, prepend=-2) != 1)
        counts = np.diff(starts, append=len(rows))
        is_in_order = bool((order == np.arange(len(rows))).all())
        arrays = {}
        for name, stored in self.dataset.fields.items():
            field = native(stored.shape, stored.dtype, name, self.name)
            values = np.empty((len(rows), field.row_bytes), np.uint8)
            self._access.read_runs(name, ascending[starts], counts, values, starts)
            if not is_in_order:
                shuffled = np.empty_like(values)
                shuffled[order] = values
                values = shuffled
            arrays[name] = values.view(field.dtype).reshape(len(rows), *field.shape)
        return decoded_rows(arrays, rows, self.decoded)

    @cached_property
    def _access(self) -> RowReader:
        return open_rows(self.dataset, retries=0)


def _require_same_units(dataset: Dataset) -> None:
    """Check that each field is in one unit in all shards.

    Raises:
        DatasetError: if one is not, or a shard cannot be read.
    """
    said: dict[str, list[tuple[str, dict[str, Any]]]] = {name: [] for name in dataset.fields}
    for shard in dataset.shards:
        with open_hdf5_file(shard.path) as file:
            for name, each in said.items():
                if (found := file.get(shard.inside(name))) is not None:
                    each.append((shard.path, plain_attributes(found)))
    for name, each in said.items():
        require_same_units(name, each)


def read_attributes(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Return the attributes of every field, as the first shard has them."""
    found = {}
    for name in dataset.fields:
        home, inside = dataset.home(name)
        with open_hdf5_file(home.shards[0].path) as file:
            found[name] = plain_attributes(file[home.shards[0].inside(inside)])
    return found


def require_no_keys(dataset: Dataset) -> None:
    """Check that the arrays of files are not samples, each under a key of its own.

    Raises:
        DatasetError: if they differ by numbers in their names alone, and are more than the rows.
    """
    names: dict[str, list[str]] = {}
    for name in dataset.fields:
        if (starred := re.sub(r"\d+", "*", name)) != name:
            names.setdefault(starred, []).append(name)
    for starred, alike in names.items():
        if len(alike) > max(2, dataset.samples):
            of = starred if "/" in starred else "GROUP_*/NAME"
            raise DatasetError(
                f"{dataset.source}: it holds {len(alike)} arrays {starred} of {dataset.samples} "
                f"rows, which look like samples, and would be packed as {len(alike)} fields: name "
                f"arrays in groups by a pattern, 'NAME={dataset.source}:{of}' --axis none, or "
                f"single fields, NAME={dataset.source}:{alike[0]}"
            )
