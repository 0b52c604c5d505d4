"""Samples of unequal length as jobs: one curve, however many ranks and whatever bounds a pass."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.jobs import here, in_turn
from helpers.runs import metrics

pytestmark = pytest.mark.ranks(3)

MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.each = torch.nn.Linear(1, 5)
        self.genes = torch.nn.Linear(9, 5)
        self.last = torch.nn.Linear(5, 1)

    def forward(self, jets, there, cells, gain):
        found = torch.tanh(self.each(jets[..., None].to(there.dtype))) * there[..., None]
        found = found.sum(1) * gain[:, None].to(found.dtype)
        return self.last(found + torch.tanh(self.genes(cells.to_dense())))
"""

CONFIG = """
[run]
directory = "runs"
[model]
use = "nets:Net"
[task]
use = "regression"
inputs = ["jets", "there", "cells", "gain"]
target = "y"
[data]
train = "train-*.h5"
validation = "valid.h5"
test = "valid.h5"
global_batch_size = 20
[data.fields.jets]
batch = "pad"
mask = "there"
[data.fields.cells]
sparse = "csr"
[data.fields.gain]
attribute = "gain"
[data.normalize]
jets = {mean = 3.0, std = 2.0}
[optimizer]
use = "adamw"
lr = 1e-2
[training]
max_epochs = 2
precision = "64-true"
[logging]
every_steps = 1
progress = "none"
"""


def write(path: Path, samples: int) -> None:
    import scipy.sparse

    draw = np.random.default_rng(samples)
    with h5py.File(path, "w") as file:
        jets = file.create_dataset("jets", (samples,), h5py.vlen_dtype("f4"), chunks=(7,))
        for row in range(samples):
            jets[row] = draw.random(draw.integers(0, 12)) * 9
        cells = scipy.sparse.csr_matrix(draw.poisson(0.4, (samples, 9)).astype("f4"))
        group = file.create_group("cells")
        group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", cells.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(cells, name)
        file.attrs["gain"] = samples / 50  # of each file another
        file["y"] = draw.standard_normal((samples, 1)).astype("f4")


def test_any_number_of_ranks_and_any_bound_of_a_pass(tmp_path: Path) -> None:
    """Trained in parts, by both strategies, with passes of so many values; tested, predicted."""
    for name, samples in (("train-1", 70), ("train-2", 51), ("valid", 31)):
        write(tmp_path / f"{name}.h5", samples)
    (tmp_path / "nets.py").write_text(MODEL, encoding="utf-8")
    (tmp_path / "c.toml").write_text(CONFIG, encoding="utf-8")
    here(tmp_path, "c.toml", "run.name=whole")
    parts = ["c.toml", "run.name=parts", "checkpoint.every_epochs=0", "data.max_tokens=25"]
    here(tmp_path, "predict", "c.toml", "run.name=whole", "--output", "one")
    in_turn(
        tmp_path,
        2,
        [*parts, "training.max_steps=3"],
        [*parts, "training.max_steps=5", "training.strategy=fsdp", "data.stage=node-local"],
    )
    *_, tested, predicted = in_turn(
        tmp_path,
        3,
        [*parts, "training.max_steps=8"],
        [*parts, "training.strategy=fsdp"],
        ["test", *parts, "training.strategy=fsdp", "--json"],
        ["predict", *parts, "--output", "three"],
    )
    for kind, count in (("train", 14), ("evaluation", 2)):
        curves = [
            {each["step"]: each["loss"] for each in metrics(tmp_path / "runs" / run, kind)}
            for run in ("whole", "parts")  # parts evaluate at their ends as well
        ]
        assert len(curves[0]) == count
        assert [curves[1][step] for step in curves[0]] == pytest.approx([*curves[0].values()], 1e-8)
    assert tested.code == predicted.code == 0, predicted.output
    last = metrics(tmp_path / "runs" / "whole", "evaluation")[-1]
    assert json.loads(tested.stdout)["metrics"]["loss"] == pytest.approx(last["loss"], 1e-6)
    one, three = (
        np.concatenate([h5py.File(each)["prediction"][()] for each in sorted(folder.glob("*.h5"))])
        for folder in (tmp_path / "one", tmp_path / "three")
    )
    assert one.shape == (31, 1)
    np.testing.assert_allclose(one, three, rtol=1e-6)
