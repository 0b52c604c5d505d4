"""Shards that break under a running job: it says which, and keeps what it has learnt."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.jobs import command, here
from helpers.launching import ROOT
from helpers.limits import JOB_SECONDS
from helpers.waiting import wait_for

from hpctrain.convert.digits import pack_digits
from hpctrain.convert.sources.indexed import Indexed
from hpctrain.data import Writer

pytestmark = pytest.mark.ranks(2)

TRAIN = [
    *("run.toml", "run.directory=runs", "logging.every_steps=1", "logging.progress=none"),
    *(
        "checkpoint.every_epochs=0",
        "training.max_epochs=100000",
        "training.evaluate_every_epochs=0",
    ),
    "data.read_retries=1",
]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The digits, many times over: the shards break in the middle of an epoch of minutes."""
    digits = tmp_path / "data" / "digits"
    pack_digits(digits)
    dataset = Indexed.open(str(digits / "train"))
    samples = dataset.read(np.arange(dataset.samples))
    shutil.rmtree(digits / "train")
    with Writer(digits / "train", shard_rows=10_000) as writer:
        for _ in range(40):
            writer.extend(samples)
    shutil.copy(ROOT / "configs" / "run.toml", tmp_path / "run.toml")
    return tmp_path


def steps(site: Path) -> int:
    path = site / "runs" / "digits" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def test_a_shard_breaks_under_the_run(site: Path) -> None:
    shard = sorted((site / "data" / "digits" / "train").glob("*.h5"))[0]
    whole = shard.read_bytes()
    with subprocess.Popen(
        command(2, *TRAIN), cwd=site, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        wait_for(lambda: steps(site) >= 50 or job.poll() is not None)
        os.truncate(shard, 4096)
        told, _ = job.communicate(timeout=JOB_SECONDS)
    assert job.returncode == 65, told
    assert f"{shard.name}: this file was truncated from" in told
    assert "Traceback" not in told
    # Nothing else would have saved: all ranks did together, with the batches that were left.
    checkpoints = [path.name for path in (site / "runs" / "digits" / "checkpoints").iterdir()]
    saved = max(int(name.rpartition("-")[2]) for name in checkpoints if name[-1].isdigit())
    assert saved >= 50, (checkpoints, told)

    shard.write_bytes(whole)
    assert f"step {saved:,}" in here(site, *TRAIN, f"training.max_steps={saved + 5}")
    assert steps(site) == saved + 5
