"""Is every byte of a dataset what it is to be? All that is wrong, not only the first of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpctrain.convert.parallel import Progress, blocks_of, for_each, one_shard, silent
from hpctrain.convert.unseen import not_looked_at, unseen_arrays, unseen_files
from hpctrain.data.coding import Coding
from hpctrain.data.dataset import Dataset, Field, Shard, require_fields
from hpctrain.data.decoding import decodings
from hpctrain.data.files.catalogue import is_catalogue, read_catalogue
from hpctrain.data.files.discovery import (
    describe,
    find_files,
    inspect_file,
    require_finished,
    unlike_listed,
)
from hpctrain.data.files.index import INDEX_NAME, file_problems, parse_index
from hpctrain.errors import DatasetError
from hpctrain.utils.files import file_checksum

Limits = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found.

    Attributes:
        source: what the user called the dataset.
        problems: each names its shard, and field and row where it has them; none: all is well.
        shards, samples, size: what was looked at, `size` in bytes.
        has_checksums: whether the index has checksums to compare with.
        not_looked_at: arrays and files whose values nobody looked at, in words; empty: none.
    """

    source: str
    problems: tuple[str, ...]
    shards: int
    samples: int
    size: int
    has_checksums: bool
    not_looked_at: str


class _Task(NamedTuple):
    """What one process checks.

    Attributes:
        path: of the file.
        names: of the fields; None: all that it holds.
        listed: what the index says of it, and of its fields.
        limits: by field, the least and the largest value.
        nan_allowed: fields that may hold NaN and Inf.
        as_stored: take numbers as they are, whatever attributes say.
    """

    path: str
    names: Sequence[str] | None
    listed: tuple[Shard, Mapping[str, Field]] | None
    limits: Limits
    nan_allowed: frozenset[str]
    as_stored: bool


@dataclass(slots=True)
class _Found:
    """What one process found."""

    problems: list[str] = field(default_factory=list)
    fields: dict[str, Field] = field(default_factory=dict)
    unseen: set[str] = field(default_factory=set)
    samples: int = 0
    size: int = 0


def verify(
    pattern: str,
    fields: Sequence[str] | None = None,
    *,
    limits: Limits | None = None,
    nan_allowed: Sequence[str] = (),
    as_stored: bool = False,
    jobs: int = 0,
    progress: Progress = silent,
) -> Verdict:
    """Read every byte of a dataset and check it against its index, and against sense.

    Checked are: missing, surplus and truncated shards; checksums; that HDF5 opens them and shapes,
    dtypes and places are those of the index, or of the first file; NaN and Inf; and ranges. Of the
    files of a catalogue, which need not fit together, only the fields named.

    Args:
        pattern: as `open_dataset` takes it.
        fields: whose values to look at; None: all.
        limits: by field, the least and the largest value that it may have.
        nan_allowed: fields that may hold NaN and Inf.
        as_stored: look at the numbers that are stored, and not at the values that they stand for.
        jobs: processes at the same time; 0: one a processor.
        progress: is told how many shards are done.

    Raises:
        DatasetError: if there is no dataset, its index is broken, or a field is not there.
    """
    folder = Path(pattern)
    require_finished(folder)
    problems: list[str] = []
    names = None if fields is None else tuple(fields)
    has_checksums = False

    def task(path: str, listed: tuple[Shard, Mapping[str, Field]] | None) -> _Task:
        return _Task(path, names, listed, limits or {}, frozenset(nan_allowed), as_stored)

    if (folder / INDEX_NAME).exists():
        dataset = parse_index(folder)
        wrong_files = file_problems(dataset, folder)
        problems += wrong_files.values()
        require_fields(
            [*(names or ()), *(limits or {}), *nan_allowed], dataset.fields, dataset.source
        )
        tasks = [
            task(shard.path, (shard, dataset.fields))
            for shard in dataset.shards
            if shard.path not in wrong_files
        ]
        has_checksums = all(shard.checksum is not None for shard in dataset.shards)
    elif is_catalogue(folder):
        files = read_catalogue(folder)
        tasks = [task(file.path, file.shard(names or [], 0)) for file in files]
        has_checksums = all(file.checksum is not None for file in files)
    else:
        tasks = [task(path, None) for path in find_files(pattern)]
    found = for_each(check_shard, tasks, jobs, progress, _crashed)
    problems += [problem for each_ in found for problem in each_.problems]
    if not (folder / INDEX_NAME).exists():
        problems += _differences(tasks, found)
    return Verdict(
        source=pattern,
        problems=tuple(problems),
        shards=len(tasks),
        samples=sum(each_.samples for each_ in found),
        size=sum(each_.size for each_ in found),
        has_checksums=has_checksums,
        not_looked_at=not_looked_at(
            {name for each_ in found for name in each_.unseen},
            unseen_files(pattern),
            has_checksums=has_checksums,
        ),
    )


def _crashed(task: _Task, _: BrokenProcessPool) -> _Found:
    return _Found([f"{task.path}: HDF5 crashed while it read this file: it is damaged"])


def check_shard(task: _Task) -> _Found:
    """Return what is wrong with one file, and what it holds."""
    found = _Found()
    try:
        if task.listed is not None and task.listed[0].checksum is not None:
            listed = task.listed[0]
            if file_checksum(task.path) != listed.checksum:
                found.problems.append(
                    f"{task.path}: its checksum is not that of {INDEX_NAME}: bytes of this file "
                    "have changed. Bring the file back, or write the dataset anew"
                )
        names = list(task.listed[1]) if task.listed else task.names
        shard, found.fields = inspect_file(task.path, names)
        found.samples, found.size = shard.samples, shard.size
        if task.listed is not None:
            found.problems += unlike_listed(*task.listed, shard, found.fields)
        dataset = one_shard(shard, found.fields)
        if task.as_stored:
            dataset = dataset.as_stored(found.fields)
        found.unseen = unseen_arrays(task.path, task.names or found.fields)
        for name in task.names or found.fields:
            found.problems += _bad_values(dataset, name, task)
    except DatasetError as error:
        found.problems.append(str(error))
    except OSError as error:
        found.problems.append(f"{task.path}: {error.strerror or error}")
    return found


def _differences(tasks: Sequence[_Task], found: Sequence[_Found]) -> list[str]:
    """Return which files hold other fields than the first one that could be read."""
    readable = [(task.path, each_.fields) for task, each_ in zip(tasks, found, strict=True)]
    readable = [(path, fields) for path, fields in readable if fields]
    problems = []
    for path, fields in readable[1:]:
        first_path, first = readable[0]
        for name in first.keys() | fields.keys():
            here, there = fields.get(name), first.get(name)
            if here != there:
                problems.append(
                    f'{path}: field "{name}" is {describe(here)}, but {describe(there)} in '
                    f"{first_path}"
                )
    return problems


def _bad_values(dataset: Dataset, name: str, task: _Task) -> list[str]:
    """Return what is wrong with the values of a field: each kind once, with its first row."""
    about = dataset.fields[name]
    counts: dict[str, tuple[int, int]] = {}

    def note(what: str, start: int, is_bad: npt.NDArray[np.bool_]) -> None:
        bad = np.flatnonzero(is_bad.reshape(len(is_bad), -1).any(axis=1))
        if bad.size:
            first, before = counts.get(what, (start + int(bad[0]), 0))
            counts[what] = (first, before + bad.size)

    check_nan = about.dtype.kind in "fc" and name not in task.nan_allowed
    limits = task.limits.get(name)
    (coding,) = dataset.codings(name)
    decoding = decodings([dataset.select([name])])[0].get(name)
    if check_nan or limits is not None:
        for start, numbers in blocks_of(dataset, name):
            if check_nan and not coding.says_nan:
                note("NaN", start, np.isnan(numbers))
            if check_nan:
                note("Inf", start, np.isinf(numbers) & ~_said_to_be_missing(coding, numbers))
            if limits is not None:
                values = numbers if decoding is None else decoding.decode(numbers)
                note(*_outside(limits, start, values))
    elif dataset.shards[0].layouts[name].offset is None:
        for _ in blocks_of(dataset, name):
            pass  # every chunk has to decompress
    return [
        f'{dataset.source}: field "{name}", row {first}: {what}'
        + (f", and in {count - 1} more of its rows" if count > 1 else "")
        for what, (first, count) in counts.items()
    ]


def _said_to_be_missing(coding: Coding, numbers: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    found = coding.is_missing(numbers) if coding.marks else None
    return np.zeros(numbers.shape, np.bool_) if found is None else found


def _outside(
    limits: tuple[float, float], start: int, values: npt.NDArray[Any]
) -> tuple[str, int, npt.NDArray[np.bool_]]:
    least, largest = limits
    return (
        f"a value outside of {least:g} to {largest:g}",
        start,
        (values < least) | (values > largest),
    )
