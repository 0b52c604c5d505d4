"""jobs/debug.sh, as the README has it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers.limits import LONG_JOB_SECONDS

pytestmark = pytest.mark.ranks(2)

ROOT = Path(__file__).parents[2]


def test_the_debug_run(tmp_path: Path) -> None:
    def debug(*arguments: str) -> str:
        command = ["bash", "jobs/debug.sh", *arguments, f"run.directory={tmp_path}"]
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=LONG_JOB_SECONDS, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    output = debug("2", "configs/run.toml", "training.max_epochs=1")
    assert "Running: mpirun -np 2 python -m hpctrain configs/run.toml" in output
    assert "2 ranks on 1 node" in output
    assert (tmp_path / "digits" / "latest").exists()

    output = debug("1", "training.max_epochs=1")
    assert "run digits is complete" in output
    assert "training.max_epochs=2" in output
