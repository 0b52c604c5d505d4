"""Folders of ours in directories of all, where strangers plant things, and folders of a group."""

from __future__ import annotations

# A child that has become another user cannot import it where Python lies in a closed home.
import _strptime  # noqa: F401
import dataclasses
import errno
import os
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.limits import JOB_SECONDS
from helpers.strangers import STRANGER, directory_of_all, require_root, stranger_does

from hpctrain.checkpoint.lease import Lease
from hpctrain.data import Writer, open_dataset
from hpctrain.data.staging.copies import StageFolder, copy_whole, sweep
from hpctrain.data.staging.node_cache import _open_own
from hpctrain.data.staging.plan import Copy, Disk, look_at, plan_copies
from hpctrain.errors import CheckpointError, ExitCode
from hpctrain.launch.watchdog.evidence import write_report, write_stacks
from hpctrain.training.rank_zero import RunFolder
from hpctrain.utils import files
from hpctrain.utils.files import AppendedFile
from hpctrain.utils.permissions import (
    explained,
    follow_folder,
    is_open_to_group,
    new_private_folder,
    open_to_group,
    require_stable,
)

ROOT = Path(__file__).parents[3]
OURS = f"hpctrain-{os.geteuid()}"


@pytest.fixture
def disk() -> Iterator[Path]:
    with directory_of_all() as place:
        yield place


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What a link might lead to: folders beside files that look like locks of ours."""
    folder = tmp_path / "project"
    for name in ("key", "uv"):
        (folder / name).mkdir(parents=True)
        (folder / name / "thesis.tex").touch()
        (folder / f"{name}.lock").touch()
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    with Writer(tmp_path / "shared") as writer:
        writer.extend({"x": np.arange(8)})
    (only,) = plan_copies([open_dataset(str(tmp_path / "shared"))])
    return only


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "plant",
    [
        "ln -s PROJECT NAME",
        "ln -s nothing NAME",
        "mkdir NAME",
        "mkdir NAME; ln -s PROJECT/key NAME/key; touch NAME/key.lock",
        "mkdir -p NAME/key; ln -s PROJECT/uv NAME/key/uv; touch NAME/key.lock",
        "touch NAME",
        "mkfifo NAME",
        "mkdir NAME; mkfifo NAME/key.lock",
    ],
)
def test_what_a_stranger_has_planted(disk: Path, project: Path, plant: str) -> None:
    before = files_in(project)
    stranger_does(plant.replace("NAME", OURS).replace("PROJECT", str(project)), where=disk)
    planted = files_in(disk)
    sweep(str(disk))
    with pytest.raises(PermissionError, match="not this user's own"):
        StageFolder(str(disk), "key").join()
    assert files_in(project) == before
    assert files_in(disk) == planted


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o2775])
@pytest.mark.parametrize("above", [False, True])
def test_directories_where_others_may_rename(disk: Path, mode: int, above: bool) -> None:
    """Without the sticky bit a folder of ours can be exchanged at any time."""
    place = disk / "a" / "b"
    place.mkdir(parents=True)
    (place.parent if above else place).chmod(mode)
    looked = look_at(str(place), "data.stage_directory")
    assert "others can exchange what is in" in str(looked)
    with pytest.raises(PermissionError, match="without the sticky bit"):
        StageFolder(str(place), "key").join()
    assert not list(place.iterdir())
    (place.parent if above else place).chmod(mode | 0o1000)
    assert isinstance(look_at(str(place), "data.stage_directory"), Disk)


def test_directories_of_a_stranger(disk: Path) -> None:
    stranger_does("mkdir -p theirs/deep", where=disk)
    assert f"belongs to user {STRANGER}" in str(look_at(str(disk / "theirs" / "deep"), ""))
    (disk / "link").symlink_to(disk / "theirs" / "deep")
    with pytest.raises(PermissionError, match="theirs"):
        new_private_folder("x-", disk / "link")


def test_a_folder_that_was_laid_open_is_not_trusted(disk: Path) -> None:
    folder = StageFolder(str(disk), "key")
    folder.join()
    folder.path.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="its mode is 0777"):
        StageFolder(str(disk), "key").join()
    folder.path.parent.chmod(0o755)  # others could see, and do nothing
    StageFolder(str(disk), "key").join()
    assert folder.path.parent.stat().st_mode & 0o777 == 0o700
    folder.leave()


def test_a_folder_exchanged_while_it_is_held(disk: Path, project: Path, copy: Copy) -> None:
    """By another job of this user, say; what is done goes by the descriptor, or not at all."""
    before = files_in(project)
    folder = StageFolder(str(disk), "key")
    folder.join()
    (disk / OURS).rename(disk / "aside")
    (disk / OURS).symlink_to(project)
    assert copy_whole(copy, folder, lambda: False)
    assert (disk / "aside" / "key" / copy.name).stat().st_size == copy.size
    folder.leave()
    sweep(str(disk))
    assert files_in(project) == before


def test_only_names_of_ours_are_removed(disk: Path, copy: Copy) -> None:
    folder = StageFolder(str(disk), "key")
    folder.join()
    assert copy_whole(copy, folder, lambda: False)
    (folder.path / "thesis.tex").touch()
    (folder.path / f".left-{copy.name}").symlink_to(folder.path / "thesis.tex")
    (folder.path.parent / "notes.txt").touch()
    folder.leave()
    sweep(str(disk))
    assert files_in(disk) == {
        OURS,
        f"{OURS}/key",
        f"{OURS}/key.lock",
        f"{OURS}/key/thesis.tex",
        f"{OURS}/notes.txt",
    }


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_lock_that_is_none(disk: Path, tmp_path: Path, kind: str) -> None:
    (disk / OURS).mkdir(mode=0o700)
    lock = disk / OURS / "key.lock"
    if kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(tmp_path / "made")
    with pytest.raises(OSError, match=r"is a link|is not a regular file"):
        StageFolder(str(disk), "key").join()
    assert not (tmp_path / "made").exists()


def test_no_checksum_of_an_index_leads_elsewhere(tmp_path: Path) -> None:
    with Writer(tmp_path / "shared") as writer:
        writer.extend({"x": np.arange(8)})
    dataset = open_dataset(str(tmp_path / "shared"))
    for checksum in ("../../../evil", "/evil", "a/b", "", ".", "0" * 17):
        shard = dataclasses.replace(dataset.shards[0], checksum=checksum or None)
        for plan in plan_copies([dataclasses.replace(dataset, shards=(shard,))]):
            assert "/" not in plan.name


def test_a_source_that_has_become_a_pipe_is_not_waited_for(disk: Path, copy: Copy) -> None:
    Path(copy.source).unlink()
    os.mkfifo(copy.source)
    folder = StageFolder(str(disk), "key")
    folder.join()
    with pytest.raises(OSError, match="is not a regular file"):
        copy_whole(copy, folder, lambda: False)
    assert not list(folder.path.iterdir())
    folder.leave()


@pytest.mark.parametrize("plant", ["touch NAME", "ln -s PROJECT/uv.lock NAME", "mkfifo NAME"])
def test_memory_of_a_stranger_is_not_shared(disk: Path, project: Path, plant: str) -> None:
    stranger_does(plant.replace("NAME", "memory").replace("PROJECT", str(project)), where=disk)
    with pytest.raises(OSError, match=r"somebody else|is a link|is not a regular file"):
        _open_own(str(disk / "memory"))
    (disk / "memory").unlink()
    os.close(os.open(disk / "memory", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    os.close(_open_own(str(disk / "memory")))


def test_new_folders_have_names_that_nobody_knows(disk: Path) -> None:
    made = [new_private_folder("x-", disk) for _ in range(2)]
    assert made[0] != made[1]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o700] * 2


def test_a_container_shows_another_owner_of_what_is_roots() -> None:
    """In a user namespace nobody stands for root outside; /tmp is to be of use all the same."""
    require_root()
    code = (
        "import ctypes, os, sys; from hpctrain.utils.permissions import require_stable;"
        "require_stable('/');"
        f"os.setresuid({STRANGER}, {STRANGER}, {STRANGER});"
        "ctypes.CDLL(None).unshare(0x10000000) and sys.exit('no namespaces');"
        "assert os.stat('/tmp').st_uid == 65534; require_stable('/tmp')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    if "no namespaces" in ended.stderr:
        pytest.skip("no user namespaces here")
    assert ended.returncode == 0, ended.stderr


def test_usual_places_are_of_use() -> None:
    assert require_stable("/tmp") == Path("/tmp").resolve()


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
    with pytest.raises(OSError, match="is a link"):
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
