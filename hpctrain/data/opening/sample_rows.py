"""Which rows of files are samples, by `[data.samples]`: ranges, masks, coordinates, splits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hpctrain.config.schema_data import DataSection
from hpctrain.config.semantics import Semantics
from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import WHOLE, Dataset, Shard
from hpctrain.data.decoding import decodings
from hpctrain.data.files.coordinates import (
    Bools,
    NoCoordinateError,
    Values,
    coordinate_of_rows,
    joined,
    values_of,
)
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.files.storage import HDF5_FAILURES, open_hdf5_file
from hpctrain.data.order.selection import (
    Spans,
    common,
    default_piece_rows,
    merged,
    piece_stops,
    spans_where,
    split_pieces,
)
from hpctrain.data.reading.rows import open_rows
from hpctrain.data.view import Part
from hpctrain.errors import ConfigError, DatasetError
from hpctrain.utils.text import plural

logger = logging.getLogger(__name__)

Purpose = Literal["train", "validation"]
Given = str | tuple[int, int] | Mapping[str, Any] | None
"""What the config says of the rows of a purpose."""

MASK_ROWS = 2**22
"""Rows of a mask that are read at once."""
_GAP = 1.5
"""Times the usual distance of two rows are a gap. Of months and years no two are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenRows:
    """The rows that may be in samples.

    Attributes:
        spans: of rows.
        notes: what the header of a run should say of them.
        coordinates: by name, those that they were chosen by, of all rows.
    """

    spans: Spans
    notes: tuple[str, ...] = ()
    coordinates: Mapping[str, Values] = dataclasses.field(default_factory=dict)

    def check_windows(self, spans: Spans, reach: int) -> None:
        """Look for windows whose rows do not follow each other in the order of a coordinate.

        Args:
            spans: that samples lie in.
            reach: rows of a sample.

        Raises:
            DatasetError: if rows go back and forth.
        """
        for name, values in self.coordinates.items():
            if values.numbers.dtype.kind not in "iuf":
                continue
            inside = _follow_each_other(spans, len(values))
            steps = np.diff(values.numbers.astype(np.float64))[inside]
            if len(steps):
                _check_steps(name, values, np.flatnonzero(inside), steps, reach)


def _follow_each_other(spans: Spans, rows: int) -> Bools:
    """Return of which rows the next one is in the same span, (rows - 1,) bool."""
    edges = np.zeros(rows + 1, np.int64)
    edges[spans.starts] += 1
    edges[spans.stops - 1] -= 1
    inside: Bools = np.cumsum(edges)[: rows - 1] > 0
    return inside


def _check_steps(name: str, values: Values, rows: Int64s, steps: Any, reach: int) -> None:
    """Look at the steps of a coordinate from row to row, where rows follow each other.

    Raises:
        DatasetError: if windows would go back and forth in it.
    """
    equal, back = steps == 0, steps < 0
    descends = bool(back.all())
    if reach > 1 and (equal.any() or (back.any() and not descends)):
        at = int(rows[np.flatnonzero(equal | (back != back[0]))[0]])
        raise DatasetError(
            f'samples reach over {reach} rows, and the coordinate "{name}" goes from '
            f"{values.text(values.numbers[at])} (row {at:,}) to "
            f"{values.text(values.numbers[at + 1])}, not as elsewhere: windows would mix what does "
            "not follow. Sort the rows and take double ones out, or leave steps, lead and every out"
        )
    if equal.any():
        at = int(rows[np.flatnonzero(equal)[0]])
        logger.warning(
            'coordinate "%s": %s as the row before, the first one of %s (row %s)',
            name,
            f"{plural(int(equal.sum()), 'row')} with the same value",
            values.text(values.numbers[at + 1]),
            f"{at + 1:,}",
        )
    if reach == 1:
        return
    if descends:
        logger.warning(
            'coordinate "%s" descends: data.fields.NAME.lead leads to smaller values of it', name
        )
    gaps = np.abs(steps) > _GAP * np.median(np.abs(steps))
    if gaps.any():
        at = int(rows[np.flatnonzero(gaps)[0]])
        logger.warning(
            'coordinate "%s": windows of %d rows reach over %s, the first one from %s to %s',
            name,
            reach,
            plural(int(gaps.sum()), "gap"),
            values.text(values.numbers[at]),
            values.text(values.numbers[at + 1]),
        )


def choose_rows(
    section: DataSection,
    purpose: Purpose,
    source: str,
    parts: Sequence[Part],
    reach: int,
    semantics: Semantics,
) -> ChosenRows:
    """Return the rows that may be in samples, by mask, range or coordinate, and by split.

    Args:
        section: of the config.
        purpose: of the samples.
        source: the files of `data.train`, or of `data.validation`.
        parts: the files of the fields, with equally many rows.
        reach: rows of a sample.
        semantics: the rules of the run.

    Raises:
        DatasetError: if there are no such rows.
        ConfigError: if rows are for training and for an evaluation.
    """
    samples = section.samples
    rows = _Rows(source, parts, semantics)
    own = samples.train if purpose == "train" else samples.validation
    if samples.validation_fraction is not None:
        own = samples.train  # it chooses what is split
    chosen = rows.chosen(own, purpose)
    if purpose == "train":
        _require_apart(section, rows, own, chosen)
    if samples.validation_fraction is None:
        return chosen
    if samples.split_by == "files":
        stops = borders_of(parts)
    else:
        row_bytes = sum(
            part.dataset.bytes_per_sample * (part.lengths.mean if part.lengths else 1)
            for part in parts
        )
        size = samples.piece_rows or default_piece_rows(rows.count, row_bytes, reach)
        stops = piece_stops(rows.count, size)
    if len(stops) < 2:
        raise DatasetError(
            f"{source}: data.samples.validation_fraction = {samples.validation_fraction} splits "
            f"this by {samples.split_by} (data.samples.split_by), and {rows.count} rows in "
            f"{len(parts[0].dataset.shards)} files make one piece only: set "
            "data.samples.piece_rows lower, or name other files for data.validation"
        )
    first, second = split_pieces(stops, samples.validation_fraction, samples.split_seed)
    own_part = first if purpose == "train" else second
    return dataclasses.replace(chosen, spans=common(chosen.spans, own_part))


def borders_of(parts: Sequence[Part]) -> Int64s:
    """Return where a file ends in any of the parts, (files,) int64."""
    return np.unique(np.concatenate([part.stops for part in parts]))


def _require_apart(section: DataSection, rows: _Rows, own: Given, chosen: ChosenRows) -> None:
    """Check that no row that is trained with is evaluated with, where coordinates say which.

    Raises:
        ConfigError: if one is.
    """
    others: dict[str, Given] = {}
    if section.validation is None:
        others["validation"] = section.samples.validation
    if section.test is None:
        others["test"] = section.samples.test
    for name, given in others.items():
        if given is None or not (isinstance(given, Mapping) or isinstance(own, Mapping)):
            continue
        both = common(chosen.spans, rows.chosen(given, name).spans)
        if not both.rows:
            continue
        named = {**(own if isinstance(own, Mapping) else {})}
        named |= given if isinstance(given, Mapping) else {}
        coordinate = next(iter(named))
        values = rows.values(coordinate, f"data.samples.{name}")
        last = int(both.stops[-1]) - 1
        raise ConfigError(
            f"data.samples: train and {name} have {plural(both.rows, 'row')} in common, "
            f"{coordinate} {values.text(values.numbers[both.starts[0]])} to "
            f"{values.text(values.numbers[last])}: both ends belong to a range, and a date is all "
            f"of its year, month or day. Set them apart, or give data.{name} files of its own"
        )


class _Rows:
    """The rows of joined files, and what says which of them are wanted."""

    def __init__(self, source: str, parts: Sequence[Part], semantics: Semantics) -> None:
        self.source = source
        self.count = parts[0].samples
        # What the files of the samples say counts before what joined files do.
        rows = [part for part in parts if part.constants is None] or parts
        self._parts = sorted(rows, key=lambda part: part.dataset.source != source)
        self._semantics = semantics
        self._values: dict[str, Values] = {}

    def chosen(self, given: Given, purpose: str) -> ChosenRows:
        """Return the rows of a purpose.

        Raises:
            DatasetError: if there are no such.
        """
        if isinstance(given, Mapping):
            return self._by_coordinates(given, purpose)
        if isinstance(given, str):
            return ChosenRows(spans=_masked(given, self.source, self.count, self._semantics))
        if given is not None and given[1] > self.count:
            raise DatasetError(
                f"{self.source}: data.samples.{purpose} = {list(given)}, but there are "
                f"{self.count} rows"
            )
        return ChosenRows(spans=Spans.of(*(given or (0, self.count))))

    def _by_coordinates(self, given: Mapping[str, Any], purpose: str) -> ChosenRows:
        """Return the rows whose coordinates all lie in ranges."""
        flags = np.ones(self.count, bool)
        notes = []
        for name, ranges in given.items():
            key = f"data.samples.{purpose}.{name}"
            values = self.values(name, key)
            own = np.zeros(self.count, bool)
            for first, last in ranges if isinstance(ranges[0], list | tuple) else [ranges]:
                try:
                    own |= values.between(first, last)
                except ValueError as error:
                    raise ConfigError(f"{key}: it {error}") from None
            flags &= own
            found = values.ends(flags)
            if found is None:
                there = values.ends(values.is_there)
                known = "nothing that is not missing" if there is None else " to ".join(there)
                raise DatasetError(
                    f"{self.source}: {key} = {_listed(ranges)}, and no row is there: "
                    f'"{name}" has {known}'
                )
            notes.append(f"{name} {found[0]} to {found[1]}")
        spans = spans_where(flags)
        note = f"{purpose}: {', '.join(notes)}, {plural(spans.rows, 'row')} of {self.count:,}"
        coordinates = {name: self._values[name] for name in given}
        return ChosenRows(spans=spans, notes=(note,), coordinates=coordinates)

    def values(self, name: str, key: str) -> Values:
        """Return the values of a coordinate, one for each row. Reads them from all files.

        Raises:
            DatasetError: if there is no such coordinate.
        """
        if name in self._values:
            return self._values[name]
        found, problem = [], ""
        for part in self._parts:
            try:
                found.append((part, joined(list(_of_files(part, name)))))
            except NoCoordinateError as error:
                problem = problem or str(error)
            except ValueError as error:
                raise DatasetError(f"{error} ({key})") from None
        if not found:
            raise DatasetError(f"{problem}, by which {key} says what are samples")
        (first, values), *others = found
        _warn_missing(name, values, first)
        for part, other in others:
            _warn_different(name, values, other, first.dataset, part.dataset)
        self._values[name] = values
        return values


def _listed(ranges: Sequence[Any]) -> str:
    return str([list(each) if isinstance(each, tuple) else each for each in ranges])


def _warn_missing(name: str, values: Values, part: Part) -> None:
    """Warn where rows have no value of a coordinate, as those that were never written have none."""
    missing = np.flatnonzero(~values.is_there)
    if len(missing):
        ((shard, row),) = part.places(missing[:1])
        logger.warning(
            'coordinate "%s": %s of %s without a value, which no range has: the first one is row '
            "%s of %s. Rows of netCDF that were never written are such",
            name,
            plural(len(missing), "row"),
            f"{len(values):,}",
            f"{row:,}",
            shard.path,
        )


def _warn_different(name: str, one: Values, two: Values, first: Dataset, second: Dataset) -> None:
    """Warn where joined rows have different values of a coordinate, as those of a shift have."""
    differ = np.flatnonzero(one.numbers != two.numbers) if one.calendar == two.calendar else [0]
    if len(differ):
        at = int(differ[0])
        logger.warning(
            'fields are joined row by row, and row %s has "%s" %s in %s, but %s in %s: the former '
            "says which rows are samples",
            f"{at:,}",
            name,
            one.text(one.numbers[at]),
            first.source,
            two.text(two.numbers[at]),
            second.source,
        )


def _of_files(part: Part, name: str) -> Iterator[Values]:
    """Yield the values of a coordinate in each file of a part.

    Raises:
        NoCoordinateError: if a file does not have it, naming the file.
        ValueError: if it cannot be followed.
        DatasetError: if a file cannot be read.
    """
    rows = np.diff(part.stops, prepend=0).tolist()
    field, about = next(iter(part.dataset.fields.items()))
    for shard, count in zip(part.dataset.shards, rows, strict=True):
        inside = shard.inside(field) if about.form is None else about.form.path
        try:
            if part.axis == WHOLE:
                raise ValueError('with axis = "none" it has no rows, which a coordinate is of')
            yield _of_file(shard, inside, part.axis, name, count)
        except ValueError as error:
            raise type(error)(f'{shard.path}: "{inside}": {error}') from None


def _of_file(shard: Shard, inside: str, axis: int, name: str, rows: int) -> Values:
    try:
        with open_hdf5_file(shard.path) as file:
            coordinate = coordinate_of_rows(file[inside], axis, name, rows)
            values = values_of(coordinate)
            if len(values) > rows or (len(values) < rows and coordinate.maxshape != (None,)):
                raise ValueError(
                    f'"{name}" has {len(values):,} values, and there are {rows:,} rows'
                )
            return values.grown_to(rows)
    except ValueError:
        raise
    except HDF5_FAILURES as error:
        raise DatasetError(f"{shard.path}: HDF5 cannot read this file: {error}") from error


def _masked(path: str, source: str, rows: int, semantics: Semantics) -> Spans:
    """Return the rows where a boolean HDF5 dataset is true."""
    name = path.strip("/")
    dataset = open_dataset(source, [name], order=semantics.file_order)
    if semantics.decode == "none":
        dataset = dataset.as_stored([name])
    field = dataset.fields[name]
    if field.shape or field.dtype.kind not in "bui":
        raise DatasetError(
            f'{source}: "{path}" is not a mask: it is {field.dtype} with rows of shape '
            f"{field.shape}, and has to be one true or false a row"
        )
    if dataset.samples != rows:
        raise DatasetError(
            f'{source}: the mask "{path}" has {dataset.samples} rows, the fields have {rows}'
        )
    decoding = decodings([dataset], [name])[0].get(name)
    found = []
    with closing(open_rows(dataset)) as reader:
        for start in range(0, rows, MASK_ROWS):
            out = np.empty((min(MASK_ROWS, rows - start), field.row_bytes), np.uint8)
            reader.read_runs(
                name, np.array([start]), np.array([len(out)]), out, np.zeros(1, np.int64)
            )
            numbers = out.view(field.dtype.newbyteorder("="))[:, 0]
            flags = numbers != 0
            if decoding is not None:  # what is missing is not true
                codes = decoding.codes(np.arange(start, start + len(out)))
                flags &= ~decoding.missing(numbers, codes)
            found.append(spans_where(flags, start))
    return merged(found)
