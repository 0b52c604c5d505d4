"""Parameters spread over the ranks, on real process groups and in whole jobs."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.jobs import here, train, train_in_turn
from helpers.launching import BODIES
from helpers.limits import JOB_SECONDS
from helpers.runs import losses, metrics, outcome
from helpers.waiting import wait_for

from hpctrain.checkpoint.inspect import verified
from hpctrain.checkpoint.load import load

pytestmark = pytest.mark.ranks(3)


def command(ranks: int, body: str, *arguments: str) -> list[str]:
    return ["mpirun", "-np", str(ranks), sys.executable, str(BODIES / body), *arguments]


def test_killed_at_random_moments_nothing_is_torn(tmp_path: Path) -> None:
    """Whatever has a final name is whole, and there is always one."""
    draw, seen = random.Random(5), 0
    places = [str(BODIES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # for helpers
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    checkpoints = tmp_path / "checkpoints"
    for _ in range(2):
        job = subprocess.Popen(
            command(2, "sharded_saves.py", str(tmp_path), "save"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | environment,
        )
        before = set(checkpoints.glob("step-*"))

        def is_due(job: subprocess.Popen[bytes] = job, before: set[Path] = before) -> bool:
            return job.poll() is not None or len(set(checkpoints.glob("step-*")) - before) >= 2

        wait_for(is_due)
        assert job.poll() is None
        time.sleep(draw.random() * 0.3)
        ranks = [
            child
            for child in psutil.Process(job.pid).children(recursive=True)
            if "sharded_saves.py" in " ".join(child.cmdline())
        ]
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL)
        job.wait(JOB_SECONDS)
        verified(tmp_path)
        now = len(list(checkpoints.glob("step-*")))
        assert now > seen
        seen = now


def test_a_job_is_that_of_ddp(site: Path) -> None:
    """Losses, checkpoints and their tools; and a run that begins with one strategy and world
    size ends with another.
    """
    common = [
        *("training.precision=64-true", "training.max_epochs=1", "logging.every_steps=1"),
        *("checkpoint.every_steps=5", "checkpoint.keep_last=9", "data.micro_batch_size=9"),
        "scheduler.use=constant",
    ]
    fsdp = [*common, "run.name=fsdp", 'training.shard=["features.*"]']
    bounded = [*fsdp, "checkpoint.files=6"]
    output = train(site, 3, *bounded, "training.strategy=fsdp", "training.max_steps=13")
    assert "Traceback" not in output
    first = site / "runs" / "fsdp" / "checkpoints" / "step-00000013"
    assert len(list(first.iterdir())) == 5  # three ranks are one group
    train_in_turn(
        site,
        2,
        ["run.name=ddp", *common],
        [*fsdp, "training.strategy=fsdp", "training.max_steps=18"],
    )
    run = site / "runs" / "fsdp"
    newest = run / "checkpoints" / "step-00000018"
    assert len(list(newest.glob("model-*.safetensors"))) == 2
    assert "whole" in here(site, "ckpt", "verify", "runs/fsdp")
    assert "tensors in both are equal" in here(site, "ckpt", "diff", "runs/fsdp")
    here(site, "ckpt", "export", "runs/fsdp", "weights.safetensors")
    from safetensors.torch import load_file

    assert load_file(site / "weights.safetensors").keys() == load(newest).model.keys()

    shutil.copytree(run, site / "runs" / "damaged")
    part = site / "runs" / "damaged" / "checkpoints" / newest.name / "training-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    again = [*fsdp, "run.name=damaged", "training.strategy=fsdp", "training.max_steps=14"]
    output, _ = train_in_turn(site, 2, again, [*common, "run.name=fsdp"])  # then with ddp
    assert "skipped" in output
    assert "training-00001.safetensors is damaged" in output
    assert "is complete: 15 steps" in output

    ours, theirs = losses(run), losses(site / "runs" / "ddp")
    assert len(ours) == len(theirs) == 23
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-9
    ours_last, theirs_last = (
        metrics(site / "runs" / name, "evaluation")[-1] for name in ("fsdp", "ddp")
    )
    assert abs(ours_last["loss"] - theirs_last["loss"]) < 1e-9
    assert outcome(run)["code"] == 0
