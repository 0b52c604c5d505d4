"""Predictions on disk: shards in the order of the dataset, which a later job can go on with.

A shard holds the predictions of rows that its number alone decides, whichever rank makes them. It
is there whole or not at all, so what is missing after a job was killed are whole shards, and any
number of ranks can make those. At the end the folder is a dataset with an index like any other.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Lt

from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Dataset, Field, Shard, require_supported
from hpctrain.data.files.index import INDEX_NAME, UNFINISHED_NAME, is_shard_name, write_index
from hpctrain.data.files.storage import Storage
from hpctrain.data.writer import (
    Attributes,
    cannot_write,
    inspect_shard,
    rows_of_shard,
    shard_name,
    write_shard,
)
from hpctrain.errors import DatasetError
from hpctrain.topology import Communicator, on_all_ranks, on_rank_zero
from hpctrain.utils.files import replace_file
from hpctrain.utils.json_files import SMALL, parse_checked, read_whole

PLAN_NAME = "predictions.json"
SHARD_BYTES = 64 * 2**20
"""Values in one shard, at most about: what a killed job has to make again."""
_SHARDS_A_RANK = 4
"""At least, of large datasets: so that ranks are done together."""

Count = Annotated[int, Ge(1), Lt(2**63)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What predictions are made of: those of another origin do not belong to them.

    Attributes:
        checkpoint: the folder or file that the weights are from.
        step: at which it was saved; None: the file does not say.
        weights: which of them: training, average or evaluation.
        dataset: where the samples are.
        fingerprint: of the dataset.
    """

    checkpoint: str
    step: int | None
    weights: str
    dataset: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the predictions are cut into shards, as `predictions.json` keeps it."""

    samples: Count
    shard_rows: Count
    fields: dict[str, tuple[list[int], str]]
    origin: Origin

    @property
    def num_shards(self) -> int:
        return -(-self.samples // self.shard_rows)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    def rows(self, number: int) -> tuple[int, int]:
        """Return the first row of a shard, and one past its last."""
        first = number * self.shard_rows
        return first, min(first + self.shard_rows, self.samples)


class PredictionWriter:
    """Writes the predictions of one rank: give it rows in the order of `rows`, then `finish`.

    Attributes:
        plan: the same on all ranks, and after a restart.
        rows: (samples of this rank,) int64: rows of the dataset whose predictions are missing yet.
    """

    def __init__(
        self,
        folder: Path,
        origin: Origin,
        fields: Mapping[str, Field],
        samples: int,
        communicator: Communicator,
        attributes: Attributes | None = None,
    ) -> None:
        """Begin in a new folder, or go on in one. Collective: all ranks.

        Args:
            folder: of the shards.
            origin: of the predictions.
            fields: of the predictions of one sample.
            samples: of the dataset.
            communicator: of all ranks.
            attributes: by field, HDF5 attributes.

        Raises:
            DatasetError: on every rank, if the folder holds something else, or cannot be written.
        """
        self._folder = folder
        self._communicator = communicator
        self._attributes = attributes or {}
        rank, world_size = communicator.rank, communicator.world_size
        said, missing = on_rank_zero(
            communicator, lambda: _begin(folder, origin, fields, samples, world_size)
        )
        self.plan = parse_checked(said, Plan)
        # Runs of neighbours: they are read in one go.
        first, stop = (each * len(missing) // world_size for each in (rank, rank + 1))
        self._due = list(missing[first:stop])
        runs = [np.arange(*self.plan.rows(number), dtype=np.int64) for number in self._due]
        self.rows: Int64s = np.concatenate([*runs, np.empty(0, np.int64)])
        self._fields = fields
        self._buffers: dict[str, npt.NDArray[Any]] = {}
        self._filled = 0
        self._written: dict[int, Shard] = {}

    def add(self, predictions: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take the predictions of the next of `rows`.

        Args:
            predictions: by field, (samples, *shape).

        Raises:
            DatasetError: if a shard cannot be written, or they are not what the first ones were.
        """
        self._require_fit(predictions)
        count, done = len(next(iter(predictions.values()))), 0
        while done < count:
            first, stop = self.plan.rows(self._due[0])
            if not self._buffers:
                self._buffers = {
                    name: np.empty((stop - first, *field.shape), field.dtype)
                    for name, field in self._fields.items()
                }
            step = min(count - done, stop - first - self._filled)
            for name, values in predictions.items():
                self._buffers[name][self._filled : self._filled + step] = values[done : done + step]
            self._filled += step
            done += step
            if self._filled == stop - first:
                self._write(self._due.pop(0))

    def finish(self) -> int:
        """Make a dataset of the shards once all of them are there. Collective: all ranks.

        Returns:
            How many shards are missing still, of ranks that have stopped early; 0: it is done.

        Raises:
            DatasetError: on every rank, if the index cannot be written.
        """
        missing: int = sum(self._communicator.all_gather(len(self._due)))
        if missing:
            return missing
        plan, communicator = self.plan, self._communicator
        written = set(itertools.chain(*communicator.all_gather(list(self._written))))
        earlier = [number for number in range(plan.num_shards) if number not in written]
        earlier = earlier[communicator.rank :: communicator.world_size]

        def inspected() -> dict[int, Shard]:
            return {
                number: inspect_shard(self._folder / shard_name(number), list(self._fields))
                for number in earlier
            } | self._written

        shards = dict(
            item for found in on_all_ranks(communicator, inspected) for item in found.items()
        )

        def write() -> None:
            ordered = tuple(shards[number] for number in range(plan.num_shards))
            dataset = Dataset(str(self._folder), dict(self._fields), ordered)
            try:
                write_index(dataset, self._folder, asdict(plan.origin))
                (self._folder / UNFINISHED_NAME).unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(self._folder, error) from error

        on_rank_zero(communicator, write)
        return 0

    def _require_fit(self, predictions: Mapping[str, npt.NDArray[Any]]) -> None:
        found = {name: Field(each.shape[1:], each.dtype) for name, each in predictions.items()}
        if found != dict(self._fields):
            raise DatasetError(
                f"{self._folder}: the model predicts {found} for some samples, and "
                f"{dict(self._fields)} for the first: they have to have the same shapes and dtypes"
            )

    def _write(self, number: int) -> None:
        path = self._folder / shard_name(number)
        self._written[number] = write_shard(path, self._buffers, self._attributes, Storage())
        self._buffers, self._filled = {}, 0


def _begin(
    folder: Path, origin: Origin, fields: Mapping[str, Field], samples: int, world_size: int
) -> tuple[bytes, list[int]]:
    """Make the folder, or find out what is there; return the plan as JSON, and what is missing."""
    for name, field in fields.items():
        require_supported(name, field, str(folder))
    about = {name: (list(field.shape), field.dtype.str) for name, field in fields.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plan = _read_plan(folder)
        if plan is None:
            rows = min(
                rows_of_shard(fields, SHARD_BYTES, Storage()),
                max(1, -(-samples // (_SHARDS_A_RANK * world_size))),
            )
            plan = Plan(samples=samples, shard_rows=rows, fields=about, origin=origin)
            _require_empty(folder)
            (folder / UNFINISHED_NAME).touch()
            replace_file(folder / PLAN_NAME, plan.to_json())
            return plan.to_json(), list(range(plan.num_shards))
        there = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise cannot_write(folder, error) from error
    if (plan.origin, plan.samples, plan.fields) != (origin, samples, about):
        raise DatasetError(
            f"{folder}: there are predictions of {plan.origin.checkpoint} for "
            f"{plan.origin.dataset} in this folder, and others are asked for now: choose another "
            "--output, or remove it"
        )
    missing = [number for number in range(plan.num_shards) if shard_name(number) not in there]
    return plan.to_json(), missing


def _require_empty(folder: Path) -> None:
    taken = [
        name
        for entry in folder.iterdir()
        if is_shard_name(name := entry.name) or name == INDEX_NAME
    ]
    if taken:
        raise DatasetError(
            f"{folder}: there is a dataset in this folder ({sorted(taken)[0]}), and no "
            f"{PLAN_NAME} beside it: choose another --output"
        )


def _read_plan(folder: Path) -> Plan | None:
    path = folder / PLAN_NAME
    try:
        return parse_checked(read_whole(path, SMALL), Plan)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DatasetError(
            f"{path} is damaged: {error}. Remove the folder to begin anew"
        ) from error
