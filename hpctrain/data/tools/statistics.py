"""Mean, standard deviation, least and largest value of every field and channel.

Sums are float64, each shard's about its own mean, and shards are merged in their order: the result
does not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Gt, Lt, MinLen

from hpctrain.config.semantics import FIRST, NEWEST
from hpctrain.data.dataset import Dataset, Field, Shard
from hpctrain.data.decoding import decoding_record, decodings
from hpctrain.data.file_order import FileOrder, order_key
from hpctrain.data.parallel import each, processors
from hpctrain.data.shard_file import cannot_write
from hpctrain.data.tools.blocks import decoded_blocks_of, one_shard
from hpctrain.data.tools.moments import FACTS, Moments
from hpctrain.data.tools.progress import Progress, silent
from hpctrain.errors import DatasetError
from hpctrain.utils.files import replace_file
from hpctrain.utils.json_files import LARGE, parse_checked, parse_json, read_whole
from hpctrain.utils.text import table

STATS_NAME = "stats.json"
STATS_VERSION = 1
MOST_CHANNELS = 4096
"""The first axis of a sample is its channels, up to so many."""

TOLD_CHANNELS = 8
PART_VALUES = 2**16


_Finite = Annotated[float, Gt(-math.inf), Lt(math.inf)]
_Deviation = Annotated[float, Ge(0), Lt(math.inf)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Channels:
    """Facts of each channel, as JSON has them; null for one without a value."""

    mean: Annotated[list[_Finite | None], MinLen(1)]
    std: Annotated[list[_Deviation | None], MinLen(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """Facts of a field, as far as training goes by them."""

    mean: _Finite
    std: _Deviation
    channels: _Channels


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stats:
    """`stats.json`.

    Attributes:
        semantics: version of the rules by which files become values; 0.1.0 wrote none.
    """

    fingerprint: str
    fields: dict[str, _Facts]
    semantics: Annotated[int, Ge(1)] = FIRST.version


class _Task(NamedTuple):
    shard: Shard
    fields: dict[str, Field]


def measure(dataset: Dataset, jobs: int = 0, progress: Progress = silent) -> dict[str, Any]:
    """Return the statistics of a dataset, as they go into `stats.json`, of its values decoded.

    Complex fields are left out. The standard deviation is that of the values as they are, divided
    by their number.

    Raises:
        DatasetError: naming file, field and row that cannot be read, or a field without a finite
            value.
    """
    fields = {name: about for name, about in dataset.fields.items() if about.dtype.kind != "c"}
    decodings([dataset])  # whatever is wrong with that is told before anything is read
    tasks = [_Task(shard, fields) for shard in dataset.shards]
    found: dict[int, dict[str, Moments]] = {}
    progress(0, len(tasks))
    for index, result in each(measure_shard, tasks, jobs or processors()):
        if isinstance(result, BrokenProcessPool):
            raise DatasetError(
                f"{tasks[index].shard.path}: HDF5 crashed while it read this file: it is damaged"
            ) from result
        found[index] = result
        progress(len(found), len(tasks))
    parts = [found[index] for index in range(len(tasks))]
    return {
        "version": STATS_VERSION,
        "semantics": NEWEST.version,
        "fingerprint": dataset.fingerprint,
        "samples": dataset.samples,
        "fields": {
            name: {
                **_field_facts(
                    f'{dataset.source}: field "{name}"',
                    functools.reduce(Moments.merge, [part[name] for part in parts]),
                    may_lack=any(coding.marks or coding.says_nan for coding in said),
                ),
                **({"decoding": record} if (record := decoding_record(dataset, name)) else {}),
            }
            for name, said in ((name, dataset.codings(name)) for name in fields)
        },
    }


def measure_shard(task: _Task) -> dict[str, Moments]:
    """Return the moments of every channel of every field of one shard."""
    dataset = one_shard(*task)
    decoded = decodings([dataset])[0]
    return {
        name: functools.reduce(
            Moments.merge,
            (
                Moments.of(part)
                for _, values in decoded_blocks_of(dataset, name, decoded.get(name))
                for part in _parts(_by_channel(values))
            ),
        )
        for name in task.fields
    }


def summary(stats: Mapping[str, Any]) -> str:
    """Return statistics as text, a line a field and a channel; of many channels, the first few."""
    rows: list[tuple[str, ...]] = [("field", *FACTS, "")]
    for name, facts in stats["fields"].items():
        noted = f"{facts['non_finite']} NaN or Inf left out" if facts["non_finite"] else ""
        rows.append((name, *(f"{facts[key]:.6g}" for key in FACTS), noted))
        channels = facts["channels"]
        number = len(channels["mean"])
        rows.extend(
            (f"  channel {i}", *(_number(channels[key][i]) for key in FACTS), "")
            for i in range(number if 1 < number <= TOLD_CHANNELS else 0)
        )
    return "\n".join(table(rows))


def write_stats(stats: Mapping[str, Any], path: Path) -> None:
    """Write statistics so that a reader sees the old ones, or the new ones whole.

    Raises:
        DatasetError: if they cannot be written.
    """
    try:
        replace_file(path, (json.dumps(stats, indent=1) + "\n").encode())
    except OSError as error:
        raise cannot_write(path, error) from error


def read_stats(
    path: Path,
    dataset: Dataset,
    fields: Sequence[str],
    decoding: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the statistics of some fields, by name.

    Args:
        path: of the file.
        dataset: whose statistics they are to be.
        fields: that are wanted.
        decoding: by field, the record of how they are decoded; None: as the dataset says.

    Raises:
        DatasetError: if they are not there, or are those of another dataset, or of its numbers as
            they are stored where values are wanted, or the reverse.
    """
    remake = f"Make them: python -m hpctrain data stats {dataset.source}"
    try:
        content = read_whole(path, LARGE)
        stats = parse_checked(content, _Stats)
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: there are no statistics. {remake}") from error
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DatasetError(f"{path}: these are no statistics: {error}. {remake}") from error
    if stats.semantics > NEWEST.version:
        raise DatasetError(
            f"{path}: a newer hpctrain has measured these, by rules of version {stats.semantics}, "
            f"and this one knows those up to {NEWEST.version}: update hpctrain. {remake}"
        )
    if stats.fingerprint not in _fingerprints(dataset):
        raise DatasetError(f"{path}: these are the statistics of another dataset. {remake}")
    for name in fields:
        if name not in stats.fields:
            raise DatasetError(f"{path}: {name!r} is not in these statistics. {remake}")
        channels = stats.fields[name].channels
        if len(channels.mean) != len(channels.std):
            raise DatasetError(
                f"{path}: {name!r} has {len(channels.mean)} means and {len(channels.std)} "
                f"deviations of channels. {remake}"
            )
    found = parse_json(content)["fields"]
    wanted = {name: found[name] for name in fields}
    for name, facts in wanted.items():
        record = decoding_record(dataset, name) if decoding is None else decoding.get(name, "")
        if facts.get("decoding", "") != record:
            kind = "values decoded in another way" if record else "decoded values"
            if "decoding" not in facts:
                kind = "numbers as they are stored"
            option = "" if record else " --stored"
            raise DatasetError(
                f'{path}: the statistics of "{name}" are those of {kind}, and not of what is '
                f"trained on. {remake}{option}"
            )
    return wanted


def _fingerprints(dataset: Dataset) -> set[str]:
    """Return the fingerprints of a dataset's files in any order: their statistics are the same.

    A run that 0.1.0 has begun takes files in another order than `data stats` does today.
    """
    by_path = {shard.path: shard for shard in dataset.shards}
    orders = [sorted(by_path, key=order_key(order)) for order in get_args(FileOrder)]
    same = [
        dataclasses.replace(dataset, shards=tuple(by_path[path] for path in paths))
        for paths in orders
    ]
    return {each.fingerprint for each in [dataset, *same]}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _by_channel(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return (rows, *shape) as (rows, channels, rest)."""
    has_channels = values.ndim > 1 and values.shape[1] <= MOST_CHANNELS
    return values.reshape(len(values), values.shape[1] if has_channels else 1, -1)


def _parts(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Cut values into runs of rows that stay in the processor's cache as float64."""
    rows = max(1, len(values) * PART_VALUES // max(1, values.size))
    for start in range(0, len(values), rows):
        yield values[start : start + rows]


def _field_facts(place: str, moments: Moments, *, may_lack: bool) -> dict[str, Any]:
    """Return the facts of a field.

    Args:
        place: for messages.
        moments: of its channels.
        may_lack: whether values may be missing; then a channel may have none, and null for facts.
    """
    is_there = moments.count > 0
    if not is_there.all() and not (may_lack and is_there.any()):
        channel = int(np.argmin(moments.count))
        raise DatasetError(f"{place}, channel {channel}: there is no finite value")
    whole = moments.over_channels()
    channels = {
        key: [value if there else None for value, there in zip(values, is_there, strict=True)]
        for key, values in moments.facts().items()
    }
    return {
        **{name: values[0] for name, values in whole.facts().items()},
        "count": int(whole.count[0]),
        "non_finite": int(whole.non_finite[0]),
        "channels": channels,
    }
