"""Thinned curves: extremes, gaps and ends stay, sums of phases too."""

from __future__ import annotations

import math
import random

import pytest
from helpers.made_runs import record

from hpctrain.watch.report import curves, thinned


@pytest.mark.parametrize("count", [1, 4, 50, 100, 101, 100_000])
def test_extremes_and_ends_stay(count: int) -> None:
    draw = random.Random(count)
    values: list[float | None] = [draw.gauss(0, 1) for _ in range(count)]
    values[count // 3] = 1e6
    values[count // 2] = -1e6
    values[count * 3 // 4] = None
    kept = thinned(values, 100)
    assert len(kept) <= max(100, min(count, 100))
    assert kept == sorted(set(kept))
    assert {0, count // 2, count * 3 // 4, count - 1} <= set(kept)
    known = [value for value in values if value is not None]
    shown = [value for i in kept if (value := values[i]) is not None]
    assert max(known, default=0) == max(shown, default=0)


def test_what_is_short_stays_as_it_is() -> None:
    made = curves(
        [
            record(10),
            record(20, loss=None),
            {"kind": "evaluation", "split": "v", "step": 20, "f1": 1},
        ]
    )
    series = {(each["split"], each["key"]): each for each in made["series"]}
    assert series["train", "loss"]["step"] == [10, 20]
    assert series["train", "loss"]["value"][1] is None
    assert series["v", "f1"]["value"] == [1]
    assert made["axis"]["step"] == [10, 20]
    assert made["axis"]["samples"] == [640, 1280]


def test_numbers_of_a_long_run() -> None:
    records = [record(step, loss=1.0) for step in range(10, 200_001, 10)]
    records[777]["loss"] = 99.0
    records[778]["nonfinite"] = {"loss": "nan"}
    records[778]["loss"] = None
    made = curves(records, most=3000)
    series = {each["key"]: each for each in made["series"]}
    assert max(filter(None, series["loss"]["value"])) == 99.0
    assert None in series["loss"]["value"]
    assert "nonfinite.loss" not in series
    assert sum(series["seconds.data"]["value"]) == pytest.approx(0.1 * len(records))
    assert series["seconds.data"]["step"] == series["seconds.compute"]["step"]
    assert sum(len(each["step"]) for each in made["series"]) < 4000
    assert all(len(column) == len(made["axis"]["step"]) for column in made["axis"].values())
    assert math.isclose(made["axis"]["time"][-1], records[-1]["wall_time"])
