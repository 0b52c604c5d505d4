"""One job at a time in a run folder."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpctrain.checkpoint import lease as lease_module
from hpctrain.checkpoint.lease import NAME, Lease
from hpctrain.errors import CheckpointError


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


def test_a_full_disk_leaves_no_lease_of_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hpctrain.checkpoint.lease.os.fsync", full)
        with pytest.raises(CheckpointError, match="No space left"), Lease(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
    with Lease(tmp_path) as lease:
        lease.confirm()
