"""A mixture as jobs: one curve at any number of ranks, with restarts and both strategies."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.jobs import here, in_turn
from helpers.runs import metrics

pytestmark = pytest.mark.ranks(3)

CONFIG = """
[run]
directory = "runs"
[model]
use = "mlp"
in_features = 4
out_features = 1
hidden_features = [8]
[task]
use = "regression"
inputs = ["x"]
target = "y"
[data]
global_batch_size = 40
epoch_samples = 1000
validation = "b.h5"
sources = [
    { name = "a", train = "a.h5", weight = 0.6 },
    { name = "b", train = "b.h5", weight = 0.3, samples = [0, 2000] },
    { name = "tiny", train = "tiny.h5", weight = 0.1, when_exhausted = "drop" },
]
[optimizer]
use = "adamw"
lr = 1e-2
[scheduler]
use = "constant"
warmup_epochs = 0.5
[training]
max_epochs = 3
precision = "64-true"
[logging]
every_steps = 1
progress = "none"
"""


def test_a_mixture_trains_the_same_at_any_number_of_ranks(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    for name, samples in (("a", 1500), ("b", 3000), ("tiny", 21)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"] = numbers.standard_normal((samples, 4))
            file["y"] = numbers.standard_normal((samples, 1))
    (tmp_path / "c.toml").write_text(CONFIG, encoding="utf-8")
    whole = here(tmp_path, "c.toml", "run.name=whole")
    assert "source tiny: 21 samples, 0.1 of every batch, 4.76 of its epochs in one of the " in whole
    # Parts of the same run, of other ranks and strategies: each ends where no epoch does.
    parts = ["c.toml", "run.name=parts", "checkpoint.every_epochs=0"]
    in_turn(
        tmp_path,
        2,
        [*parts, "training.max_steps=13"],
        [*parts, "training.max_steps=31", "training.strategy=fsdp"],
    )
    in_turn(
        tmp_path,
        3,
        [*parts, "training.max_steps=44"],
        [*parts, "training.strategy=fsdp"],
    )
    for kind, count in (("train", 75), ("evaluation", 3)):
        curves = [
            {each["step"]: each["loss"] for each in metrics(tmp_path / "runs" / run, kind)}
            for run in ("whole", "parts")  # parts evaluate at their ends as well
        ]
        assert len(curves[0]) == count
        assert [curves[1][step] for step in curves[0]] == pytest.approx([*curves[0].values()], 1e-8)
    last = metrics(tmp_path / "runs" / "parts", "train")[-1]["source_epochs"]
    assert last["tiny"] == 1.0
    assert last["a"] + last["b"] * 2000 / 1500 == pytest.approx((3000 - 21) / 1500)
    assert last == metrics(tmp_path / "runs" / "whole", "train")[-1]["source_epochs"]

    weights = (
        (tmp_path / "c.toml").read_text(encoding="utf-8").replace("weight = 0.6", "weight = 0.1")
    )
    (tmp_path / "c.toml").write_text(weights, encoding="utf-8")
    changed = here(tmp_path, *parts, "training.max_epochs=4")
    assert "data.sources: [{...}, {...}, {...}] when saved" in changed
    end = metrics(tmp_path / "runs" / "parts", "train")[-1]["source_epochs"]
    assert (end["a"] - last["a"]) * 1500 == pytest.approx(250, abs=2)
