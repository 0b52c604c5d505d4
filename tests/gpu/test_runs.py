"""Whole runs on a device: NCCL at one rank, resume bit for bit, two ranks on one device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.limits import JOB_SECONDS
from safetensors.numpy import load_file

from hpctrain.data import Writer

pytestmark = pytest.mark.ranks(2)

ROOT = Path(__file__).parents[2]
CONFIG = """
[run]
name = "run"
deterministic = true
[model]
use = "convnet"
in_channels = 1
num_classes = 10
[task]
use = "classification"
inputs = ["image"]
target = "label"
[data]
train = "data/train"
validation = "data/validation"
global_batch_size = 64
micro_batch_size = 16
[optimizer]
use = "adamw"
lr = 1e-3
[training]
max_steps = 12
clip_norm = 1.0
[checkpoint]
every_steps = 6
[launch]
device = "%s"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    draw = np.random.default_rng(0)
    for split, count in (("train", 1000), ("validation", 100)):
        with Writer(folder / "data" / split) as writer:
            writer.extend(
                {
                    "image": draw.standard_normal((count, 1, 8, 8)).astype(np.float32),
                    "label": draw.integers(0, 10, count),
                }
            )
    device = os.environ.get("HPCTRAIN_TEST_DEVICE", "cuda")
    (folder / "run.toml").write_text(CONFIG % device)
    return folder


def hpctrain(site: Path, ranks: int, *arguments: str, code: int = 0) -> str:
    launcher = ["mpirun", "-np", str(ranks)] if ranks else []
    result = subprocess.run(
        [*launcher, sys.executable, "-m", "hpctrain", "run.toml", *arguments],
        cwd=site,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    return output


def weights(site: Path, run: str) -> dict[str, np.ndarray]:
    return load_file(site / "runs" / run / "checkpoints" / "step-00000012" / "model.safetensors")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_goes_on_to_the_bit(site: Path, precision: str) -> None:
    chosen = f"training.precision={precision}"
    hpctrain(site, 0, chosen, f"run.name=whole-{precision}")
    hpctrain(site, 0, chosen, f"run.name=cut-{precision}", "training.max_steps=6")
    hpctrain(site, 0, chosen, f"run.name=cut-{precision}")
    whole, cut = weights(site, f"whole-{precision}"), weights(site, f"cut-{precision}")
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)


@pytest.mark.on_device
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_rank_under_a_launcher(site: Path, strategy: str) -> None:
    output = hpctrain(site, 1, f"run.name=one-{strategy}", f"training.strategy={strategy}")
    assert "complete" in output


NCCL_OF_ONE = """
import torch, hpctrain
from torch import distributed as dist
with hpctrain.connect() as world:
    tensor = torch.arange(10.0, device=world.device)
    dist.all_reduce(tensor)
    assert tensor.tolist() == list(map(float, range(10)))
    print("backend", world.backend, dist.get_backend(), world.device)
"""


@pytest.mark.on_device
@pytest.mark.parametrize("launcher", [[], ["mpirun", "-np", "1"]])
def test_one_process_has_a_group_of_nccl(launcher: list[str]) -> None:
    result = subprocess.run(
        [*launcher, sys.executable, "-c", NCCL_OF_ONE],
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    assert "backend nccl nccl cuda:0" in result.stdout


@pytest.mark.on_device
def test_two_ranks_on_one_device_are_refused(site: Path) -> None:
    output = hpctrain(site, 2, "run.name=two", code=69)
    assert "have taken the same cuda device" in output
    assert "launch.share_device = true" in output


@pytest.mark.on_device
def test_two_ranks_share_a_device_where_that_is_asked_for(site: Path) -> None:
    output = hpctrain(site, 2, "run.name=shared", "launch.share_device=true")
    assert "gloo" in output
    assert "complete" in output
