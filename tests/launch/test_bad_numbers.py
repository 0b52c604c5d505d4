"""Values that are not finite in real data, under a real mpirun: what each policy does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.limits import JOB_SECONDS

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


@pytest.fixture
def site(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((ROWS, 4)).astype(np.float32)
    y = x.sum(axis=1)
    y[BAD_ROWS] = np.nan
    y[FAR_ROW] = 1e4
    with Writer(tmp_path / "train", shard_bytes=2000) as writer:
        writer.extend({"x": x, "y": y})
    (tmp_path / "run.toml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def train(site: Path, ranks: int, *overrides: str, code: int) -> str:
    return run(site, "run.toml", *overrides, code=code, launcher=("mpirun", "-np", str(ranks)))


def run(site: Path, *arguments: str, code: int, launcher: Sequence[str] = ()) -> str:
    result = subprocess.run(
        [*launcher, sys.executable, "-m", "hpctrain", *arguments],
        cwd=site,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def records(site: Path, kind: str) -> list[dict[str, Any]]:
    lines = (site / "runs" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


FSDP = ["training.strategy=fsdp", "training.check_sync_every=0"]


@pytest.mark.parametrize("strategy", [[], FSDP])
def test_the_first_bad_row_ends_the_run_and_is_named(site: Path, strategy: list[str]) -> None:
    output = train(site, 2, *strategy, code=70)
    named = [row for row in BAD_ROWS if f"shard-{row // 100:06d}.h5 row {row % 100}" in output]
    assert named, output
    assert "not finite in the data: y of" in output
    assert "the loss was not finite on rank" in output
    assert output.count("hpctrain: error") == 1
    checkpoints = list((site / "runs" / "run" / "checkpoints").iterdir())
    assert checkpoints
    assert all((path / "meta.json").exists() for path in checkpoints)  # the last one too


@pytest.mark.parametrize(
    ("policy", "strategy"), [("skip", []), ("rollback", []), ("rollback", FSDP)]
)
def test_other_policies_go_on(site: Path, policy: str, strategy: list[str]) -> None:
    output = train(site, 2, f"training.on_bad_steps={policy}", *strategy, code=0)
    assert "y of" in output
    assert re.search(r"step \d+: loss spike: [\d.e+]+, [\d.]+ in the middle of", output)
    if policy == "rollback":
        assert "Parameters and optimizer are those of step" in output
    skipped = [record["skipped_steps"] for record in records(site, "train")]
    assert skipped == sorted(skipped)
    assert 2 <= skipped[-1] <= 2 * len(BAD_ROWS)
    assert f"not applied {skipped[-1]} steps of the run" in output
    status = json.loads(run(site, "status", "runs/run", "--json", code=0))
    assert status["skipped_steps"] == skipped[-1]
    losses = [record["loss"] for record in records(site, "train")]
    assert len(losses) == 2 * ROWS // BATCH
    bad = [loss for loss in losses if loss is None or loss != loss]
    assert 2 <= len(bad) <= 2 * len(BAD_ROWS)
    good = [loss for loss in losses if loss is not None and loss == loss]
    assert good[-1] < good[0]


def test_a_run_that_has_trained_nothing_fails(site: Path) -> None:
    """Whatever is said of single bad steps; and again, when it is started again."""
    shards = sorted((site / "train").glob("*.h5"))
    for shard in shards:
        with h5py.File(shard, "r+") as file:
            file["y"][...] = np.nan
    options = ["training.on_bad_steps=skip", "training.max_epochs=1", "checkpoint.every_steps=7"]
    for steps in (16, 2):  # the second job goes on from step 14
        output = run(site, "run.toml", *options, code=70)
        assert f"none of the {steps} steps of this job was applied" in output
    outcome = json.loads((site / "runs" / "run" / "exit.json").read_text(encoding="utf-8"))
    assert outcome["code"] == 70
    assert outcome["skipped_steps"] == 16
    assert "not applied 16 steps" in run(site, "status", "runs/run", code=0)
