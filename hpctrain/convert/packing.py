"""Packing a source to shards: on any number of ranks, and on from where it was interrupted.

What goes into which shard is decided before the first is written, by the source and the options
alone. So shards are made by any rank, in any order, and are the same to the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hpctrain.convert.planning import Output, Packing, Plan, prepare
from hpctrain.convert.progress import Progress, silent
from hpctrain.convert.sources.source import Source
from hpctrain.convert.splitting import Selection, select
from hpctrain.data.dataset import Dataset, Shard
from hpctrain.data.finding.discovery import inspect_file
from hpctrain.data.index import UNFINISHED_NAME, write_index
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.shard_file import (
    cannot_write,
    inspect_shard,
    shard_name,
    write_shard,
)
from hpctrain.data.storage import Storage
from hpctrain.errors import DatasetError, HpctrainError
from hpctrain.topology import Communicator, on_all_ranks, on_rank_zero


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
    try:
        shard, fields = inspect_file(str(path), list(source.fields))
    except DatasetError:
        return None
    if shard.samples != samples or fields != source.fields:
        return None
    return inspect_shard(path, list(source.fields))


def _finish(plan: Plan, folder: Path, written: Sequence[Written]) -> str:
    """Write the indices, after which the folders are datasets."""
    for output in plan.outputs:
        shards = {each.number: each.shard for each in written if each.split == output.split}
        if output.is_there:
            continue
        dataset = Dataset(
            str(output.folder),
            plan.source.fields,
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
