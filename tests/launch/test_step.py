"""The step over real process groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

BODIES = Path(__file__).parents[1] / "mpi"


@pytest.mark.parametrize("ranks", [1, 3, 4])  # two find less than three
def test_the_step(ranks: int) -> None:
    result = subprocess.run(
        ["mpirun", "-np", str(ranks), sys.executable, str(BODIES / "step.py")],
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert f"passed { {1: 16, 3: 23, 4: 13}[ranks] }" in result.stdout


@pytest.mark.parametrize("ranks", [3])
def test_whatever_a_task_does_with_a_model(ranks: int) -> None:
    result = subprocess.run(
        ["mpirun", "-np", str(ranks), sys.executable, str(BODIES / "calls.py")],
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "passed" in result.stdout
