"""`stats.json`: mean and deviation of every field of a dataset, which training normalizes by.

`python -m hpctrain data stats` measures them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from annotated_types import Ge, Gt, Lt, MinLen

from hpctrain.config.semantics import FIRST, NEWEST
from hpctrain.data.dataset import Dataset
from hpctrain.data.decoding import decoding_record
from hpctrain.data.files.discovery import FileOrder, order_key
from hpctrain.data.writer import cannot_write
from hpctrain.errors import DatasetError
from hpctrain.utils.files import replace_file
from hpctrain.utils.json_files import LARGE, parse_checked, parse_json, read_whole

STATS_NAME = "stats.json"
STATS_VERSION = 1

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
        raise DatasetError(f"{path}: these are not statistics: {error}. {remake}") from error
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
