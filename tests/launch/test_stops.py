"""Asked to stop at awkward moments, one rank alone and never rank 0; then back, bit for bit."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.jobs import Job, here, train_in_turn
from helpers.runs import last_step, metrics, outcome
from helpers.slow_sites import make_slow_site
from helpers.waiting import wait_for

pytestmark = pytest.mark.ranks(2)


@pytest.fixture
def site(tmp_path: Path, digits: Path) -> Path:
    return make_slow_site(tmp_path, digits)


# What a slow file system does to a run, where a file says so: one piece of data, or one file of a
# checkpoint, at a time.
SLOW = """
import os

real_preadv, real_fsync = os.preadv, os.fsync


def slow_preadv(*arguments):
    if Path("slow-data").exists():
        time.sleep(0.005)
    return real_preadv(*arguments)


def slow_fsync(descriptor):
    if Path("slow-save").exists():
        time.sleep(0.5)
    return real_fsync(descriptor)


os.preadv, os.fsync = slow_preadv, slow_fsync
"""

# torch.compile at work, until it is told to go on.
COMPILED = """
from hpctrain.models.convnet import ConvNet


def backend(graph, inputs):
    Path("compiling").touch()
    while not Path("compiled").exists():
        time.sleep(0.01)
    return graph.forward


class Compiled(ConvNet):
    def compile(self, **options):
        super().compile(backend=backend)
"""


def test_a_stop_while_waiting_for_data_and_while_saving(
    site: Path, start: Callable[..., Job]
) -> None:
    """Starved of data; then a stop while a save of before is being written."""
    with (site / "tasks.py").open("a", encoding="utf-8") as file:
        file.write(SLOW)
    # The memory for reading ahead holds one batch: every step waits for its data.
    common = ["training.max_epochs=4", "data.buffer_mb=0.1", "training.evaluate_every_epochs=0"]
    common += ["checkpoint.keep_best_mode=max"]
    run = site / "runs" / "digits"

    (site / "slow-data").touch()
    job = start(2, *common)
    wait_for(lambda: last_step(run) >= 2)
    job.signal_rank(1, signal.SIGUSR1)
    code, output = job.wait()
    assert code == 75, output
    assert outcome(run)["reason"] == "stopped by SIGUSR1"
    assert 2 <= outcome(run)["step"] <= 20
    assert "time        data" in output
    (site / "slow-data").unlink()

    (site / "slow-save").touch()
    job = start(2, *common, "checkpoint.every_steps=15")
    wait_for(lambda: list((run / "checkpoints").glob(".step-*.tmp")))
    job.signal_rank(1, signal.SIGTERM)
    code, output = job.wait()
    assert code == 75, output
    assert outcome(run)["reason"] == "stopped by SIGTERM"
    latest = (run / "latest").read_text(encoding="utf-8").strip()
    assert latest == f"step-{outcome(run)['step']:08d}"
    assert not list((run / "checkpoints").glob(".*"))
    (site / "slow-save").unlink()

    train_in_turn(site, 2, [*common, "run.name=whole"], common)
    assert outcome(run)["tries"] == 3
    assert metrics(run) == metrics(site / "runs" / "whole")


def test_a_stop_while_the_model_is_compiled(site: Path, start: Callable[..., Job]) -> None:
    """It is not lost, and no step is trained: the job ends when the compiler is done."""
    with (site / "tasks.py").open("a", encoding="utf-8") as file:
        file.write(COMPILED)
    run = site / "runs" / "digits"
    job = start(2, "training.compile=true", "model.use=tasks:Compiled")
    wait_for((site / "compiling").exists)
    job.signal_rank(1, signal.SIGTERM)
    (site / "compiled").touch()
    code, output = job.wait()
    assert code == 75, output
    assert outcome(run)["reason"] == "stopped by SIGTERM before the first step"
    here(site, "status", "runs/digits", "--exit-code", code=1)
