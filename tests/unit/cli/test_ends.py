"""Streams that are closed or full, interrupts, a folder that is gone: told without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpctrain.batch.exit_status import Outcome, write_outcome
from hpctrain.data.writer import Writer

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "configs" / "run.toml"
DATA = "data.train=. data.validation=."
JOB = f"job {CONFIG} {DATA} --scheduler slurm --nodes 1 --time 1:00:00"
START = """
import runpy, signal
# Where pytest itself runs in the background, interrupts are ignored from the start.
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("hpctrain", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_outcome(tmp_path, Outcome(code=75, reason="stopped", step=7, tries=1))
    return tmp_path


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command.replace("HPCTRAIN", f"{sys.executable} -m hpctrain")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("HPCTRAIN --help >/dev/full", 74, "cannot write to stdout: No space left"),
        (f"HPCTRAIN {JOB} >/dev/full", 74, "cannot write to stdout: No space left"),
        ("HPCTRAIN status . >&-", 0, ""),
        ("HPCTRAIN status . --exit-code >/dev/full", 75, ""),
        ("HPCTRAIN status . <&- >&- 2>&-", 0, ""),
        ("HPCTRAIN status nothing 2>/dev/full", 78, ""),
        ("set -o pipefail; HPCTRAIN --help | true", 0, ""),
        (
            "mkdir gone; cd gone; rmdir ../gone; HPCTRAIN status /",
            64,
            "the working directory is gone",
        ),
    ],
)
def test_streams_and_folders(run: Path, command: str, code: int, told: str) -> None:
    result = shell(command, run)
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
    assert (result.returncode, told in result.stderr) == (code, True), result.stderr


@pytest.mark.parametrize("module", ["hpctrain.utils.streams", "numpy", "torch"])
def test_an_interrupt_while_it_starts(run: Path, module: str) -> None:
    """At a moment that is known: when Python tells that it has imported something."""
    with Writer(run / "data") as out:
        images = np.zeros((64, 1, 8, 8), np.float32)
        out.extend({"image": images, "label": np.zeros(64, np.int64)})
    data = [f"data.{key}={run / 'data'}" for key in ("train", "validation")]
    options = [f"run.directory={run}", *data]
    command = [sys.executable, "-X", "importtime", "-c", START, str(CONFIG), *options]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.rpartition("|")[2].strip() == module:
                process.send_signal(signal.SIGINT)
                break
        lines += process.stderr.readlines()
    told = "".join(line for line in lines if not line.startswith("import time:"))
    assert "Traceback" not in told
    assert process.returncode in (75, 130), told
