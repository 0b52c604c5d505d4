"""One job at a time in a run folder: a lease that is renewed, and lost where its owner is gone.

A file that is created whole, by a link or by O_EXCL, holds on every shared file system; flock may
be absent on Lustre, or hold on one node only.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from hpctrain.checkpoint.lease_chain import (
    NAME,
    Found,
    claim_path,
    end_of_chain,
    lease_path,
    now_of,
    read_found,
    sweep,
)
from hpctrain.checkpoint.lease_holder import this_holder
from hpctrain.checkpoint.lease_judging import RENEW_SECONDS, STALE_SECONDS, Verdict, judge
from hpctrain.errors import CheckpointError
from hpctrain.utils.files import create_file, publish, sync, temporary_name
from hpctrain.utils.permissions import explained

__all__ = ["NAME", "RENEW_SECONDS", "Lease", "holder_lives"]

logger = logging.getLogger("hpctrain")

_TRIES = 50
_LOOKS_AT_DAMAGE = 3
_TRY_AGAIN_SECONDS = 0.05
_WATCH_SECONDS = STALE_SECONDS
_LOOK_SECONDS = 1.0
_ASK_SECONDS = 5.0
_OVERDUE_SECONDS = 2 * RENEW_SECONDS

JobIsGone = Callable[[str, str], bool | None]
"""Whether a scheduler's job is gone, by its id and cluster; None: that cannot be told."""


class Lease:
    """The right to write to a run folder; a context manager, for rank 0.

    Args:
        folder: the run folder; it has to be there.
        environ: where the scheduler's job id is looked up.
        job_is_gone: asks the scheduler about another job.
    """

    def __init__(
        self,
        folder: Path,
        environ: Mapping[str, str] = os.environ,
        job_is_gone: JobIsGone = lambda _job, _cluster: None,
    ) -> None:
        self._path = lease_path(folder)
        self._folder = folder
        self._environ = environ
        self._job_is_gone = job_is_gone
        self._name_anew()
        self._claims: list[Path] = []
        self._last_beat = 0.0
        self._complained = False
        self._released = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="hpctrain-lease", daemon=True)

    def __enter__(self) -> Lease:
        """Take the lease.

        Raises:
            CheckpointError: if another job holds it.
        """
        try:
            self._acquire()
        except OSError as error:
            problem = explained(error, self._folder)
            raise CheckpointError(f"cannot write to {self._folder}: {problem}") from error
        self._last_beat = time.monotonic()
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
        with suppress(OSError):
            self._retire(self._path)
            for claim in self._claims:
                claim.unlink(missing_ok=True)

    def confirm(self) -> None:
        """Make sure that the lease is still this job's.

        Raises:
            CheckpointError: if another job has taken it over.
        """
        if time.monotonic() - self._last_beat > _OVERDUE_SECONDS:
            # This process was stopped, and may look dead to others. They claim, then look for a
            # heartbeat; this one beats, then looks for claims: of two at once one sees the other.
            self._beat()
        try:
            for _ in range(_TRIES):
                found = end_of_chain(self._folder)
                if self._is_mine(found):
                    return
                if not self._is_mine(read_found(self._path)):
                    break
                time.sleep(_TRY_AGAIN_SECONDS)  # who has claimed it may draw back
        except OSError as error:
            problem = explained(error, self._path)
            raise CheckpointError(f"{self._path} cannot be read: {problem}") from error
        who = "" if found is None or found.damage else f" ({found.holder})"
        raise CheckpointError(
            f"another job has taken over {self._folder}{who}: this one stops writing"
        )

    def _name_anew(self) -> None:
        """Take another nonce: files that somebody else goes on from may hold the one before."""
        self._owner = this_holder(self._environ)
        self._content = json.dumps(asdict(self._owner)).encode()

    def _holds(self) -> bool:
        return self._is_mine(end_of_chain(self._folder))

    def _is_mine(self, found: Found | None) -> bool:
        return found is not None and found.nonce == self._owner.nonce

    def _acquire(self) -> None:
        for number in range(_TRIES):
            if create_file(self._path, self._content):
                if self._holds():
                    sweep(self._folder, STALE_SECONDS)
                    return
                continue
            found = end_of_chain(self._folder, patient=True)
            if found is None:
                continue
            verdict = self._judge(found)
            if verdict is Verdict.WATCH:
                verdict = self._watch(found)
            # Whoever is about to write a file looks like one of those who may have torn it.
            if verdict is Verdict.HOLDS and (not found.damage or number >= _LOOKS_AT_DAMAGE):
                raise self._refused(found)
            if verdict is Verdict.STALE and self._take_over(found):
                sweep(self._folder, STALE_SECONDS)
                return
            time.sleep(_TRY_AGAIN_SECONDS)
        raise CheckpointError(f"another job acquired the lease on {self._folder} at the same time")

    def _judge(self, found: Found) -> Verdict:
        holder = found.holder
        return judge(
            holder,
            self._owner,
            age=self._age(found),
            lives=found.lives(),
            job_is_gone=lambda: (
                self._job_is_gone(holder.job, holder.cluster) if holder.job is not None else None
            ),
        )

    def _age(self, found: Found) -> float:
        return now_of(self._folder) - found.beat / 1e9

    def _watch(self, found: Found) -> Verdict:
        """Return whether a heartbeat stands still, by the clock of this process alone."""
        logger.warning(
            "the lease on %s (%s) may be of a job that is gone: watching for up to %g s whether it "
            "is renewed",
            self._folder,
            found.holder,
            _WATCH_SECONDS,
        )
        began = asked = time.monotonic()
        while (now := time.monotonic()) - began < _WATCH_SECONDS:
            time.sleep(_LOOK_SECONDS)
            latest = end_of_chain(self._folder)
            if latest is None or latest.nonce != found.nonce:
                return Verdict.WATCH  # another one by now: judged anew
            if latest.beat != found.beat:
                return Verdict.HOLDS
            if now - asked > _ASK_SECONDS:
                asked = now
                if self._judge(latest) is Verdict.STALE:
                    break
        return Verdict.STALE

    def _take_over(self, found: Found) -> bool:
        """Replace a holder that was judged stale; of several that do so one succeeds."""
        claim = claim_path(self._folder, found.nonce)
        temporary = temporary_name(self._path)
        claims = wins = False
        try:
            temporary.write_bytes(self._content)
            sync(temporary)
            claims = create_file(claim, self._content)
            # It counts only where it is part of the chain, and the holder has not woken up.
            if claims and read_found(found.path) == found and self._holds():
                publish(temporary, self._path)
                # Where this job was stopped on the way, others may have judged it in turn.
                wins = self._holds()
            return wins
        finally:
            temporary.unlink(missing_ok=True)
            if wins:
                self._claims.append(claim)
            elif claims:
                self._retire(claim)
                self._name_anew()

    def _retire(self, path: Path) -> None:
        """Remove a file that names this job, unless another one has claimed its place by now.

        A claim of its own keeps the others from doing so meanwhile.
        """
        seal = claim_path(self._folder, self._owner.nonce)
        if not create_file(seal, json.dumps(asdict(this_holder(self._environ))).encode()):
            return
        try:
            if self._is_mine(read_found(path)):
                path.unlink()
        finally:
            seal.unlink()

    def _refused(self, found: Found) -> CheckpointError:
        age = max(0.0, self._age(found))
        who = (
            f" ({found.path} is damaged: {found.damage})" if found.damage else f" ({found.holder})"
        )
        return CheckpointError(
            f"another job trains in {self._folder}{who}, last heartbeat {age:.0f} s ago. Wait for "
            "it, end it, or choose another run.name"
        )

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            self._beat()

    def _beat(self) -> None:
        try:
            # Another job's lease is not to be kept alive.
            if self._is_mine(read_found(self._path)):
                os.utime(self._path)
                self._last_beat = time.monotonic()
                self._complained = False
        except OSError as error:
            if not self._complained:
                self._complained = True
                logger.warning(
                    "the lease on %s cannot be renewed: %s. If that lasts, another job may take "
                    "the folder over after %g s, and this one then ends",
                    self._folder,
                    error.strerror,
                    STALE_SECONDS,
                )


def holder_lives(folder: Path) -> bool | None:
    """Tell whether the process that holds the lease on a folder lives.

    None where nobody holds it, or that cannot be told from here: it is on another host, or in a
    container with process ids of its own.
    """
    try:
        found = end_of_chain(folder)
    except OSError:
        return None
    return None if found is None else found.lives()
