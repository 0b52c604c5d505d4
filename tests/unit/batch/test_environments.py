"""`job --snapshot`: a job runs the code that it was submitted with, whatever becomes of it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.batch import environments as module
from hpctrain.batch.environments import take_snapshot
from hpctrain.cli import main
from hpctrain.data import Writer
from hpctrain.errors import UsageError

MODEL = """
from torch import nn
from helpers_of_mine import width
class Net(nn.Linear):
    def __init__(self):
        super().__init__(3, width)
"""
CONFIG = """
[run]
name = "x"
[model]
use = "models:Net"
[task]
use = "regression"
inputs = ["x"]
target = "y"
[data]
train = "../data"
global_batch_size = 8
[optimizer]
use = "sgd"
lr = 0.1
[training]
max_steps = 2
[logging]
progress = "none"
"""
ASKED = ["--scheduler", "slurm", "--nodes", "1", "--time", "1:00:00", "--snapshot"]


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "protocol.file.allow=always")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, in whose folder `work` jobs are submitted; a part of it lies outside of that."""
    project = tmp_path / "project"
    work = project / "work"
    work.mkdir(parents=True)
    git(project, "init", "-q")
    (project / ".gitignore").write_text("data\nruns\n", encoding="utf-8")
    (work / "models.py").write_text(MODEL, encoding="utf-8")
    (project / "library").mkdir()
    (project / "library" / "helpers_of_mine.py").write_text("width = 2\n", encoding="utf-8")
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "first")
    (work / "run.toml").write_text(CONFIG, encoding="utf-8")  # not known to git, but to be added
    rows = np.zeros((16, 3), np.float32)
    with Writer(project / "data") as writer:
        writer.extend({"x": rows, "y": rows[:, :2]})
    monkeypatch.chdir(work)
    return work


def submitted(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what follows `python -m hpctrain` in the script that `job` prints."""
    assert main(["job", "run.toml", *ASKED]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--code" in line]
    return shlex.split(line.partition("${HPCTRAIN_CHECK:+check} ")[2].removesuffix(" </dev/null &"))


def run(work: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(work.parent / "library"), str(root)])
    return subprocess.run(
        [sys.executable, "-m", "hpctrain", *arguments],
        cwd=work,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=JOB_SECONDS,
    )


@pytest.mark.ranks(1)
def test_a_job_runs_the_code_that_it_was_submitted_with(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Config and modules, also those that PYTHONPATH leads to; data stay where they are."""
    arguments = submitted(capsys)
    (work / "models.py").write_text("raise SystemError('newer')\n", encoding="utf-8")
    (work / "run.toml").write_text("newer", encoding="utf-8")
    (work.parent / "library" / "helpers_of_mine.py").write_text("newer", encoding="utf-8")
    ended = run(work, arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    record = json.loads((work / "runs" / "x" / "jobs" / "1.json").read_bytes())
    (taken,) = (work / "runs" / "x" / "code").iterdir()
    assert {name: Path(facts["file"]) for name, facts in record["modules"].items()} == {
        "models": (taken / "work" / "models.py").relative_to(work),
        "helpers_of_mine": (taken / "library" / "helpers_of_mine.py").relative_to(work),
    }
    # What is not in the snapshot is not taken from elsewhere.
    (taken / "work" / "models.py").unlink()
    (work / "models.py").write_text(MODEL, encoding="utf-8")
    ended = run(work, [*arguments, "run.name=y"])
    assert ended.returncode == 78
    assert "have no module 'models'" in ended.stderr


def test_what_is_copied(work: Path) -> None:
    project = work.parent
    git(project.parent, "clone", "-q", str(project), "other")
    git(project, "submodule", "--quiet", "add", str(project.parent / "other"), "inner")
    (work / "weights.safetensors").touch()
    (work / "link.py").symlink_to(project.parent / "other" / "work" / "models.py")
    taken = take_snapshot(Path("runs/x"), Path("runs"))
    found = {str(path.relative_to(taken)) for path in taken.rglob("*") if path.is_file()}
    own = {"work/models.py", "library/helpers_of_mine.py", ".gitignore"}
    assert found == {
        *own,
        *(f"inner/{name}" for name in own),
        *(".gitmodules", "work/run.toml", "work/link.py", ".hpctrain-snapshot.json"),
    }
    assert not (taken / "work" / "link.py").is_symlink()


def test_without_git_it_is_what_lies_below(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain"
    for folder in ("package/deeper", ".hidden", "env/lib", "runs/x", "__pycache__"):
        (plain / folder).mkdir(parents=True)
        (plain / folder / "a.py").touch()
    (plain / "env" / "pyvenv.cfg").touch()
    (plain / "data.h5").touch()
    monkeypatch.chdir(plain)
    taken = take_snapshot(Path("runs/x"), Path("runs"))
    found = {str(path.relative_to(taken)) for path in taken.rglob("*") if path.is_file()}
    assert found == {"package/deeper/a.py", ".hpctrain-snapshot.json"}


def test_what_is_too_large_to_be_code_is_named(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    (work / "table.csv").write_bytes(bytes(2000))
    with pytest.raises(UsageError, match=r"\.gitignore:\n  work/table\.csv: 2\.00 kB"):
        take_snapshot(Path("runs/x"), Path("runs"))
    assert not Path("runs/x/code").exists()


def test_a_folder_that_is_no_snapshot_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run.toml", "--code", str(work)]) == 78
    assert "not a snapshot that `job --snapshot` has made" in capsys.readouterr().err
