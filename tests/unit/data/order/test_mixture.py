"""Mixtures of sources: the order by arithmetic, and what a loader delivers of files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash
from helpers.loaders import train_loader

from hpctrain.config.schema_data import DataSection, SamplesTable, SourceTable
from hpctrain.data.dataset import Dataset, Field, Layout, Shard, SourceFacts
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.order.batches import Batching, Begun, Epochs, RankShare
from hpctrain.data.order.epochs import MixedEpoch
from hpctrain.data.order.mixture import Terms, apportioned, spread_step
from hpctrain.data.order.order import Order
from hpctrain.data.order.state import block_rows_of, from_state, to_state
from hpctrain.errors import ConfigError, DatasetError

SIZES = {"a": 5003, "b": 20011, "tiny": 7}
FIRSTS = dict(zip(SIZES, [0, 5003, 25014], strict=True))
WEIGHTS = (0.7, 0.25, 0.05)
REPEAT = (True, True, True)
BATCH = 100


def facts(row_bytes: int = 1000) -> list[SourceFacts]:
    return [
        SourceFacts(
            name=name,
            samples=samples,
            fingerprint=name * 4,
            bytes_per_sample=row_bytes,
            chunk_rows=1,
        )
        for name, samples in SIZES.items()
    ]


DATASET = Dataset(
    source="mixed",
    fields={"x": Field((), np.dtype("f4"))},
    shards=(Shard("a.h5", sum(SIZES.values()), 1000, None, {"x": Layout(0)}),),
)


def mixed(
    weights: tuple[float, ...] = WEIGHTS,
    repeats: tuple[bool, ...] = REPEAT,
    *,
    length: int = 9001,
    row_bytes: int = 1000,
    **rest: Any,
) -> Order:
    return Order.for_mixture(
        facts(row_bytes),
        Terms(weights=weights, repeats=repeats),
        seed=3,
        global_batch_size=BATCH,
        length=length,
        **rest,
    )


class Job:
    """Serves batches of a mixture by arithmetic alone, from where a state says."""

    def __init__(self, order: Order, state: dict[str, Any] | None = None, size: int = BATCH):
        self.order, self.size, self.epoch, self.position = order, size, 0, 0
        self.begun: dict[int, Order] = {}
        if state is not None:
            running, self.epoch, self.position = from_state(state, DATASET, order, order.length)
            self.begun = {self.epoch: running}
        self.epochs = self._epochs(0, 1)

    def _epochs(self, rank: int, world_size: int) -> Epochs:
        return Epochs(
            self.order,
            "mixed",
            Batching(global_batch_size=self.size),
            RankShare(rank, world_size),
            begun=Begun(orders=self.begun),
        )

    def batches(self, count: int, world_size: int = 1) -> list[np.ndarray]:
        """Return the rows of the next global batches, in the order of ranks."""
        ranks = [self._epochs(rank, world_size) for rank in range(world_size)]
        found = []
        for _ in range(count):
            stop = min(self.position + self.size, self.order.length)
            shares = [
                each.plan(self.epoch).rows(each.positions(self.epoch, self.position, stop))
                for each in ranks
            ]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1 + self.size // 64
            found.append(np.concatenate(shares))
            self.position = stop
            if stop == self.order.length:
                self.epoch, self.position = self.epoch + 1, 0
        return found

    def state(self) -> dict[str, Any]:
        order = self.epochs.order_of(self.epoch)
        saved = to_state(order, self.epoch, self.position, DATASET.fingerprint)
        loaded: dict[str, Any] = json.loads(json.dumps(saved))
        return loaded


def digest(batch: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(np.sort(batch).tobytes())


def streams(batches: list[np.ndarray]) -> dict[str, np.ndarray]:
    rows = np.concatenate(batches)
    return {
        name: rows[(rows >= first) & (rows < first + SIZES[name])] - first
        for name, first in FIRSTS.items()
    }


def require_once_in_every_epoch(batches: list[np.ndarray]) -> None:
    """Check that a source serves each of its samples once before any comes again."""
    for name, stream in streams(batches).items():
        for start in range(0, len(stream), SIZES[name]):
            epoch = stream[start : start + SIZES[name]]
            assert len(np.unique(epoch)) == len(epoch), (name, start)


ROUNDS = pytest.mark.parametrize("row_bytes", [1000, 10**8], ids=["blocks", "single rows"])


@ROUNDS
def test_batches_do_not_depend_on_ranks_or_restarts(row_bytes: int) -> None:
    order = mixed(row_bytes=row_bytes)
    assert (order.block_rows > 1) == (row_bytes == 1000)
    expected = [digest(each) for each in Job(order).batches(150)]
    draw = random.Random(1)
    job, found, restarts = Job(order), [], 0
    while len(found) < 150:
        found += [digest(b) for b in job.batches(draw.randint(1, 7), 1 + restarts % 8)]
        job, restarts = Job(order, job.state()), restarts + 1
    assert restarts > 30
    assert found[:150] == expected


@ROUNDS
@pytest.mark.parametrize("size", [BATCH, 640])
def test_each_source_is_served_once_an_epoch_of_its_own(row_bytes: int, size: int) -> None:
    job = Job(mixed(row_bytes=row_bytes, length=30_011), size=size)
    batches = job.batches(45_000 // size)
    require_once_in_every_epoch(batches)
    served = streams(batches)
    consumed = MixedEpoch(job.epochs.order_of(job.epoch), job.epoch).pattern.consumed(job.position)
    assert consumed == tuple(len(stream) for stream in served.values())


@pytest.mark.parametrize("weights", [WEIGHTS, (1 / 3, 1 / 3, 1 / 3), (0.5, 0.5, 0.0), (8, 1, 991)])
@pytest.mark.parametrize("size", [1, 8, BATCH])
def test_proportions_hold_over_any_thousand_batches(weights: tuple[float, ...], size: int) -> None:
    job = Job(mixed(weights, length=2003))
    rows = np.concatenate(job.batches(1300 * size // BATCH + 1))[: 1300 * size]
    for index, (name, first) in enumerate(FIRSTS.items()):
        is_of = (rows >= first) & (rows < first + SIZES[name])
        counts = np.cumsum(np.append(0, is_of))
        window = 1000 * size
        parts = (counts[window:] - counts[:-window]) / window
        assert np.abs(parts - weights[index] / sum(weights)).max() < 0.01


def test_every_rank_has_its_part_of_each_source_in_a_row_of_lanes() -> None:
    order = mixed((0.5, 0.25, 0.25), lanes=64)
    for world_size in (2, 4, 8, 16):
        for rank in range(world_size):
            positions = order.positions(0, 64 * 50, rank, world_size)
            sources, _ = MixedEpoch(order, 0).places(positions)
            rows = sources.reshape(50, -1)
            # One sample by which the row is rounded, and one by which the rank is.
            assert np.abs((rows == 0).sum(axis=1) - 32 / world_size).max() <= 2


def test_without_weights_an_epoch_is_all_samples_once() -> None:
    total = sum(SIZES.values())
    weights = tuple(float(size) for size in SIZES.values())
    job = Job(mixed(weights, length=total))
    for _ in range(3):
        epoch = np.concatenate(job.batches(-(-total // BATCH)))
        assert (np.sort(epoch) == np.arange(total)).all()


@ROUNDS
def test_a_source_that_is_dropped_is_served_once_and_its_part_goes_to_the_others(
    row_bytes: int,
) -> None:
    order = mixed((0.6, 0.3, 0.1), (False, True, False), length=20_000, row_bytes=row_bytes)
    job = Job(order)
    served = streams(job.batches(400))
    assert (np.sort(served["a"]) == np.arange(SIZES["a"])).all()
    assert (np.sort(served["tiny"]) == np.arange(7)).all()
    assert len(served["b"]) == 40_000 - 5003 - 7


@ROUNDS
def test_weights_that_change_at_restarts_leave_no_sample_out(row_bytes: int) -> None:
    for trial in range(3):
        draw = random.Random(trial)
        weights, repeats = WEIGHTS, REPEAT
        state, batches = None, []
        for _ in range(6):
            order = mixed(weights, repeats, row_bytes=row_bytes)
            job = Job(order, state)
            batches += job.batches(draw.randint(1, 60))
            state = job.state()
            weights = (draw.choice([0, 0.1, 0.6]), draw.choice([0, 0.3]), 0.2)
            repeats = (draw.random() < 0.5, draw.random() < 0.5, True)
        require_once_in_every_epoch(batches)


def test_new_weights_hold_from_the_next_round_on() -> None:
    job = Job(mixed(lanes=64))
    job.batches(3)
    changed = Job(mixed((0.1, 0.8, 0.1), lanes=64), job.state())
    mixture = changed.epochs.order_of(0).mixture
    assert mixture is not None
    first = mixture.start.position + mixture.round_rows * 64
    assert first <= 300 + mixture.round_rows * 64
    changed.batches(-(-(first - 300) // BATCH))
    served = streams(changed.batches(30))
    assert abs(len(served["a"]) / 3000 - 0.1) < 0.01


def test_what_a_run_keeps_and_refuses() -> None:
    job = Job(mixed())
    job.batches(20)
    state = job.state()
    assert block_rows_of(state, facts()) == {"a": 2, "b": 9, "tiny": 1}
    assert len(json.dumps(state)) < 2048
    with pytest.raises(ConfigError, match=r"begun with 9,001 samples.*end after 800.*allow"):
        from_state(state, DATASET, mixed(length=800), 800)
    with pytest.raises(ConfigError, match=r"data\.shuffle: .*begun shuffled.*sequential"):
        Job(mixed(sampling="sequential"), state)
    state["mixture"]["sources"]["a"]["fingerprint"] = "other"
    with pytest.raises(DatasetError, match=r"another dataset .*\(data\.sources: a\)"):
        Job(mixed(), state)
    order, epoch, position = from_state(state, DATASET, mixed(), 9001, allow_change=True)
    assert (epoch, position) == (0, 0)
    assert order.mixture is not None
    assert order.mixture.start.consumed == (0, 499, 100)


@pytest.mark.parametrize("change", [{"consumed_at_round": -1}, {"weight": "1"}, {"block_rows": 0}])
def test_damaged_counters_are_refused(change: dict[str, object]) -> None:
    job = Job(mixed())
    job.batches(2)
    state = job.state()
    state["mixture"]["sources"]["a"] |= change
    with pytest.raises(DatasetError, match="damaged"):
        Job(mixed(begun=block_rows_of(state, facts())), state)


def test_numbers_of_a_row_add_up_and_never_fall() -> None:
    totals = np.arange(5000)
    for weights in ([1.0], [0.3, 0.7], [0.0, 0.2, 0.0, 0.8, 0.0], list(range(1, 40))):
        parts = apportioned(totals, np.array(weights, float))
        assert (parts.sum(axis=1) == totals).all()
        steps = np.diff(parts, axis=0)
        assert steps.min() >= 0
        exact = np.outer(totals, np.array(weights) / sum(weights))
        assert np.abs(parts - exact).max() <= 1 + np.log(len(weights))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 100, 4096])
def test_the_slots_of_a_row_are_all_taken(length: int) -> None:
    assert len({index * spread_step(length) % length for index in range(length)}) == length


def write(path: Path, first: int, count: int, dtype: str = "f4", name: str = "x") -> SourceTable:
    with h5py.File(path, "w") as file:
        file[name] = np.arange(first, first + count, dtype=dtype)[:, None]
    return SourceTable(name=path.stem, train=str(path), weight=1.0)


@pytest.mark.parametrize("samples", [None, (100, 500)], ids=["rows", "views"])
@pytest.mark.parametrize("buffer_mb", [64.0, 1e-4], ids=["blocks", "row by row"])
def test_a_loader_delivers_what_the_order_says(
    tmp_path: Path, samples: tuple[int, int] | None, buffer_mb: float
) -> None:
    tables = [
        write(tmp_path / "two.h5", 10_000, 3000),
        write(tmp_path / "one.h5", 0, 1000),
    ]
    if samples is not None:
        tables[1] = SourceTable(name="one", train=tables[1].train, weight=1.0, samples=samples)
    section = DataSection(sources=tuple(tables), global_batch_size=8)
    train, validation = open_datasets(section, ["x"])
    assert validation is None
    assert [each.name for each in train.sources] == ["one", "two"]
    kept = np.arange(*samples) if samples else np.arange(1000)
    values = np.concatenate([kept, np.arange(10_000, 13_000)])
    assert train.samples == len(values)
    order = Order.for_mixture(
        train.sources,
        Terms(weights=(0.25, 0.75), repeats=(True, True)),
        seed=1,
        global_batch_size=24,
        length=3500,
        lanes=8,
    )
    assert order.block_rows > 1
    for start in (0, 24 * 31):
        loaders = [
            train_loader(
                train,
                order,
                fields=["x"],
                global_batch_size=24,
                rank=rank,
                world_size=3,
                buffer_mb=buffer_mb,
            )
            for rank in range(3)
        ]
        expected = MixedEpoch(order, 1 if start else 0)
        found: dict[int, list[np.ndarray]] = {}
        for rank, loader in enumerate(loaders):
            epoch = 1 if start else 0
            plan = MixedEpoch(loader.order_of(epoch), epoch)
            for batch in loader.epoch(epoch, start):
                stop = batch.start + batch.global_size
                at = order.positions(batch.start, stop, rank, 3)
                assert batch.fields["x"][:, 0].tolist() == values[plan.rows(at)].tolist()
                found.setdefault(batch.start, []).append(batch.fields["x"].numpy())
            loader.close()
        assert min(found) == start
        assert sum(len(share) for shares in found.values() for share in shares) == 3500 - start
        del expected


def test_sources_of_other_fields_are_refused_by_name(tmp_path: Path) -> None:
    one = write(tmp_path / "one.h5", 0, 10)
    for other, message in (
        (write(tmp_path / "wide.h5", 0, 10, "f8"), r'"x" is float32 .*"one" .*float64 .*"wide"'),
        (write(tmp_path / "else.h5", 0, 10, name="y"), r'else\.h5: there is no field "x"'),
    ):
        section = DataSection(sources=(one, other), global_batch_size=2)
        with pytest.raises(DatasetError, match=message):
            open_datasets(section, ["x"])


def test_a_part_of_every_source_serves_for_evaluation(tmp_path: Path) -> None:
    tables = (write(tmp_path / "one.h5", 0, 1000), write(tmp_path / "two.h5", 10_000, 3000))
    samples = SamplesTable(validation_fraction=0.1)
    section = DataSection(sources=tables, global_batch_size=2, samples=samples)
    train, validation = open_datasets(section, ["x"])
    assert validation is not None
    assert [each.samples for each in train.sources] == [900, 2700]
    assert [each.samples for each in validation.sources] == [100, 300]
