"""Packing a source to shards: on any number of ranks, and on from where it was interrupted.

What goes into which shard is decided before the first is written, by the source and the options
alone. So shards are made by any rank, in any order, and are the same byte for byte. What a folder
was begun with lies in it until it is whole, and only the same goes on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpctrain.convert.parallel import Progress, silent
from hpctrain.convert.sources.source import Source
from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Dataset, Shard
from hpctrain.data.files.discovery import inspect_file
from hpctrain.data.files.index import (
    INDEX_NAME,
    UNFINISHED_NAME,
    read_index,
    read_origin,
    write_index,
)
from hpctrain.data.files.storage import Storage
from hpctrain.data.order.permutation import derive_key, permutation
from hpctrain.data.ragged import ragged_in, stored_fields
from hpctrain.data.writer import (
    SHARD_BYTES,
    cannot_write,
    inspect_shard,
    require_stored_apart,
    require_vacant,
    rows_of_shard,
    shard_name,
    write_shard,
)
from hpctrain.errors import DatasetError, HpctrainError, UsageError
from hpctrain.topology import Communicator, on_all_ranks, on_rank_zero
from hpctrain.utils.files import replace_file
from hpctrain.utils.json_files import SMALL, parse_json, read_whole
from hpctrain.utils.text import plural

# What a key is for: which rows a split gets and their order share nothing.
_SPLITS, _ORDER = 0, 1
_SPLIT = re.compile(r"([A-Za-z0-9_][\w.-]*)=(\d*\.?\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How to pack.

    Attributes:
        splits: fractions by name, each to a folder of its own; empty: all to one folder.
        seed: of the splits, and of the order.
        shuffle: write the samples in a random order.
        shard_bytes: values in one shard, about.
        shard_rows: samples in one shard; None: as many as make `shard_bytes`.
        storage: of the fields.
    """

    splits: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    shuffle: bool = False
    shard_bytes: int = SHARD_BYTES
    shard_rows: int | None = None
    storage: Storage = field(default_factory=Storage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One folder to fill.

    Attributes:
        split: its name; "" if there is only one.
        origin: what decides about every byte of it.
        is_there: True if that was written, whole, before.
    """

    split: str
    folder: Path
    samples: int
    shard_rows: int
    origin: Mapping[str, Any]
    is_there: bool

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_rows)

    def rows_of(self, number: int) -> int:
        """Return how many samples a shard holds; the last one may be short."""
        return min(self.shard_rows, self.samples - number * self.shard_rows)

    def __str__(self) -> str:
        what = f"{plural(self.samples, 'sample')} in {plural(self.shards, 'shard')}"
        return f"{self.split} {what}" if self.split else what


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What rank 0 found and decided, for all ranks."""

    source: Source
    outputs: tuple[Output, ...]


class Written(NamedTuple):
    """One shard that is there.

    Attributes:
        split: that it belongs to.
        number: of the shard in it.
        shard: what it holds.
        is_kept: whether an earlier packer had finished it.
    """

    split: str
    number: int
    shard: Shard
    is_kept: bool


def pack(
    open_: Callable[[], Source],
    folder: Path,
    packing: Packing,
    communicator: Communicator,
    progress: Progress = silent,
) -> str:
    """Pack a source to a new folder of shards, or to one folder a split. Collective: all ranks.

    Started again after an interruption, with the same source and options, it keeps the shards that
    are finished, also on another number of ranks. Where all is there, nothing is done.

    Args:
        open_: finds the source; called on rank 0 only.
        folder: to write to, or to make one folder a split in.
        packing: how.
        communicator: of all ranks that take part.
        progress: is told this rank's share, in samples.

    Returns:
        What was done, one line.

    Raises:
        DatasetError: on all ranks, if the source cannot be read, or something else is in the way.
    """
    plan = on_rank_zero(communicator, lambda: prepare(open_(), folder, packing))
    selections = select(plan.source.samples, packing.splits, packing.seed, packing.shuffle)
    tasks = [
        (output, number)
        for output in plan.outputs
        if not output.is_there
        for number in range(output.shards)
    ]
    everybodys = _write(plan.source, selections, tasks, packing.storage, communicator, progress)
    return on_rank_zero(communicator, lambda: _finish(plan, folder, everybodys))


def prepare(source: Source, folder: Path, packing: Packing) -> Plan:
    """Decide what goes where, and mark the folders as unfinished.

    Raises:
        DatasetError: if a filter is not installed, or something else is in one of the folders.
    """
    packing.storage.require_available()
    require_stored_apart(source.fields, ragged_in(source.fields), source.name)
    sizes = split_sizes(source.samples, packing.splits) if packing.splits else {"": source.samples}
    shard_rows = packing.shard_rows or rows_of_shard(
        source.fields, packing.shard_bytes, packing.storage
    )
    outputs = []
    for split, samples in sizes.items():
        origin = {
            "source": source.name,
            "identity": source.identity,
            "samples": source.samples,
            "split": split,
            "splits": dict(packing.splits),
            "seed": packing.seed,
            "shuffle": packing.shuffle,
            "shard_rows": shard_rows,
            "storage": str(packing.storage),
            "chunk_bytes": packing.storage.chunk_bytes,
        }
        path = folder / split if split else folder
        try:
            is_there = _claim(path, origin)
        except OSError as error:
            raise cannot_write(path, error) from error
        outputs.append(
            Output(
                split=split,
                folder=path,
                samples=samples,
                shard_rows=shard_rows,
                origin=origin,
                is_there=is_there,
            )
        )
    return Plan(source=source, outputs=tuple(outputs))


def whole(folder: Path, packing: Packing, identity: str) -> str | None:
    """Return what to say of a source that was packed to a folder, whole, before; None: it was not.

    For sources that cost much to open: `pack` itself finds the same out of one that is open.
    """
    folders = [folder / split for split in packing.splits] or [folder]
    if any(not (each / INDEX_NAME).exists() for each in folders):
        return None
    for each in folders:
        origin = read_origin(each)
        if not isinstance(origin, dict) or origin.get("identity") != identity:
            return None
        told = (packing.seed, packing.shuffle, str(packing.storage), dict(packing.splits))
        if told != tuple(origin.get(key) for key in ("seed", "shuffle", "storage", "splits")):
            return None
        if packing.shard_rows not in (None, origin.get("shard_rows")):
            return None
        read_index(each)
    return f"{folder}: packed already"


def _claim(folder: Path, origin: Mapping[str, Any]) -> bool:
    """Make a folder ready to be filled, or return True if it has been."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / UNFINISHED_NAME
    if marker.exists():
        _require_same(folder, origin, _begun(marker))
        # What a killed packer was at; nobody else writes here.
        for entry in folder.glob(".shard-*"):
            entry.unlink(missing_ok=True)
        return False
    if (folder / INDEX_NAME).exists() and read_origin(folder) == origin:
        read_index(folder)
        return True
    require_vacant(folder)
    replace_file(marker, (json.dumps(origin) + "\n").encode())
    return False


def _begun(marker: Path) -> object:
    try:
        return parse_json(read_whole(marker, SMALL))
    except ValueError:
        return None


def _require_same(folder: Path, origin: Mapping[str, Any], begun: object) -> None:
    """Check that what was begun in a folder is what is to go on."""
    if not isinstance(begun, dict):
        raise DatasetError(
            f"{folder}: another program is writing a dataset here, or was killed while it did. "
            "Wait for it, or remove the folder"
        )
    for key, value in origin.items():
        if begun.get(key) != value:
            what = (
                "the files of its source, or how they are read, are others now"
                if key == "identity"
                else f"{key} = {json.dumps(value)} was {json.dumps(begun.get(key))} then"
            )
            raise DatasetError(
                f"{folder}: packing was begun here and did not finish, and {what}. Give the same "
                "source and options to go on, or remove the folder to begin anew"
            )


def _write(
    source: Source,
    selections: Mapping[str, Selection],
    tasks: Sequence[tuple[Output, int]],
    storage: Storage,
    communicator: Communicator,
    progress: Progress,
) -> list[Written]:
    """Write the shards, each by one rank, and return those of all. Collective: all ranks.

    All ranks hear of a failure one shard later: none goes on for hours with work that is lost.

    Raises:
        DatasetError: on all ranks, that of the lowest rank that failed.
    """
    mine = tasks[communicator.rank :: communicator.world_size]
    total = sum(output.rows_of(number) for output, number in mine)
    written: list[Written] = []
    failure: HpctrainError | None = None
    done = 0
    progress(done, total)
    earlier = communicator.start_max([0])
    for turn in range(-(-len(tasks) // communicator.world_size)):
        if turn < len(mine) and failure is None:
            output, number = mine[turn]
            rows = _rows(selections, output, number)
            try:
                written.append(
                    Written(output.split, number, *_shard(source, output, number, rows, storage))
                )
            except HpctrainError as error:
                failure = error
            done += len(rows)
            progress(done, total)
        latest = communicator.start_max([int(failure is not None)])
        is_over = earlier.wait()[0]
        earlier = latest
        if is_over:
            break
    earlier.wait()

    def outcome() -> list[Written]:
        if failure is not None:
            raise failure
        return written

    return [each for part in on_all_ranks(communicator, outcome) for each in part]


def _rows(selections: Mapping[str, Selection], output: Output, number: int) -> Int64s:
    begin = number * output.shard_rows
    return selections[output.split].part(begin, begin + output.rows_of(number))


def _shard(
    source: Source, output: Output, number: int, rows: Int64s, storage: Storage
) -> tuple[Shard, bool]:
    """Return a shard, and whether it was there already."""
    path = output.folder / shard_name(number)
    kept = _kept(path, source, len(rows))
    if kept is not None:
        return kept, True
    return write_shard(path, source.read(rows), source.attributes, storage), False


def _kept(path: Path, source: Source, samples: int) -> Shard | None:
    """Return the shard that an interrupted packer left, if it is what is wanted."""
    if not path.exists():
        return None
    wanted, values = stored_fields(source.fields), ragged_in(source.fields)
    try:
        shard, fields = inspect_file(str(path), list(wanted))
        fields_of_values = {name: inspect_file(str(path), [name])[1][name] for name in values}
    except DatasetError:
        return None
    if shard.samples != samples or fields != wanted or fields_of_values != values:
        return None
    return inspect_shard(path, list(wanted))


def _finish(plan: Plan, folder: Path, written: Sequence[Written]) -> str:
    """Write the indices, after which the folders are datasets."""
    for output in plan.outputs:
        shards = {each.number: each.shard for each in written if each.split == output.split}
        if output.is_there:
            continue
        dataset = Dataset(
            str(output.folder),
            stored_fields(plan.source.fields),
            tuple(shards[number] for number in range(output.shards)),
        )
        try:
            write_index(dataset, output.folder, output.origin)
            (output.folder / UNFINISHED_NAME).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(output.folder, error) from error
    what = ", ".join(str(output) for output in plan.outputs)
    if all(output.is_there for output in plan.outputs):
        return f"{folder}: packed already: {what}"
    kept = sum(each.is_kept for each in written)
    return f"{folder}: packed {what}" + (f" ({kept} of them were there)" if kept else "")


def parse_splits(text: str) -> dict[str, float]:
    """Return the fractions of a text such as "train=0.9,validation=0.1", by name.

    Raises:
        UsageError: if they are none, or make more than the whole.
    """
    fractions: dict[str, float] = {}
    for part in text.split(","):
        match = _SPLIT.fullmatch(part.strip())
        if match is None or match[1] in fractions:
            raise UsageError(f"{text}: write splits as train=0.9,validation=0.1")
        fractions[match[1]] = float(match[2])
    if min(fractions.values()) <= 0 or math.fsum(fractions.values()) > 1 + 1e-9:
        raise UsageError(f"{text}: the fractions have to be above 0, and at most 1 together")
    return fractions


def split_sizes(samples: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """Return how many samples each split gets; fractions of 1 together give all of them.

    Raises:
        DatasetError: if one gets none.
    """
    stops = [round(samples * stop) for stop in np.cumsum(list(fractions.values())).tolist()]
    sizes = dict(zip(fractions, np.diff([0, *stops]).tolist(), strict=True))
    for name, size in sizes.items():
        if size == 0:
            raise DatasetError(
                f'the split "{name}" gets none of {samples} samples: give it a larger fraction'
            )
    return sizes


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows of a source, in the order in which they are written.

    Attributes:
        samples: how many.
        rows: (samples,) int64; None: the rows 0 to samples - 1.
    """

    samples: int
    rows: Int64s | None

    def part(self, start: int, stop: int) -> Int64s:
        """Return the rows at some places, (stop - start,) int64."""
        if self.rows is None:
            return np.arange(start, stop, dtype=np.int64)
        return self.rows[start:stop]


def select(
    samples: int, fractions: Mapping[str, float], seed: int, shuffle: bool
) -> dict[str, Selection]:
    """Return the rows of every split; without fractions, all of them under the name "".

    Rows are in the order of the source unless they are to be shuffled.
    """
    if not fractions:
        rows = permutation(derive_key(seed, _ORDER), samples) if shuffle else None
        return {"": Selection(samples, rows)}
    drawn = permutation(derive_key(seed, _SPLITS), samples)
    selections: dict[str, Selection] = {}
    begin = 0
    for name, size in split_sizes(samples, fractions).items():
        rows = drawn[begin : begin + size]
        # Drawn at random, they are shuffled as they are.
        selections[name] = Selection(size, rows if shuffle else np.sort(rows))
        begin += size
    return selections
