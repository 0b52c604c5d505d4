"""`check` on real data: what is not finite is told with field, file and row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.worlds import world_of_one

from hpctrain.config import load
from hpctrain.config.semantics import semantics_of
from hpctrain.data import Writer
from hpctrain.errors import TrainingError
from hpctrain.launch.process_group import World
from hpctrain.preflight.numbers import NumberFacts, judge_numbers, try_real_data
from hpctrain.training.components import resolve_components
from hpctrain.training.data.run_data import open_data

ROWS = 40
CONFIG = """
[run]
name = "run"
[model]
use = "mlp"
in_features = 4
out_features = 1
[task]
use = "regression"
inputs = ["x"]
target = "y"
[data]
train = "{folder}/train"
validation = "{folder}/validation"
global_batch_size = {rows}
[optimizer]
use = "adamw"
lr = 1e-2
[training]
max_epochs = 1
"""


@pytest.fixture
def world() -> World:
    return world_of_one("test")


def tried(
    folder: Path, world: World, overrides: list[str], bad: dict[tuple[str, str], int]
) -> NumberFacts:
    """Try data whose rows are finite but for those of `bad`, by (split, field)."""
    for split in ("train", "validation"):
        draw = np.random.default_rng(0)
        values = {"x": draw.normal(size=(ROWS, 4)).astype("f4")}
        values["y"] = values["x"].sum(1)
        for (where, name), row in bad.items():
            if where == split:
                values[name][row] = np.nan
        with Writer(folder / split, shard_bytes=400) as writer:
            writer.extend(values)
    path = folder / "run.toml"
    path.write_text(CONFIG.format(folder=folder, rows=ROWS), encoding="utf-8")
    config = load(str(path), overrides)
    opened = open_data(config, world, semantics_of(config), None)
    try:
        return try_real_data(config, world, resolve_components(config), opened)
    finally:
        opened.close()


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_finite_numbers_pass(precision: str, tmp_path: Path, world: World) -> None:
    found = tried(tmp_path, world, [f"training.precision={precision}"], {})
    assert found.trouble == ""
    assert found.samples == ROWS
    assert 0 < found.grad_norm < 100  # of the loss as it is, at scale 1
    assert judge_numbers([found], ["here"]).status == "pass"


def test_a_bad_row_of_the_first_batch_is_named(tmp_path: Path, world: World) -> None:
    found = tried(tmp_path, world, [], {("train", "y"): 33})
    assert found.trouble.startswith('the loss of the first batch is not finite: "y" of shard-')
    shard = int(found.trouble.split("shard-")[1][:6])
    row = int(found.trouble.split(" row ")[1])
    assert shard > 0
    assert row < 33
    finding = judge_numbers([found, found], ["here", "there"])
    assert finding.status == "fail"
    assert finding.fact.startswith("rank 0 on here (and 1 more of 2): the loss")


def test_a_bad_row_of_the_validation_data_is_named(tmp_path: Path, world: World) -> None:
    found = tried(tmp_path, world, ["data.micro_batch_size=16"], {("validation", "x"): 0})
    assert found.trouble == 'the metric loss is not finite: "x" of shard-000000.h5 row 0'


def test_a_model_that_makes_them_is_told_from_data(tmp_path: Path, world: World) -> None:
    overrides = ["data.normalize.x.mean=[0.0]", "data.normalize.x.std=[1e-30]"]
    found = tried(tmp_path, world, overrides, {})
    assert "is not finite, though all its values are: x, y of shard-000000.h5" in found.trouble


def test_a_metric_of_batches_fails_the_check_too(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root_task.py").write_text(
        "from hpctrain.training.task import Regression\n"
        "class Root(Regression):\n"
        "    metrics = {'rmse': 'min'}\n"
        "    def evaluate(self, model, fields):\n"
        "        output, target = self._compare(model, fields)\n"
        "        error = (output - target).square().mean().sqrt()\n"
        "        return {'rmse': (error * len(target), len(target))}\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainingError, match='the metric "rmse" depends on how the data are cut'):
        tried(tmp_path, world, ["task.use=root_task:Root"], {})
