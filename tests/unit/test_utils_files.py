"""Files are written whole or not at all, also by several writers at once."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpctrain.batch.outcome import Outcome, read_outcome, write_outcome
from hpctrain.utils import files

WRITERS, WRITES = 8, 25


def test_exit_json_is_whole_while_many_write_it(tmp_path: Path) -> None:
    """They shared one temporary name: reads found half a file, and writes none to rename."""
    write_outcome(tmp_path, Outcome(code=None, reason="x", step=0, tries=1))
    done = threading.Event()

    def write(writer: int) -> None:
        for step in range(WRITES):
            reason = "y" * (1 + 997 * (writer % 2))
            write_outcome(tmp_path, Outcome(code=writer, reason=reason, step=step, tries=1))

    def read() -> int:
        reads = 0
        while not done.is_set():
            outcome = read_outcome(tmp_path)
            assert outcome is not None
            reads += 1
        return reads

    with ThreadPoolExecutor(WRITERS + 1) as pool:
        reading = pool.submit(read)
        try:
            for writing in [pool.submit(write, writer) for writer in range(WRITERS)]:
                writing.result()
        finally:
            done.set()
        assert reading.result() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_every_temporary_name_is_one_writers_alone(tmp_path: Path) -> None:
    names = {files.temporary_name(tmp_path / "a.json") for _ in range(1000)}
    assert len(names) == 1000
    assert all(str(os.getpid()) in name.name and name.name.startswith(".") for name in names)


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127])
def test_a_name_as_long_as_may_be_is_written_too(tmp_path: Path, name: str) -> None:
    files.replace_file(tmp_path / name, b"new")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("failing", ["body", "fsync", "rename"])
def test_what_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.json"
    files.replace_file(path, b"old")

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write() -> None:
        with files.replacing(path) as file:
            file.write(b"half")
            if failing == "body":
                fails()

    with monkeypatch.context() as patch:
        if failing != "body":
            patch.setattr(os, {"fsync": "fsync", "rename": "replace"}[failing], fails)
        with pytest.raises(OSError, match="No space"):
            write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_syncs_no_folders_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(errno.EINVAL, "Invalid argument")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.replace_file(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"


def test_a_file_that_cannot_be_synced_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        files.sync(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="Input/output"):
        files.sync(tmp_path / "a")
