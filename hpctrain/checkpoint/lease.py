"""One job at a time in a run folder: a lease that is renewed, and lost where its owner is gone.

A file that is created whole, by a link or by O_EXCL, holds on every shared file system; flock may
be absent on Lustre, or hold on one node only.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated

from annotated_types import Ge, Predicate

from hpctrain.errors import CheckpointError
from hpctrain.utils import proc
from hpctrain.utils.files import create_file, replace_file, temporary_name
from hpctrain.utils.json_files import read_checked
from hpctrain.utils.text import printable

NAME = "lease.json"
RENEW_SECONDS = 30.0
_STALE_AFTER = 3 * RENEW_SECONDS
_READS = 5

# By scheduler: the job's id, and how often it was started again.
_JOB_VARIABLES = (
    ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    ("LSB_JOBID", ""),
    ("PBS_JOBID", ""),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lease, as its file says.

    Attributes:
        job: id of the scheduler's job, None outside of any.
        restart: how often the scheduler has started it again.
        started: when the process began, see `proc.start_time`.
        boot: of the machine.
        namespace: in which the process id holds; empty if it is not known.
        token: of the job script's chain, and `attempt` the job's number in it.
        nonce: of this lease alone.
        since: for people.
    """

    job: str | None = None
    restart: Annotated[int, Ge(0)] = 0
    host: str = ""
    pid: Annotated[int, Ge(0)] = 0
    started: str | None = None
    boot: str = ""
    namespace: str = ""
    token: str | None = None
    attempt: Annotated[int, Ge(1)] = 1
    nonce: Annotated[str, Predicate(str.isalnum)]
    since: str = ""


_UNKNOWN = Holder(nonce="unknown")
"""Holds a lease whose file is damaged; only its age tells of it."""


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
        self._content = json.dumps(asdict(self._owner)).encode()
        self._claims: list[Path] = []
        self._damage = ""
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
        finally:
            for claim in self._claims:
                with suppress(OSError):
                    claim.unlink()
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
        try:
            holder = self._read()
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be read: {error.strerror}") from error
        if holder is None or holder.nonce != self._owner.nonce:
            raise CheckpointError(
                f"another job has taken over {self._folder}{_who(holder)}: this one stops writing"
            )

    def _create(self) -> bool:
        return create_file(self._path, self._content)

    def _take_over(self) -> None:
        holder = self._read()
        age = self._age()
        if holder is not None and not self._is_stale(holder, age):
            raise CheckpointError(
                f"another job trains in {self._folder}{_who(holder)}, last heartbeat {age:.0f} s "
                f"ago. Wait for it, end it, or choose another run.name{self._damage}"
            )
        if holder is None:
            if self._create():
                return
        elif self._claim(holder):
            # Nobody else replaces this holder; and it is gone, or will notice before it writes.
            replace_file(self._path, self._content)
            return
        raise CheckpointError(f"another job acquired the lease on {self._folder} at the same time")

    def _claim(self, holder: Holder) -> bool:
        """Win the right to replace a holder: of several jobs that judge it gone, one does."""
        for number in itertools.count():
            claim = self._path.with_name(f".{NAME}.{holder.nonce}.{number}")
            if create_file(claim, self._content):
                self._claims.append(claim)
                break
            # Whoever claimed it before may have been killed on the way.
            if self._age(claim) <= _STALE_AFTER:
                return False
        now = self._read()
        return now is not None and now.nonce == holder.nonce

    def _is_stale(self, holder: Holder, age: float) -> bool:
        if age > _STALE_AFTER:
            return True
        lives = _lives_here(holder)
        if lives is not None:
            return not lives
        own = self._owner
        # A job is started again, by the scheduler or by its script, once its processes are gone.
        is_restarted = holder.job is not None and holder.job == own.job
        is_next = holder.token is not None and holder.token == own.token
        return (is_restarted and holder.restart < own.restart) or (
            is_next and holder.attempt < own.attempt
        )

    def _age(self, path: Path | None = None) -> float:
        """Return the seconds since the last heartbeat, by the clock of the file system."""
        probe = temporary_name(self._path)
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        try:
            return now - (path or self._path).stat().st_mtime
        except FileNotFoundError:
            return float("inf")

    def _read(self) -> Holder | None:
        """Return who holds the lease, None if nobody does."""
        for attempt in range(_READS):
            try:
                return read_checked(self._path, Holder)
            except FileNotFoundError:
                return None
            except ValueError as error:  # made, but not written yet; or damaged
                self._damage = f" ({self._path} is damaged: {error})"
                if attempt < _READS - 1:
                    time.sleep(0.1)
        return _UNKNOWN

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            with suppress(OSError):
                os.utime(self._path)


def holder_lives(folder: Path) -> bool | None:
    """Tell whether the process that holds the lease on a folder lives.

    None where nobody holds it, or that cannot be told from here: it is on another host, or in a
    container with process ids of its own.
    """
    try:
        return _lives_here(read_checked(folder / NAME, Holder))
    except (OSError, ValueError):
        return None


def _lives_here(holder: Holder) -> bool | None:
    namespace = proc.pid_namespace()
    here = (socket.gethostname(), proc.boot_id(), namespace)
    # Version 0.1.0 did not note the namespace.
    if (holder.host, holder.boot, holder.namespace or namespace) != here:
        return None
    # A process id is used again; its start time is not.
    started = proc.start_time(holder.pid)
    return started is not None and started == holder.started


def _identity(environ: Mapping[str, str]) -> Holder:
    job, restart = None, "0"
    for job_variable, restart_variable in _JOB_VARIABLES:
        if job_variable in environ:
            job, restart = environ[job_variable], environ.get(restart_variable, "0")
            break
    attempt = environ.get("HPCTRAIN_ATTEMPT", "")
    return Holder(
        token=environ.get("HPCTRAIN_TOKEN") or None,
        attempt=max(1, int(attempt)) if attempt.isdecimal() else 1,
        job=job,
        restart=int(restart) if restart.isdecimal() else 0,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=proc.start_time(os.getpid()),
        boot=proc.boot_id(),
        namespace=proc.pid_namespace(),
        nonce=secrets.token_hex(8),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _who(holder: Holder | None) -> str:
    if holder is None or holder is _UNKNOWN:
        return ""
    job = f"job {holder.job}, " if holder.job else ""
    text = f" ({job}process {holder.pid} on {holder.host} since {holder.since})"
    return printable(text)
