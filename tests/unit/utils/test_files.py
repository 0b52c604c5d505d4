"""Files are written whole or not at all, also by several writers at once."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpctrain.batch.exit_status import (
    Outcome,
    conclude,
    forget_endings,
    read_outcome,
    write_outcome,
)
from hpctrain.launch.watchdog.evidence import write_ending
from hpctrain.utils import files

WRITERS, WRITES = 8, 25
ENDINGS = 375


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


def end(folder: Path, writer: int) -> None:
    """One of three who end a job: rank 0, a rank that fails, a watchdog."""
    for number in range(ENDINGS):
        if writer == 0 and number == ENDINGS // 2:
            conclude(folder, Outcome(code=75, reason="stopped", step=9, tries=3))
        reason = f"{writer}-{number} {'x' * (997 * (writer % 2))}"
        conclude(folder, Outcome(code=70, reason=reason, step=5, tries=3))


@pytest.mark.parametrize("links", [True, False])
def test_the_best_word_of_an_end_stays_whoever_comes_last(tmp_path: Path, links: bool) -> None:
    """3,000 endings by processes that do not know each other, read all the while."""
    write_outcome(tmp_path, Outcome(code=None, reason="running", step=5, tries=3))
    children = []
    for writer in range(WRITERS):
        if (child := os.fork()) == 0:
            if not links:
                os.link = no_link
            code = 1
            try:
                end(tmp_path, writer)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    reads = []
    while len(reads) < 200 or os.waitpid(children[0], os.WNOHANG) == (0, 0):
        found = read_outcome(tmp_path)
        assert found is not None
        reads.append(found.code)
    assert [os.waitpid(child, 0)[1] for child in children[1:]] == [0] * (WRITERS - 1)
    last = read_outcome(tmp_path)
    assert last is not None
    assert (last.code, last.reason, last.step) == (75, "stopped", 9)
    assert set(reads) <= {None, 70, 75}
    forget_endings(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def no_link(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_the_first_failure_is_the_one_that_is_told(tmp_path: Path) -> None:
    write_outcome(tmp_path, Outcome(code=None, reason="running", step=5, tries=3))
    write_ending(tmp_path, 70, "rank 3 failed")
    conclude(tmp_path, Outcome(code=69, reason="an echo on rank 0", step=5, tries=3))
    found = read_outcome(tmp_path)
    assert found is not None
    assert (found.code, found.reason) == (70, "rank 3 failed")


def test_a_late_word_does_not_end_the_job_that_came_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_outcome(tmp_path, Outcome(code=None, reason="x", step=5, tries=4, job="slurm 8.0"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    write_ending(tmp_path, 70, "rank 3 failed")
    found = read_outcome(tmp_path)
    assert found is not None
    assert found.code is None


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


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT])
def test_what_only_has_the_name_of_a_file_is_not_opened(tmp_path: Path, flags: int) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    plain = tmp_path / "plain"
    plain.write_bytes(b"abc")
    (tmp_path / "link").symlink_to(plain)
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    try:
        for name, reason in (
            ("link", errno.ELOOP),
            ("nowhere", errno.ELOOP),
            ("pipe", errno.EINVAL),
            ("folder", errno.EISDIR),
        ):
            for place, beside in ((name, folder), (tmp_path / name, None)):
                with pytest.raises(OSError) as caught:  # noqa: PT011 - by its number
                    files.open_regular(place, flags, follow_links=False, folder=beside)
                assert caught.value.errno == reason, name
        os.close(files.open_regular("plain", flags, follow_links=False, folder=folder))
        os.close(files.open_regular("link", flags, folder=folder))
        assert not (tmp_path / "absent").exists()
    finally:
        os.close(folder)


def test_a_file_that_is_made_has_the_mode_asked_for(tmp_path: Path) -> None:
    flags = os.O_RDWR | os.O_CREAT
    os.close(files.open_regular(tmp_path / "lock", flags, follow_links=False, mode=0o600))
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileNotFoundError):
        files.open_regular(tmp_path / "absent", os.O_RDWR)
