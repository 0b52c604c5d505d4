"""Mean, standard deviation, least and largest value of every field and channel.

Sums are float64, each shard's about its own mean, and shards are merged in their order: the result
does not depend on the number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from hpctrain.config.semantics import NEWEST
from hpctrain.convert.parallel import Progress, decoded_blocks_of, for_each, one_shard, silent
from hpctrain.data.dataset import Dataset, Field, Shard
from hpctrain.data.decoding import decoding_record, decodings
from hpctrain.data.stats import STATS_VERSION
from hpctrain.errors import DatasetError
from hpctrain.utils.text import table

MOST_CHANNELS = 4096
"""The first axis of a sample is its channels, up to so many."""
TOLD_CHANNELS = 8
PART_VALUES = 2**16
FACTS = ("mean", "std", "min", "max")
Float64s = npt.NDArray[np.float64]


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
    parts = for_each(measure_shard, tasks, jobs, progress, _crashed)
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


def _crashed(task: _Task, error: BrokenProcessPool) -> NoReturn:
    raise DatasetError(
        f"{task.shard.path}: HDF5 crashed while it read this file: it is damaged"
    ) from error


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


@dataclass(frozen=True, slots=True)
class Moments:
    """What is known of the values of each channel so far.

    Attributes:
        count: (channels,) finite values.
        mean: (channels,) of them.
        rest: (channels,) what rounding took from the mean; merging would else lose digits of small
            deviations from a large mean.
        squares: (channels,) sum of their squared differences from the mean.
        least: (channels,) of them; inf where there are none.
        largest: (channels,) of them; -inf where there are none.
        non_finite: (channels,) values that are NaN or Inf, and in none of the others.
    """

    count: Float64s
    mean: Float64s
    rest: Float64s
    squares: Float64s
    least: Float64s
    largest: Float64s
    non_finite: Float64s

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Moments:
        """Return the moments of values, (rows, channels, rest)."""
        numbers = values.astype(np.float64)
        finite = np.isfinite(values)
        if not finite.all():
            return cls._of_finite(numbers, finite)
        count = np.full(values.shape[1], values.shape[0] * values.shape[2], np.float64)
        mean = numbers.mean(axis=(0, 2))
        numbers -= mean[:, None]
        rest = numbers.mean(axis=(0, 2))
        return cls(
            count=count,
            mean=mean,
            rest=rest,
            squares=np.einsum("rcv,rcv->c", numbers, numbers) - count * rest**2,
            least=values.min(axis=(0, 2)).astype(np.float64),
            largest=values.max(axis=(0, 2)).astype(np.float64),
            non_finite=np.zeros_like(count),
        )

    @classmethod
    def _of_finite(cls, values: Float64s, finite: npt.NDArray[np.bool_]) -> Moments:
        """Return the moments of those values that are finite; several times slower."""
        count = finite.sum(axis=(0, 2), dtype=np.float64)
        mean = values.sum(axis=(0, 2), where=finite) / np.maximum(count, 1)
        differences = np.subtract(values, mean[:, None], where=finite, out=np.zeros_like(values))
        rest = differences.sum(axis=(0, 2)) / np.maximum(count, 1)
        return cls(
            count=count,
            mean=mean,
            rest=rest,
            squares=np.square(differences).sum(axis=(0, 2)) - count * rest**2,
            least=values.min(axis=(0, 2), where=finite, initial=np.inf),
            largest=values.max(axis=(0, 2), where=finite, initial=-np.inf),
            non_finite=values.shape[0] * values.shape[2] - count,
        )

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both together.

        Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing
        sample variances" (1979).
        """
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        difference = (other.mean - self.mean) + (other.rest - self.rest)
        step = self.rest + difference * share
        mean = self.mean + step
        return Moments(
            count=count,
            mean=mean,
            rest=step - (mean - self.mean),
            squares=self.squares + other.squares + difference**2 * self.count * share,
            least=np.minimum(self.least, other.least),
            largest=np.maximum(self.largest, other.largest),
            non_finite=self.non_finite + other.non_finite,
        )

    def over_channels(self) -> Moments:
        """Return the moments of all channels together, as of one."""
        parts = [
            Moments(*(values[i : i + 1] for values in self._values()))
            for i in range(len(self.count))
        ]
        return functools.reduce(Moments.merge, parts)

    def facts(self) -> dict[str, list[float]]:
        """Return what people ask for, by name, a number a channel."""
        std = np.sqrt(np.maximum(self.squares, 0) / np.maximum(self.count, 1))
        values = (self.mean, std, self.least, self.largest)
        return {name: each_.tolist() for name, each_ in zip(FACTS, values, strict=True)}

    def _values(self) -> tuple[Float64s, ...]:
        return (
            self.count,
            self.mean,
            self.rest,
            self.squares,
            self.least,
            self.largest,
            self.non_finite,
        )
