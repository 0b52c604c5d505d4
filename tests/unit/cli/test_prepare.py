"""`python -m hpctrain prepare`: configs and scripts fetch, and train nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

MODULES = """
import socket
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn


class Files(LightningDataModule):
    def prepare_data(self):
        Path("fetched").touch()


class Online(LightningDataModule):
    def prepare_data(self):
        socket.getaddrinfo("no-such-host.invalid", 80)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def prepare_data(self):
        Path("weights").touch()

    def training_step(self, batch, batch_idx):
        raise AssertionError("nothing is trained")
"""

CONFIG = """
[run]
name = "x"
[model]
use = "mine:Net"
[data]
use = "mine:{data}"
global_batch_size = 2
[training]
max_epochs = 1
"""

SCRIPT = """
import sys

from mine import Files, Net

from hpctrain.lightning import Trainer

assert "mpi4py" not in sys.modules
trainer = Trainer(max_epochs=1, devices=4, accelerator="cpu")
trainer.fit(Net(), datamodule=Files())
print("accuracy", trainer.callback_metrics["accuracy"])
"""

LOOP = """
from pathlib import Path

import hpctrain

Path("fetched").touch()
with hpctrain.connect():
    raise AssertionError("nothing is trained")
"""


CALLS = """
import hpctrain

assert hpctrain.train("run.toml") == {}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MODULES, encoding="utf-8")
    for name, data in (("run.toml", "Files"), ("online.toml", "Online")):
        (tmp_path / name).write_text(CONFIG.format(data=data), encoding="utf-8")
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "calls.py").write_text(CALLS, encoding="utf-8")
    (tmp_path / "loop.py").write_text(LOOP, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("what", "code", "told", "fetched"),
    [
        ("run.toml", 0, "prepare_data of Files, prepare_data of Net", {"fetched", "weights"}),
        ("train.py", 0, "train.py ended by KeyError after that", {"fetched", "weights"}),
        ("loop.py", 0, "prepared up to hpctrain.connect()", {"fetched"}),
        ("online.toml", 65, "prepare_data of Online failed with gaierror", set()),
        ("calls.py", 0, "prepare_data of Files, prepare_data of Net", {"fetched", "weights"}),
        ("absent.py", 64, "absent.py: no such file", set()),
    ],
)
def test_what_is_fetched(folder: Path, what: str, code: int, told: str, fetched: set[str]) -> None:
    """Without MPI, on a node of which nothing is known."""
    ended = subprocess.run(
        [sys.executable, "-m", "hpctrain", "prepare", what],
        cwd=folder,
        env=os.environ | {"MPI4PY_LIBMPI": "/nowhere.so"},
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    output = ended.stdout + ended.stderr
    assert ended.returncode == code, output
    assert told in output
    assert {each.name for each in folder.iterdir()} & {"fetched", "weights"} == fetched
    assert not (folder / "runs").exists()
