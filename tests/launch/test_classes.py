"""Texts as classes, some of them missing: one curve at any number of ranks, and their names."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.jobs import here, in_turn
from helpers.runs import metrics

from hpctrain import load_model

pytestmark = pytest.mark.ranks(3)

CONFIG = """
[run]
directory = "runs"
[model]
use = "mlp"
in_features = 3
out_features = 3
[task]
use = "classification"
inputs = ["x"]
target = "kind"
[data]
global_batch_size = 8
validation = "b.h5"
[[data.sources]]
name = "a"
train = "a.h5"
[[data.sources]]
name = "b"
train = "b.h5"
[data.fields.kind]
classes = "sorted"
[optimizer]
use = "adamw"
lr = 1e-2
[training]
max_epochs = 1
precision = "64-true"
[logging]
every_steps = 1
progress = "none"
"""


def write(path: Path, kinds: list[str], seed: int) -> None:
    draw = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file["x"] = draw.normal(size=(len(kinds), 3)).astype("f4")
        file["kind"] = np.array(kinds, h5py.string_dtype())


def test_one_curve_and_the_names_of_its_classes(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", ["owl", "cat", "", "cat", "owl", "", "cat"] * 3, 0)
    write(tmp_path / "b.h5", ["", "dog", "owl", "dog", ""] * 3, 1)
    (tmp_path / "c.toml").write_text(CONFIG, encoding="utf-8")
    mask = ["c.toml", 'data.fields.kind.mask="is_known"']
    ignored = ["c.toml", "data.fields.kind.missing=-100", "task.ignore_index=-100"]
    here(tmp_path, *mask, "run.name=one")
    ended = in_turn(
        tmp_path,
        3,
        [*mask, "run.name=three"],
        [*ignored, "run.name=ignored"],
        ["c.toml", "run.name=refused", 'data.fields.kind.classes=["cat", "dog", "owl"]'],
        ["c.toml", "run.name=unmasked", "data.fields.kind.missing=-100"],
    )
    assert [each.code for each in ended] == [0, 0, 65, 65], [each.output for each in ended]
    refused = r"[ab]\.h5: field .kind.*, row \d+: .*''.* is none of the classes: name it, or say"
    assert re.search(refused, ended[2].output), ended[2].output
    assert "-100 is a missing value" in ended[3].output
    for kind in ("train", "evaluation"):
        one, *others = (
            [each["loss"] for each in metrics(tmp_path / "runs" / run, kind)]
            for run in ("one", "three", "ignored")
        )
        assert len(one) == (5 if kind == "train" else 1)
        for other in others:
            assert other == pytest.approx(one, 1e-9)
    run = tmp_path / "runs" / "three"
    here(tmp_path, "ckpt", "export", str(run), "m.safetensors")
    here(tmp_path, "ckpt", "export", str(run), "m.pt2")
    for path in (run, tmp_path / "m.safetensors", tmp_path / "m.pt2"):
        assert load_model(path).classes == ("cat", "dog", "owl")
