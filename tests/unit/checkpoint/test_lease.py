"""One job at a time in a run folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from hpctrain.checkpoint import lease as lease_module
from hpctrain.checkpoint.lease import NAME, Lease, claim_path, holder_lives
from hpctrain.errors import CheckpointError

ROOT = Path(__file__).parents[3]


def tamper(folder: Path, **values: object) -> None:
    content = json.loads((folder / NAME).read_bytes())
    (folder / NAME).write_text(json.dumps(content | values), encoding="utf-8")


def test_a_second_job_is_refused_by_name(tmp_path: Path) -> None:
    holder = rf"job 77, process {os.getpid()} on .* since"
    with Lease(tmp_path, {"SLURM_JOB_ID": "77"}), pytest.raises(CheckpointError, match=holder):
        Lease(tmp_path, {}).__enter__()
    assert not (tmp_path / NAME).exists()
    with Lease(tmp_path, {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_dead_job_on_this_host_is_followed_at_once(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from hpctrain.checkpoint.lease import Lease;"
        "Lease(Path(sys.argv[1])).__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert (tmp_path / NAME).exists()
    with Lease(tmp_path, {}) as lease:
        lease.confirm()


def test_a_process_id_that_is_used_again_is_not_the_old_job(tmp_path: Path) -> None:
    with Lease(tmp_path, {}) as first:
        tamper(tmp_path, started="1")
        with Lease(tmp_path, {}) as second:
            second.confirm()
            with pytest.raises(CheckpointError, match="another job has taken over"):
                first.confirm()


def test_another_host_counts_as_alive_until_its_lease_is_old(tmp_path: Path) -> None:
    with Lease(tmp_path, {}):
        tamper(tmp_path, host="elsewhere", boot="another", pid=1)
        with pytest.raises(CheckpointError, match="process 1 on elsewhere"):
            Lease(tmp_path, {}).__enter__()
        old = (tmp_path / NAME).stat().st_mtime - 91
        os.utime(tmp_path / NAME, (old, old))
        with Lease(tmp_path, {}) as lease:
            lease.confirm()


@pytest.mark.parametrize(("restart", "allowed"), [("1", False), ("2", True)])
def test_the_same_job_started_again_takes_over(tmp_path: Path, restart: str, allowed: bool) -> None:
    def job(count: str) -> dict[str, str]:
        return {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": count}

    with Lease(tmp_path, job("1")):
        tamper(tmp_path, host="elsewhere")
        again = Lease(tmp_path, job(restart))
        if allowed:
            with again:
                again.confirm()
        else:
            with pytest.raises(CheckpointError):
                again.__enter__()


def test_of_many_jobs_one_takes_a_stale_lease(tmp_path: Path) -> None:
    with Lease(tmp_path, {}):
        tamper(tmp_path, started="1")
        leases, barrier, refused = [], threading.Barrier(8), []

        def take() -> None:
            lease = Lease(tmp_path, {})
            barrier.wait()
            try:
                lease.__enter__()
                leases.append(lease)
            except CheckpointError as error:
                refused.append(error)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        holders = 0
        for lease in leases:
            try:
                lease.confirm()
                holders += 1
            except CheckpointError:
                pass
            lease.__exit__(None, None, None)
        assert holders == 1
        assert len(leases) + len(refused) == 8


def test_it_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.01)
    with Lease(tmp_path, {}):
        path = tmp_path / NAME
        os.utime(path, (0, 0))
        for _ in range(500):
            if path.stat().st_mtime > 0:
                break
            threading.Event().wait(0.01)
        assert path.stat().st_mtime > 0


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write to"):
        Lease(tmp_path / "missing", {}).__enter__()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE])
@pytest.mark.parametrize("call", ["fsync", "link"])
def test_what_the_file_system_refuses_leaves_no_lease_of_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refused)
        told = f"cannot write to {tmp_path}: {os.strerror(number)}"
        with pytest.raises(CheckpointError, match=re.escape(told)) as caught, Lease(tmp_path):
            pass
        assert caught.value.exit_code == 74
    assert not list(tmp_path.iterdir())
    with Lease(tmp_path) as lease:
        lease.confirm()


def in_child(work: Callable[[], object]) -> int:
    """Do something in a process that dies right after it, and leaves no word."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return child


def dies_before_replacing(lease: Lease) -> None:
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    lease.__enter__()


def test_a_chain_of_takers_that_died_midway_locks_nobody_out(tmp_path: Path) -> None:
    """Each has won the right to replace the one before, and was killed before it did."""
    in_child(lambda: Lease(tmp_path, {}).__enter__())
    first = (tmp_path / NAME).read_bytes()
    for _ in range(3):
        in_child(lambda: dies_before_replacing(Lease(tmp_path, {})))
    assert (tmp_path / NAME).read_bytes() == first
    assert len(list(tmp_path.glob(f".{NAME}.????????????????"))) == 3
    assert holder_lives(tmp_path) is False
    with Lease(tmp_path, {}) as lease:
        lease.confirm()
        assert holder_lives(tmp_path) is True
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    with Lease(tmp_path, {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_taker_midway_that_lives_is_the_holder(tmp_path: Path) -> None:
    with Lease(tmp_path / "..", {}) as elsewhere:
        in_child(lambda: Lease(tmp_path, {}).__enter__())
        dead = json.loads((tmp_path / NAME).read_bytes())
        taker = json.loads((tmp_path / ".." / NAME).read_bytes())
        claim_path(tmp_path, dead["nonce"]).write_text(json.dumps(taker), encoding="utf-8")
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} on"):
            Lease(tmp_path, {}).__enter__()
        elsewhere.confirm()
    assert holder_lives(tmp_path) is True


@pytest.mark.parametrize("torn", [0, 20])
def test_a_kill_in_the_creation_locks_nobody_out_where_there_are_no_links(
    tmp_path: Path, torn: int
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def killed_while_it_writes() -> None:
        os.link = no_link  # type: ignore[assignment]
        synced = 0

        def fsync(_: int) -> None:
            nonlocal synced
            synced += 1
            if synced == 2:
                os.truncate(tmp_path / NAME, torn)
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync  # type: ignore[assignment]
        Lease(tmp_path, {}).__enter__()

    in_child(killed_while_it_writes)
    assert (tmp_path / NAME).stat().st_size == torn
    with Lease(tmp_path, {}) as lease:
        lease.confirm()


def test_a_damaged_lease_whose_maker_is_unknown_counts_by_its_age(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"nonce": 7}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"lease\.json is damaged: nonce"):
        Lease(tmp_path, {}).__enter__()
    old = time.time() - 91
    os.utime(tmp_path / NAME, (old, old))
    with Lease(tmp_path, {}) as lease:
        lease.confirm()


@pytest.mark.parametrize("beats", [False, True])
def test_a_heartbeat_in_the_future_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beats: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """By a clock that goes ahead a dead job would hold for ever, and a live one beats on."""
    monkeypatch.setattr(lease_module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(lease_module, "_WATCH_SECONDS", 0.5 if not beats else 300.0)
    with Lease(tmp_path, {}) as holder:
        tamper(tmp_path, host="elsewhere")
        os.utime(tmp_path / NAME, (time.time() + 3600,) * 2)
        outcome: list[object] = []

        def take() -> None:
            try:
                Lease(tmp_path, {}).__enter__()
                outcome.append("taken")
            except CheckpointError as error:
                outcome.append(error)

        taker = threading.Thread(target=take)
        taker.start()
        number = 0
        while taker.is_alive():
            if beats and caplog.records:
                number += 1
                os.utime(tmp_path / NAME, (time.time() + 3600 + number,) * 2)
            taker.join(0.02)
        if beats:
            assert "another job trains in" in str(outcome[0])
            holder.confirm()
        else:
            assert outcome == ["taken"]
            with pytest.raises(CheckpointError, match="another job has taken over"):
                holder.confirm()
    assert "watching for up to" in caplog.text


def test_a_job_that_was_stopped_and_taken_over_stops_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one has claimed the lease, and not replaced it yet."""
    monkeypatch.setattr(lease_module, "_TRIES", 3)
    with Lease(tmp_path, {}) as stopped:
        taker = json.loads((tmp_path / NAME).read_bytes())
        claim = claim_path(tmp_path, taker["nonce"])
        claim.write_text(json.dumps(taker | {"nonce": "f00d", "pid": 7}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"has taken over .*process 7 on"):
            stopped.confirm()
        claim.unlink()  # it has drawn back
        stopped.confirm()


def test_a_lease_that_cannot_be_renewed_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = threading.Event()
    calls = 0

    def stale(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            failed.set()
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(os, "utime", stale)
    with caplog.at_level(logging.WARNING, "hpctrain"), Lease(tmp_path, {}):
        assert failed.wait(300)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == (
        f"the lease on {tmp_path} cannot be renewed: Stale file handle. If that lasts, another "
        "job may take the folder over after 90 s, and this one then ends"
    )


def test_a_lost_job_does_not_keep_the_lease_of_the_next_alive(tmp_path: Path) -> None:
    with Lease(tmp_path, {}) as lost:
        tamper(tmp_path, nonce="another")
        os.utime(tmp_path / NAME, (1, 1))
        lost._beat()
        assert (tmp_path / NAME).stat().st_mtime == 1
    assert (tmp_path / NAME).exists()


def race(folder: Path, *options: str) -> None:
    """Run the short form of benchmarks/lease.py in a folder."""
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "lease.py"), "3", "--seed", "7"),
            *("--folder", str(folder), *options),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 times two inside" in result.stdout


@pytest.mark.parametrize("options", [(), ("--no-links",)])
def test_races_of_takers_that_are_killed_anywhere(tmp_path: Path, options: Sequence[str]) -> None:
    race(tmp_path, *options)


@pytest.fixture
def exfat(tmp_path: Path) -> Iterator[Path]:
    """A file system that has no hard links."""
    tools = ("mkfs.exfat", "mount.exfat-fuse", "losetup")
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in tools):
        pytest.skip("mounting exFAT needs root, exfatprogs and exfat-fuse")
    image, mount = tmp_path / "image", tmp_path / "mount"
    with image.open("wb") as file:
        file.truncate(32 * 2**20)
    mount.mkdir()
    device = ""
    try:
        subprocess.run(["mkfs.exfat", str(image)], check=True, capture_output=True)
        attach = ["losetup", "--find", "--show", str(image)]
        device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
        subprocess.run(["mount.exfat-fuse", device, str(mount)], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        if device:
            subprocess.run(["losetup", "--detach", device], check=False)
        pytest.skip(f"exFAT cannot be mounted here: {error.stderr}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
        subprocess.run(["losetup", "--detach", device], check=False)


def test_races_where_there_are_no_links(exfat: Path) -> None:
    (exfat / "file").touch()
    with pytest.raises(PermissionError):
        os.link(exfat / "file", exfat / "link")
    race(exfat)
