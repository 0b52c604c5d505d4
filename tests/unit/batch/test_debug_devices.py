"""What the ranks of the debug run compute on, where a machine has fewer GPUs than ranks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ENVIRONMENT = Path(__file__).parents[3] / "jobs" / "environment.sh"


@pytest.mark.parametrize(
    ("gpus", "arguments", "override"),
    [
        (0, "2", ""),
        (1, "1", ""),
        (1, "2", "launch.share_device=true"),
        (1, "2 training.max_epochs=3 launch.interface=lo", "launch.share_device=true"),
        (1, "2 launch.device=cpu", ""),
        (1, "2 launch.share_device=false", ""),
        (2, "2", ""),
        (2, "3", "launch.share_device=true"),
    ],
)
def test_ranks_share_or_are_told_otherwise(gpus: int, arguments: str, override: str) -> None:
    """By what torch would see; this machine may have none."""
    script = f"source {ENVIRONMENT}; _gpus() {{ echo {gpus}; }}; sharing {arguments}"
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == override


def test_no_gpu_is_counted_without_a_driver(tmp_path: Path) -> None:
    """And torch is asked where there is one: it knows what is visible, and to which maker."""
    (tmp_path / "python").write_text("#!/bin/sh\necho 3\n", encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    there = any(Path(each).exists() for each in drivers) or list(Path("/dev").glob("dri/renderD*"))
    result = subprocess.run(
        ["bash", "-c", f"PATH={tmp_path}:$PATH; source {ENVIRONMENT}; _gpus"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == ("3" if there else "0")
