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


class Hub(LightningDataModule):
    def prepare_data(self):
        from huggingface_hub import snapshot_download

        there = "http://no-such-host.invalid"
        snapshot_download("us/data", repo_type="dataset", endpoint=there, local_dir="data")


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

HUB = """
from mine import Hub, Net

from hpctrain.lightning import Trainer

Trainer(max_epochs=1, devices=4, accelerator="cpu").fit(Net(), datamodule=Hub())
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


FORKS = """
import os
import sys

import lightning.pytorch

from hpctrain.cli import main

assert "mpi4py" not in sys.modules
for what in sys.argv[1:]:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.chdir(what.partition(".")[0])
        os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        sys.path[0] = os.getcwd()
        code = main(["prepare", what])
        sys.stdout.flush()
        os._exit(code)  # to free all that torch is at an exit takes 5 s
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
"""Every case is a fork of one process, since each would import Lightning anew: 9 s of CPU."""

WHERE_NOTHING_IS_KNOWN = {"MPI4PY_LIBMPI": "/nowhere.so"}
"""Without MPI."""

CASES: dict[str, tuple[int, str, set[str]]] = {
    "run.toml": (0, "prepare_data of Files, prepare_data of Net", {"fetched", "weights"}),
    "train.py": (0, "train.py ended by KeyError after that", {"fetched", "weights"}),
    "loop.py": (0, "prepared up to hpctrain.connect()", {"fetched"}),
    "online.toml": (65, "prepare_data of Online failed with gaierror", set()),
    "hub.py": (65, "prepare_data of Hub failed with LocalEntryNotFoundError", set()),
    "calls.py": (0, "prepare_data of Files, prepare_data of Net", {"fetched", "weights"}),
}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | WHERE_NOTHING_IS_KNOWN,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder of folders, one a case, in each of which it was prepared; and the exit codes."""
    site = tmp_path_factory.mktemp("site")
    for what in CASES:
        folder = site / what.partition(".")[0]
        folder.mkdir()
        (folder / "mine.py").write_text(MODULES, encoding="utf-8")
        for name, data in (("run.toml", "Files"), ("online.toml", "Online")):
            (folder / name).write_text(CONFIG.format(data=data), encoding="utf-8")
        scripts = {"train.py": SCRIPT, "calls.py": CALLS, "loop.py": LOOP, "hub.py": HUB}
        for name, text in scripts.items():
            (folder / name).write_text(text, encoding="utf-8")
    (site / "forks.py").write_text(FORKS, encoding="utf-8")
    ended = run(site, "forks.py", *CASES)
    assert ended.returncode == 0, ended.stderr
    return site, dict(zip(CASES, ended.stdout.split(), strict=True))


@pytest.mark.parametrize("what", CASES)
def test_what_is_fetched(codes: tuple[Path, dict[str, str]], what: str) -> None:
    """On a node of which nothing is known."""
    code, told, fetched = CASES[what]
    folder = codes[0] / what.partition(".")[0]
    output = (folder / "output.txt").read_text(encoding="utf-8")
    assert codes[1][what] == str(code), output
    assert told in output
    assert {each.name for each in folder.iterdir()} & {"fetched", "weights"} == fetched
    assert not (folder / "runs").exists()


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    ended = run(tmp_path, "-m", "hpctrain", "prepare", "absent.py")
    assert ended.returncode == 64
    assert "absent.py: no such file" in ended.stdout + ended.stderr
    assert not list(tmp_path.iterdir())
