"""Samples drawn by weight: in proportion, and the same wherever and by whomever they are drawn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers.loaders import train_loader

from hpctrain.config.schema_data import DataSection, FieldTable, SamplesTable
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.loading.batch_transform import BatchTransform
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.opening.weights import Weights, read_weights
from hpctrain.data.order.epochs import plan_epoch
from hpctrain.data.order.order import Order
from hpctrain.data.order.state import from_state, to_state
from hpctrain.errors import ConfigError, DatasetError

ROWS = 60
WEIGHTS = np.where(np.arange(ROWS) % 3 == 0, 0.0, np.arange(ROWS) % 5 + 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, one of them compressed in chunks, with a weight for each row."""
    folder = tmp_path_factory.mktemp("weights")
    for name, rows, options in [
        ("a.h5", slice(0, 25), {}),
        ("b.h5", slice(25, ROWS), {"chunks": (7, 4), "compression": "gzip"}),
    ]:
        with h5py.File(folder / name, "w") as file:
            ids = np.arange(ROWS, dtype=np.int32)[rows]
            file.create_dataset("x", data=np.repeat(ids[:, None], 4, axis=1), **options)
            file["id"] = ids
            file["meta/weight"] = WEIGHTS[rows].astype(np.float32)
    np.save(folder / "weights.npy", WEIGHTS.astype(np.float32))
    return folder


def order_of(weights: Weights, **changes: object) -> Order:
    order = Order(
        samples=ROWS,
        seed=3,
        lanes=64,
        window=4,
        block_rows=1,
        sampling="weighted",
        weights=weights.fingerprint,
    )
    return dataclasses.replace(order, **changes)


def test_draws_never_change() -> None:
    """A run resumed with a later version must draw what it would have drawn."""
    weights = Weights.of(WEIGHTS, "w")
    whole = [34, 49, 8, 53, 19, 49, 49, 44, 28, 1, 58, 4]
    assert weights.rows(3, 1, np.arange(12)).tolist() == whole
    assert weights.rows(3, 2, np.arange(4)).tolist() == [49, 44, 43, 8]
    assert weights.rows(3, 1, np.array([11, 4])).tolist() == [4, 19]


def test_samples_are_drawn_in_proportion() -> None:
    counts = np.bincount(Weights.of(WEIGHTS, "w").rows(1, 0, np.arange(10**6)), minlength=ROWS)
    expected = WEIGHTS / WEIGHTS.sum() * 10**6
    assert (counts[WEIGHTS == 0] == 0).all()
    has_any = WEIGHTS > 0
    chi_square = ((counts - expected)[has_any] ** 2 / expected[has_any]).sum()
    degrees = has_any.sum() - 1
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0], "the weight of sample 1 is -1.0"),
        ([1.0, 2.0, float("nan")], "the weight of sample 2 is nan"),
        ([0.0, 0.0], "the sum of all weights is 0.0"),
        ([1e308, 1e308], "the sum of all weights is inf"),
        ([[1.0]], r"the shape \(1, 1\)"),
        ([], r"the shape \(0,\)"),
    ],
)
def test_weights_that_are_none(weights: list[float], message: str) -> None:
    with np.errstate(over="ignore"), pytest.raises(DatasetError, match=f"^w: .*{message}"):
        Weights.of(weights, "w")


def test_the_last_sample_with_a_weight_is_the_last_to_be_drawn() -> None:
    weights = Weights.of([0, 1e-300, 0], "w")
    assert set(weights.rows(0, 0, np.arange(1000)).tolist()) == {1}


@pytest.mark.parametrize(
    "given", ["meta/weight", "/meta/weight", "{0}/*.h5:meta/weight", "{0}/weights.npy"]
)
def test_where_weights_may_be(folder: Path, given: str) -> None:
    files = str(folder / "*.h5")
    dataset = open_dataset(files, ["x"])
    weights = read_weights(given.format(folder), dataset, files, "natural")
    assert weights.fingerprint == Weights.of(WEIGHTS.astype(np.float32), "w").fingerprint


def test_weights_of_rows_become_those_of_samples(folder: Path) -> None:
    """Where samples are windows, a sample has the weight of its own row."""
    section = DataSection(
        train=str(folder / "*.h5"),
        global_batch_size=4,
        fields={"x": FieldTable(steps=3)},
        samples=SamplesTable(train=(5, 50), stride=2),
    )
    train, _ = open_datasets(section, ["x"])
    weights = read_weights("meta/weight", train, section.train, "natural")
    rows = [*range(5, 23, 2), *range(25, 48, 2)]
    assert train.samples == len(rows)
    assert weights.fingerprint == Weights.of(WEIGHTS[rows].astype(np.float32), "w").fingerprint


def test_weights_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    files = str(folder / "*.h5")
    dataset = open_dataset(files, ["x"])
    np.save(tmp_path / "short.npy", np.ones(59))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    (tmp_path / "no.npy").write_bytes(b"\x93NUMPY")
    for given, message in [
        (str(tmp_path / "short.npy"), r"has 59 numbers, but .* has 60 samples"),
        (str(tmp_path / "text.npy"), r"is an array of <U1 of the shape \(1,\)"),
        (str(tmp_path / "no.npy"), "cannot be read"),
        ("x", r'"x" is int32 with rows of shape \(4,\), and has to be one number a row'),
        ("wieght", "wieght"),
    ]:
        with pytest.raises(DatasetError, match=message):
            read_weights(given, dataset, files, "natural")


def keyed(
    *, fields: dict[str, torch.Tensor], keys: torch.Tensor, training: bool
) -> dict[str, torch.Tensor]:
    return {**fields, "key": keys.clone()}


@pytest.mark.parametrize("draws", [None, 200, 7])
def test_the_same_batches_at_any_world_size_and_after_any_restart(
    folder: Path, draws: int | None
) -> None:
    dataset = open_dataset(str(folder / "*.h5"), ["x", "id"])
    weights = Weights.of(WEIGHTS, "w")
    order = order_of(weights, draws=draws)
    length = draws or ROWS

    def served(world_size: int, start: int = 0) -> list[tuple[int, int]]:
        found: dict[int, list[tuple[int, int]]] = {}
        for rank in range(world_size):
            loader = train_loader(
                dataset,
                order,
                fields=["x", "id"],
                global_batch_size=7,
                rank=rank,
                world_size=world_size,
                draw=weights,
                batch_transform=BatchTransform({}, keyed, ("x", "id")),
            )
            assert loader.epoch_size == length
            for batch in loader.epoch(2, start):
                x, ids, keys = (batch.fields[name] for name in ("x", "id", "key"))
                assert (x == ids[:, None]).all()
                found.setdefault(batch.start, []).extend(
                    zip(ids.tolist(), keys.tolist(), strict=True)
                )
            loader.close()
        return [each for start in sorted(found) for each in found[start]]

    whole = served(1)
    assert [row for row, _ in whole] == plan_epoch(order, 2, weights).rows(
        np.arange(length)
    ).tolist()
    # Rows come again, and are then augmented otherwise.
    assert len({key for _, key in whole}) == length
    assert served(3) == whole
    if length > 14:
        assert len({row for row, _ in whole}) < length
        assert served(2, 14) == whole[14:]


def test_an_epoch_ends_by_the_weights_that_it_began_with(folder: Path) -> None:
    dataset = open_dataset(str(folder / "*.h5"), ["x"])
    weights, other = Weights.of(WEIGHTS, "w"), Weights.of(WEIGHTS + 1, "w")
    order = order_of(weights, draws=500)
    saved = json.loads(json.dumps(to_state(order, 1, 300, dataset.fingerprint)))
    assert from_state(saved, dataset, order, 500) == (order, 1, 300)
    longer = dataclasses.replace(order, draws=900)
    assert from_state(saved, dataset, longer, 900) == (longer, 1, 300)
    shuffled = dataclasses.replace(order, sampling="shuffled", weights=None, draws=None)
    plain = to_state(shuffled, 1, 30, dataset.fingerprint)
    for state, now, message in [
        (saved, order_of(other), "by other weights than those of now"),
        (saved, shuffled, "by weights of samples, which are not set now"),
        (plain, order, "without weights of samples, which are set now"),
    ]:
        with pytest.raises(ConfigError, match=f"epoch 1 of the run.*{message}"):
            from_state(state, dataset, now, 500)
        assert from_state(state, dataset, now, 500, allow_change=True) == (now, 1, 0)
        # Between epochs it may change.
        assert from_state(state | {"position": 0}, dataset, now, 500) == (now, 1, 0)
