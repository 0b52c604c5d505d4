"""What a run has done before its first step: settings of CUDA, and memory given back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

pytestmark = pytest.mark.ranks(1)

CONFIG = """
[run]
name = "run"
deterministic = true
[model]
use = "mlp"
in_features = 512
out_features = 10
hidden_features = [1024]
[task]
use = "start_of_a_run:Counting"
inputs = ["x"]
target = "y"
[data]
train = "data"
global_batch_size = 8
[optimizer]
use = "sgd"
lr = 1e-3
momentum = 0.9
[training]
max_steps = 4
[launch]
device = "auto"
"""

TASK = """
import gc

import torch

from hpctrain.training.task import Classification


class Counting(Classification):
    steps = 0

    def loss(self, model, fields):
        if torch.is_grad_enabled():
            held = {
                each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
                for each in gc.get_objects()
                if isinstance(each, torch.Tensor) and each.layout == torch.strided
            }
            size = sum(item.numel() for item in model.parameters()) * 4
            print("held", round(sum(held.values()) / size, 2), flush=True)
        return super().loss(model, fields)
"""

RUN = """
import os
import sys

import numpy as np
import torch

from hpctrain.cli import main
from hpctrain.data import Writer

with Writer("data") as writer:
    writer.extend({"x": np.ones((64, 512), np.float32), "y": np.zeros(64, np.int64)})
is_there = torch.cuda.is_available  # the first that a run asks of CUDA


def asked():
    print("CUDA is asked with", os.environ.get("CUBLAS_WORKSPACE_CONFIG"), flush=True)
    return is_there()


torch.cuda.is_available = asked
print("first", main(["run.toml", "training.max_steps=2"]), flush=True)
print("second", main(["run.toml"]), flush=True)
"""


def test_settings_come_before_cuda_and_loaded_tensors_go(tmp_path: Path) -> None:
    """cuBLAS reads its variable once; what a resume has loaded is as large as what is trained."""
    (tmp_path / "run.toml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "start_of_a_run.py").write_text(TASK, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    result = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "CUDA is asked with :4096:8" in output
    assert "CUDA is asked with None" not in output
    first, second = (
        [float(line.removeprefix("held ")) for line in part.splitlines() if line.startswith("held")]
        for part in output.split("first 0")
    )
    # Of the model: parameters and momentum. The dry run has stand-ins of them too, and in a run
    # that goes on it comes before what was loaded has been put in its place.
    assert max(first[:-2]) < 3.5
    assert second[0] > 4.5
    assert first[-2:] == pytest.approx([2, 2], abs=0.2)
    assert second[-2:] == pytest.approx([2, 2], abs=0.2)
