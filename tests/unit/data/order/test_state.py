"""Resuming in the data."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from hpctrain.data.dataset import Dataset, Field, Layout, Shard
from hpctrain.data.order.order import Order
from hpctrain.data.order.state import from_state, to_state
from hpctrain.errors import DatasetError

DATASET = Dataset(
    source="data",
    fields={"x": Field((), np.dtype("f4"))},
    shards=(Shard("data/a.h5", 100, 1000, None, {"x": Layout(0)}),),
)
BEGUN = Order(samples=100, seed=1, lanes=8, window=2, block_rows=3)
WANTED = Order(samples=100, seed=2, lanes=16, window=4, block_rows=1)


def state(**changes: object) -> dict[str, object]:
    saved = to_state(BEGUN, 5, 60, DATASET.fingerprint) | changes
    text = json.dumps(saved)
    assert len(text) < 1024
    return json.loads(text)


@pytest.mark.parametrize(
    ("changes", "epoch_size", "expected"),
    [
        ({}, 100, (BEGUN, 5, 60)),
        ({"position": 0}, 100, (WANTED, 5, 0)),  # nothing of the epoch is served: the new order
        ({"position": 100}, 100, (WANTED, 6, 0)),
        ({"position": 97}, 96, (WANTED, 6, 0)),  # drop_last is new, and this is what it drops
    ],
)
def test_where_to_go_on(
    changes: dict[str, object], epoch_size: int, expected: tuple[Order, int, int]
) -> None:
    assert from_state(state(**changes), DATASET, WANTED, epoch_size) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "0" * 16}, r"another dataset than data \(fingerprint 0{16}, now "),
        ({"version": 4}, r"newer hpctrain \(version 4; .*update hpctrain"),
        ({"sampling": "sorted"}, r"damaged: sampling = 'sorted'"),
        ({"version": None}, r"damaged: version = None"),
        ({"version": 0}, r"damaged: version = 0"),
        ({"position": -1}, r"damaged: position = -1"),
        ({"position": 101}, r"damaged: position = 101"),
        ({"lanes": 0}, r"damaged: lanes = 0"),
        ({"window": True}, r"damaged: window = True"),
        ({"block_rows": "3"}, r"damaged: block_rows = '3'"),
        ({"seed": 1.5}, r"damaged: seed = 1\.5"),
    ],
)
def test_state_that_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        from_state(state(**changes), DATASET, WANTED, 100)


def test_an_epoch_ends_in_the_order_that_it_began_in_shuffled_or_not() -> None:
    in_order = dataclasses.replace(WANTED, sampling="sequential")
    saved = json.loads(json.dumps(to_state(in_order, 5, 60, DATASET.fingerprint)))
    assert saved["version"] == 2  # an older release would go on shuffled
    assert from_state(saved, DATASET, WANTED, 100) == (in_order, 5, 60)
    assert from_state(state(), DATASET, in_order, 100) == (BEGUN, 5, 60)
    assert state()["version"] == 1  # what older releases read is still written for them
    assert from_state(saved | {"position": 0}, DATASET, WANTED, 100) == (WANTED, 5, 0)
