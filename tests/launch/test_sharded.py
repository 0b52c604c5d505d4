"""Parameters spread over the ranks, on real process groups and in whole jobs."""

from __future__ import annotations

import json
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
from helpers.limits import JOB_SECONDS
from helpers.waiting import wait_for
from test_main_job import digits, hpctrain, losses, metrics, site, train

from hpctrain.checkpoint.inspect import verified
from hpctrain.checkpoint.load import load

pytestmark = pytest.mark.ranks(3)

__all__ = ["digits", "site"]

BODIES = Path(__file__).parents[1] / "mpi"


def command(ranks: int, body: str, *arguments: str) -> list[str]:
    return ["mpirun", "-np", str(ranks), sys.executable, str(BODIES / body), *arguments]


def passed(ranks: int, body: str, *arguments: str) -> str:
    result = subprocess.run(
        command(ranks, body, *arguments),
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
        # A model this small spends its time waiting for its own threads otherwise.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("ranks", [3, 4])
def test_a_step_is_as_with_ddp(ranks: int) -> None:
    assert "passed 10" in passed(ranks, "sharded.py")


@pytest.mark.parametrize("ranks", [3])
def test_a_resumed_run_is_exact_and_damage_is_noticed(tmp_path: Path, ranks: int) -> None:
    assert "passed exact" in passed(ranks, "sharded_saves.py", str(tmp_path), "exact")


def test_any_world_size_goes_on_from_any_other(tmp_path: Path) -> None:
    for ranks in (4, 2, 3, 1):
        assert "passed go-on" in passed(ranks, "sharded_saves.py", str(tmp_path), "go-on")


def test_killed_at_random_moments_nothing_is_torn(tmp_path: Path) -> None:
    """Whatever has a final name is whole, and there is always one."""
    draw, seen = random.Random(5), 0
    checkpoints = tmp_path / "checkpoints"
    for _ in range(3):
        job = subprocess.Popen(
            command(2, "sharded_saves.py", str(tmp_path), "save"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
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
    train(site, 2, "run.name=ddp", *common)
    fsdp = [*common, "run.name=fsdp", 'training.shard=["features.*"]']
    output = train(site, 3, *fsdp, "training.strategy=fsdp", "training.max_steps=13")
    assert "Traceback" not in output
    train(site, 2, *fsdp, "training.strategy=fsdp", "training.max_steps=18")
    run = site / "runs" / "fsdp"
    newest = run / "checkpoints" / "step-00000018"
    assert len(list(newest.glob("model-*.safetensors"))) == 2
    assert "whole" in hpctrain(site, 0, "ckpt", "verify", "runs/fsdp").stdout
    assert "tensors in both are equal" in hpctrain(site, 0, "ckpt", "diff", "runs/fsdp").stdout
    hpctrain(site, 0, "ckpt", "export", "runs/fsdp", "weights.safetensors")
    from safetensors.torch import load_file

    assert load_file(site / "weights.safetensors").keys() == load(newest).model.keys()

    shutil.copytree(run, site / "runs" / "damaged")
    part = site / "runs" / "damaged" / "checkpoints" / newest.name / "training-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    again = [*fsdp, "run.name=damaged", "training.strategy=fsdp", "training.max_steps=14"]
    output = train(site, 2, *again)
    assert "skipped" in output
    assert "training-00001.safetensors is damaged" in output
    assert "is complete: 15 steps" in output

    train(site, 2, *common, "run.name=fsdp")  # with ddp
    ours, theirs = losses(run), losses(site / "runs" / "ddp")
    assert len(ours) == len(theirs) == 23
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-9
    ours_last, theirs_last = (
        metrics(site / "runs" / name, "evaluation")[-1] for name in ("fsdp", "ddp")
    )
    assert abs(ours_last["loss"] - theirs_last["loss"]) < 1e-9
    assert json.loads((run / "exit.json").read_text(encoding="utf-8"))["code"] == 0
