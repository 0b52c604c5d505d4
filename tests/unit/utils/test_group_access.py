"""A run that colleagues go on with: one user's umask does not lock the others out."""

from __future__ import annotations

import errno
import os
import signal
import stat
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from hpctrain.checkpoint.lease import Lease
from hpctrain.errors import CheckpointError, ExitCode
from hpctrain.launch.crash import write_report
from hpctrain.launch.watchdog.stacks import write_stacks
from hpctrain.training.folder import RunFolder
from hpctrain.utils import files
from hpctrain.utils.files import AppendedFile
from hpctrain.utils.permissions import explained, follow_folder, is_open_to_group, open_to_group

ALICE, BOB, PROJECT = 4321, 4322, 4400

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming other users needs root")


def as_user(user: int, work: Callable[[], object], *, dies: bool = False) -> None:
    """Do something as a user of the project, in a child; it may die right after."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([PROJECT])
            os.setgid(PROJECT if user == ALICE else user)
            os.setuid(user)
            os.umask(0o077)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the parent sees a code only
            traceback.print_exc()
        finally:
            if dies and code == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(code)
    assert os.waitpid(child, 0)[1] == (signal.SIGKILL if dies else 0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that every member of the project may write to."""
    # What is imported late is so by now: others may not read this user's Python.
    train(tmp_path / "warm", key=True, end=True)
    "".encode("ascii")
    explained(PermissionError(errno.EACCES, "", str(tmp_path)), tmp_path)
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
        if folder.name.startswith("pytest-of"):
            break
    runs = tmp_path / "runs"
    runs.mkdir()
    os.chown(runs, -1, PROJECT) if os.geteuid() == 0 else None
    runs.chmod(0o2770)
    return runs


def train(run: Path, *, key: bool, end: bool) -> None:
    """Write what a job writes in its run folder."""
    with RunFolder(run, group_writable=key) as folder:
        folder.record.begin({})
        log = AppendedFile(run / "log.txt")
        log.append(b"a line\n")
        log.close()
        files.replace_file(run / "latest", b"step-00000001\n")
        (run / "checkpoints").mkdir(exist_ok=True)
        follow_folder(run / "checkpoints")
        (run / "checkpoints" / f"model-{os.getuid()}").touch()
        folder.begin(1)
        if not end:
            folder.record._gathering.join()  # type: ignore[union-attr]
            os.kill(os.getpid(), signal.SIGKILL)
        folder.end(ExitCode.STOPPED, "stopped")


@needs_root
@pytest.mark.parametrize("end", [True, False], ids=["ended", "killed"])
def test_a_colleague_goes_on_with_a_run(place: Path, end: bool) -> None:
    run = place / "digits"
    as_user(ALICE, lambda: train(run, key=True, end=end), dies=not end)
    as_user(BOB, lambda: train(run, key=False, end=True))
    as_user(ALICE, lambda: train(run, key=False, end=True))
    for path in (run, *run.rglob("*")):
        facts = path.stat()
        wanted = 0o2770 if path.is_dir() else 0o660
        assert stat.S_IMODE(facts.st_mode) & wanted == wanted, path
        assert facts.st_gid == PROJECT, path
    assert len(list((run / "jobs").iterdir())) == 3


@needs_root
def test_without_the_key_the_error_says_whose_the_file_is(place: Path) -> None:
    run = place / "digits"
    as_user(ALICE, lambda: train(run, key=False, end=True))

    def refused() -> None:
        with pytest.raises(CheckpointError) as caught:
            train(run, key=False, end=True)
        told = str(caught.value)
        assert f"cannot write to {run}: Permission denied: {run} belongs to {ALICE}:" in told
        assert "mode drwx" in told
        assert "run.group_writable" in told
        with pytest.raises(CheckpointError, match=r"digits belongs to .*group_writable"):
            RunFolder(run, group_writable=True).__enter__()

    as_user(BOB, refused)


@needs_root
def test_the_lease_of_a_colleague_that_lives_is_respected(place: Path) -> None:
    run = place / "digits"
    as_user(ALICE, lambda: train(run, key=True, end=True))
    with Lease(run, {}):  # of root
        (run / "lease.json").chmod(0o664)

        def refused() -> None:
            with pytest.raises(CheckpointError, match="another job trains in"):
                train(run, key=False, end=True)

        as_user(BOB, refused)


def test_files_elsewhere_follow_the_umask_alone(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        files.replace_file(tmp_path / "a", b"x")
        open_to_group(tmp_path)
        assert is_open_to_group(tmp_path)
        files.replace_file(tmp_path / "b", b"x")
        files.create_file(tmp_path / "c", b"x")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "abc"]
    assert modes == [0o600, 0o660, 0o660]


def test_a_link_that_a_colleague_has_put_there_is_not_followed(tmp_path: Path) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    open_to_group(run)
    mine.write_bytes(b"mine")
    for name in ("log.txt", "exit.json", "rank-0.txt", "crash-rank-0.json"):
        (run / name).symlink_to(mine)
    with pytest.raises(OSError, match="symbolic links"):
        AppendedFile(run / "log.txt")
    files.replace_file(run / "exit.json", b"x")
    assert write_stacks(run, {0: "stack"}, 300)
    write_report(run, rank=0, host="n", code=70, story="", step=None, about={})
    assert mine.read_bytes() == b"mine"
    assert (run / "rank-0.txt").read_bytes() == b"stack"


def test_what_is_no_matter_of_permission_is_said_as_it_is(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path))
    assert explained(full, tmp_path) == "No space left on device"
    denied = OSError(errno.EACCES, "Permission denied", str(tmp_path / "not" / "there"))
    assert explained(denied, tmp_path).startswith(f"Permission denied: {tmp_path} belongs to ")
