"""One job at a time in a run folder: a lease that is renewed, and lost where its owner is gone.

A file made with O_EXCL holds on every shared file system; flock may be absent on Lustre, or hold on
one node only.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from hpctrain.errors import CheckpointError
from hpctrain.utils import proc

NAME = "lease.json"
RENEW_SECONDS = 30.0
_STALE_AFTER = 3 * RENEW_SECONDS

# By scheduler: the job's id, and how often it was started again.
_JOB_VARIABLES = (
    ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    ("LSB_JOBID", ""),
    ("PBS_JOBID", ""),
)


class Lease:
    """The right to write to a run folder; a context manager, for rank 0.

    Args:
        folder: the run folder; it has to be there.
        environ: where the scheduler's job id is looked up.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
        self._path = folder / NAME
        self._folder = folder
        self._owner = _identity(environ)
        self._released = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="hpctrain-lease", daemon=True)

    def __enter__(self) -> Lease:
        """Take the lease.

        Raises:
            CheckpointError: if another job holds it.
        """
        try:
            if not self._create():
                self._take_over()
        except OSError as error:
            raise CheckpointError(f"cannot write to {self._folder}: {error.strerror}") from error
        self._renewer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._released.set()
        self._renewer.join()
        with suppress(OSError, CheckpointError):
            self.confirm()
            self._path.unlink()

    def confirm(self) -> None:
        """Make sure that the lease is still this job's.

        Raises:
            CheckpointError: if another job has taken it over.
        """
        holder = self._read()
        if holder is None or holder.get("nonce") != self._owner["nonce"]:
            raise CheckpointError(
                f"another job has taken over {self._folder}{_who(holder)}: this one stops writing"
            )

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(self._owner, file)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            # On a full disk an empty lease would keep every job out until it is old.
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _take_over(self) -> None:
        holder = self._read()
        age = self._age()
        if holder is not None and not self._is_stale(holder, age):
            raise CheckpointError(
                f"another job trains in {self._folder}{_who(holder)}, sign of life "
                f"{age:.0f} s ago. Wait for it, end it, or choose another run.name"
            )
        # Renamed, not deleted: of several that try, one finds the file.
        aside = self._path.with_name(f".{NAME}.{self._owner['nonce']}")
        with suppress(FileNotFoundError):
            os.replace(self._path, aside)
        aside.unlink(missing_ok=True)
        if not self._create():
            raise CheckpointError(f"another job was faster to take {self._folder}")

    def _is_stale(self, holder: Mapping[str, Any], age: float) -> bool:
        if age > _STALE_AFTER:
            return True
        if holder.get("host") == self._owner["host"] and holder.get("boot") == self._owner["boot"]:
            return not _alive(holder)
        # A scheduler starts a job again only when its former processes are gone.
        same_job = holder.get("job") is not None and holder.get("job") == self._owner["job"]
        return same_job and int(holder.get("restart", 0)) < int(self._owner["restart"])

    def _age(self) -> float:
        """Return the seconds since the last sign of life, by the clock of the file system."""
        probe = self._path.with_name(f".{NAME}.{self._owner['nonce']}.clock")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        try:
            return now - self._path.stat().st_mtime
        except FileNotFoundError:
            return float("inf")

    def _read(self) -> dict[str, Any] | None:
        for _ in range(5):
            try:
                content: dict[str, Any] = json.loads(self._path.read_bytes())
            except FileNotFoundError:
                return None
            except ValueError:  # made, but not written yet
                time.sleep(0.1)
            else:
                return content
        return {}

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            with suppress(OSError):
                os.utime(self._path)


def _identity(environ: Mapping[str, str]) -> dict[str, Any]:
    job, restart = None, "0"
    for job_variable, restart_variable in _JOB_VARIABLES:
        if job_variable in environ:
            job, restart = environ[job_variable], environ.get(restart_variable, "0")
            break
    return {
        "job": job,
        "restart": int(restart) if restart.isdecimal() else 0,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": proc.start_time(os.getpid()),
        "boot": proc.boot_id(),
        "nonce": secrets.token_hex(8),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _alive(holder: Mapping[str, Any]) -> bool:
    """Tell whether the process of this host that took the lease still runs."""
    started = proc.start_time(int(holder.get("pid", 0)))
    # A process id is used again; its start time is not.
    return started is not None and started == holder.get("started")


def _who(holder: Mapping[str, Any] | None) -> str:
    if not holder:
        return ""
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return (
        f" ({job}process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')})"
    )
