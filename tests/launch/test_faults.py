"""File systems that fail under a running job: it ends with a message, and what was saved stays."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.jobs import here, train
from helpers.waiting import wait_for

pytestmark = pytest.mark.ranks(2)

# Python reads this first: what a failing disk answers, from a moment on.
FAILING_SYNC = """
import errno, os

honest = os.fsync


def fsync(descriptor):
    if os.path.exists("fsync-fails"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    honest(descriptor)


os.fsync = fsync
"""


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other tests a model this small mostly waits for its threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@contextmanager
def once_saved(run: Path, step: int, act: Callable[[], None]) -> Iterator[None]:
    """Do something as soon as a job has saved a step."""

    def wait() -> None:
        wait_for((run / "checkpoints" / f"step-{step:08d}").exists)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


LONG = ["training.max_epochs=1000", "checkpoint.every_steps=5", "checkpoint.keep_last=2"]


def only_message(output: str) -> str:
    """Return the one message that a job has ended with."""
    assert "Traceback" not in output, output
    (message,) = [line for line in output.splitlines() if "hpctrain: error" in line]
    return message


def test_a_disk_that_cannot_sync(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "patch").mkdir()
    (site / "patch" / "sitecustomize.py").write_text(FAILING_SYNC, encoding="utf-8")
    paths = [str(site / "patch"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    run = site / "runs" / "digits"
    with once_saved(run, 10, (site / "fsync-fails").touch):
        output = train(site, 2, *LONG, code=74)
    message = only_message(output)
    assert "trying again: Input/output error" in output
    assert "What was saved before is untouched; have the file system checked" in message
    failed = int(message.partition("cannot save step ")[2].split()[0])
    (site / "fsync-fails").unlink()
    saved = json.loads(here(site, "status", "runs/digits", "--json"))["step"]
    # One that got its name, and not the sync after it, is whole all the same.
    newest = max(int(path.name[-8:]) for path in (run / "checkpoints").glob("step-*"))
    assert saved <= newest <= failed
    assert newest >= 10
    output = here(site, "run.toml", f"training.max_steps={newest + 2}")
    assert f"resumes from step {newest}" in output


@pytest.mark.parametrize("what", ["checkpoints", "."])
def test_a_folder_that_is_removed_under_a_job(site: Path, what: str) -> None:
    run = site / "runs" / "digits"
    # At once: to delete it file by file would race with the job, which adds some.
    with once_saved(run, 10, lambda: (run / what).resolve().rename(site / "removed")):
        output = here(site, "run.toml", *LONG, code=74)
    message = only_message(output)
    assert "cannot save step" in message or "another job has taken over" in message
    assert "from scratch" in here(site, "run.toml", "training.max_steps=3")


def test_a_folder_that_only_can_be_read(site: Path) -> None:
    run = site / "runs" / "digits"
    here(site, "run.toml", "training.max_epochs=1")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    mount = ["mount", "--bind", "-o", "ro", str(run), str(run)]
    if os.geteuid() == 0:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("root may not mount here")
    else:
        run.chmod(0o500)
    try:
        message = only_message(train(site, 2, "training.max_epochs=2", code=74))
        assert "cannot write to runs/digits" in message
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(run)], check=True)
        else:
            run.chmod(0o700)
    assert "resumes from step 23" in here(site, "run.toml", "training.max_epochs=2")


def test_a_checkpoint_of_a_newer_version(site: Path) -> None:
    """Nothing is begun on the one before it, which in the end would delete what is newer."""
    here(site, "run.toml", "training.max_epochs=2")
    meta = site / "runs/digits/checkpoints/step-00000046/meta.json"
    content = json.loads(meta.read_bytes()) | {"version": 99}
    meta.write_text(json.dumps(content), encoding="utf-8")
    output = here(site, "run.toml", "training.max_epochs=2", code=74)
    assert "format version 99" in output
    assert "update hpctrain" in only_message(output)
    assert meta.exists()
