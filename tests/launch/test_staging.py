"""Shards on the node's own disk: a run that has them there is the same run, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from helpers.jobs import Job, train_in_turn
from helpers.limits import JOB_SECONDS
from helpers.runs import last_step, metrics, outcome
from helpers.slow_sites import make_slow_site
from helpers.waiting import wait_for

pytestmark = pytest.mark.ranks(2)

LENGTH = "training.max_epochs=12"


@pytest.fixture
def site(tmp_path: Path, digits: Path) -> Path:
    return make_slow_site(tmp_path, digits)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk too small for all shards."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own needs root, and leave to mount it")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=False)


def test_a_staged_run_is_the_same_run(site: Path, start: Callable[..., Job], disk: Path) -> None:
    """Killed once, stopped once, on a disk that has room for some of its shards only."""
    run = site / "runs" / "digits"
    staged = [LENGTH, "data.stage=node-local", f"data.stage_directory={disk}"]

    def copies() -> dict[str, int]:
        found = disk.glob("hpctrain-*/*/[!.]*.h5")
        return {path.name: path.stat().st_ino for path in found}

    def reads_copies(job: Job) -> bool:
        opened = [{f.path for f in r.open_files()} for n in (0, 1) if (r := job.rank(n))]
        return len(opened) == 2 and all(
            any(str(disk) in path and Path(path).name in copies() for path in paths)
            for paths in opened
        )

    slow = site / "slow-step"
    slow.write_text("0.02")
    job = start(2, *staged)
    wait_for(lambda: last_step(run) > 10 and reads_copies(job))
    left = copies()
    assert 0 < len(left) < 8
    family = psutil.Process(job.process.pid).children(recursive=True)
    os.killpg(job.process.pid, signal.SIGKILL)
    job.wait()
    # A job that ends still holds its folder.
    _, alive = psutil.wait_procs(family, timeout=JOB_SECONDS)
    assert not alive
    assert copies() == left

    job = start(2, *staged)
    wait_for(lambda: outcome(run).get("tries") == 2 and reads_copies(job))
    assert copies() == left  # looked at, and not copied again
    job.signal_rank(1, signal.SIGTERM)
    code, output = job.wait()
    assert code == 75, output
    assert not list(disk.iterdir())

    slow.unlink()
    output, _ = train_in_turn(site, 2, staged, [LENGTH, "run.name=whole"])
    assert f"room for {len(left)} of 10 shards" in output
    assert metrics(run) == metrics(site / "runs" / "whole")
    assert not list(disk.iterdir())
