"""Values that are not finite in real data, under a real mpirun: what each policy does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.jobs import here, in_turn
from helpers.runs import outcome

from hpctrain.data import Writer

pytestmark = pytest.mark.ranks(2)

ROWS, BATCH = 256, 16
BAD_ROWS = [40, 41, 200]
FAR_ROW = 120

CONFIG = f"""
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
train = "train"
validation = "train"
global_batch_size = {BATCH}
[optimizer]
use = "adamw"
lr = 1e-2
[training]
max_epochs = 2
max_bad_steps = 1
check_sync_every = 3
ema_decay = 0.9
[checkpoint]
every_steps = 1
[logging]
every_steps = 1
"""


def make_site(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((ROWS, 4)).astype(np.float32)
    y = x.sum(axis=1)
    y[BAD_ROWS] = np.nan
    y[FAR_ROW] = 1e4
    with Writer(folder / "train", shard_bytes=2000) as writer:
        writer.extend({"x": x, "y": y})
    (folder / "run.toml").write_text(CONFIG, encoding="utf-8")
    return folder


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


FSDP = ["training.strategy=fsdp", "training.check_sync_every=0"]


JOBS: dict[str, tuple[int, list[str]]] = {
    "ddp": (70, []),
    "fsdp": (70, FSDP),
    "skip": (0, ["training.on_bad_steps=skip"]),
    "rollback": (0, ["training.on_bad_steps=rollback"]),
    "rollback-fsdp": (0, ["training.on_bad_steps=rollback", *FSDP]),
}
"""The exit code of each job, and what it is asked for."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The runs of all jobs, and what these have said, on ranks that are started once."""
    site = make_site(tmp_path_factory.mktemp("bad"))
    lines = [["run.toml", f"run.name={name}", *options] for name, (_, options) in JOBS.items()]
    ended = dict(zip(JOBS, in_turn(site, 2, *lines), strict=True))
    for name, each in ended.items():
        assert each.code == JOBS[name][0], each.output
    return site, {name: each.output for name, each in ended.items()}


@pytest.mark.parametrize("name", [name for name, (code, _) in JOBS.items() if code])
def test_the_first_bad_row_ends_the_run_and_is_named(
    trained: tuple[Path, dict[str, str]], name: str
) -> None:
    site, outputs = trained
    output = outputs[name]
    named = [row for row in BAD_ROWS if f"shard-{row // 100:06d}.h5 row {row % 100}" in output]
    assert named, output
    assert "not finite in the data: y of" in output
    assert "the loss was not finite on rank" in output
    assert output.count("hpctrain: error") == 1
    checkpoints = list((site / "runs" / name / "checkpoints").iterdir())
    assert checkpoints
    assert all((path / "meta.json").exists() for path in checkpoints)  # the last one too


@pytest.mark.parametrize("name", [name for name, (code, _) in JOBS.items() if not code])
def test_other_policies_go_on(trained: tuple[Path, dict[str, str]], name: str) -> None:
    site, outputs = trained
    output, run = outputs[name], site / "runs" / name
    assert "y of" in output
    assert re.search(r"step \d+: loss spike: [\d.e+]+, [\d.]+ in the middle of", output)
    if name != "skip":
        assert "Parameters and optimizer are those of step" in output
    skipped = [record["skipped_steps"] for record in records(run, "train")]
    assert skipped == sorted(skipped)
    assert 2 <= skipped[-1] <= 2 * len(BAD_ROWS)
    assert f"not applied {skipped[-1]} steps of the run" in output
    status = json.loads(here(site, "status", f"runs/{name}", "--json"))
    assert status["skipped_steps"] == skipped[-1]
    losses = [record["loss"] for record in records(run, "train")]
    assert len(losses) == 2 * ROWS // BATCH
    bad = [loss for loss in losses if loss is None or loss != loss]
    assert 2 <= len(bad) <= 2 * len(BAD_ROWS)
    good = [loss for loss in losses if loss is not None and loss == loss]
    assert good[-1] < good[0]


def test_a_run_that_has_trained_nothing_fails(tmp_path: Path) -> None:
    """Whatever is said of single bad steps; and again, when it is started again."""
    site = make_site(tmp_path)
    shards = sorted((site / "train").glob("*.h5"))
    for shard in shards:
        with h5py.File(shard, "r+") as file:
            file["y"][...] = np.nan
    options = ["training.on_bad_steps=skip", "training.max_epochs=1", "checkpoint.every_steps=7"]
    for steps in (16, 2):  # the second job goes on from step 14
        output = here(site, "run.toml", *options, code=70)
        assert f"none of the {steps} steps of this job was applied" in output
    ended = outcome(site / "runs" / "run")
    assert ended["code"] == 70
    assert ended["skipped_steps"] == 16
    assert "not applied 16 steps" in here(site, "status", "runs/run")
