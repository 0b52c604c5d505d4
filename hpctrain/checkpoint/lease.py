"""One job at a time in a run folder: a lease that is renewed, and lost where its owner is gone.

A file that is created whole, by a link or by O_EXCL, holds on every shared file system; flock may
be absent on Lustre, or hold on one node only.

`lease.json` names a holder. Whoever judges that one gone, by `hpctrain.checkpoint.lease_rules`,
creates, exclusively, a claim: a file named after the holder's nonce, which names the new one. So
there is a chain, from lease.json by way of claims, and its end is who holds the lease, at every
moment and whoever was killed at which. Only the end of the chain replaces or removes lease.json,
which makes the chain short again.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

from hpctrain.checkpoint.lease_rules import (
    RENEW_SECONDS,
    STALE_SECONDS,
    Holder,
    Verdict,
    began_together,
    judge,
    lives_here,
    this_holder,
)
from hpctrain.errors import CheckpointError
from hpctrain.utils.files import create_file, publish, sync, temporary_name
from hpctrain.utils.json_files import SMALL, parse_checked
from hpctrain.utils.permissions import explained

logger = logging.getLogger("hpctrain")

NAME = "lease.json"

_TRIES = 50
_LOOKS_AT_DAMAGE = 3
_TRY_AGAIN_SECONDS = 0.05
_WATCH_SECONDS = STALE_SECONDS
_LOOK_SECONDS = 1.0
_ASK_SECONDS = 5.0
_OVERDUE_SECONDS = 2 * RENEW_SECONDS
_READS_AGAIN = 4
_READ_AGAIN_SECONDS = 0.1
_LONGEST_CHAIN = 1000
_MADE_TOGETHER_SECONDS = 5.0

JobIsGone = Callable[[str, str, str], bool | None]
"""Whether a scheduler's job is gone, by its id, cluster and host; None: that is not known."""


class Lease:
    """The right to write to a run folder; a context manager, for rank 0.

    Args:
        folder: the run folder; it has to be there.
        environ: variables that name the scheduler's job.
        job_is_gone: question to the scheduler about another job.
    """

    def __init__(
        self,
        folder: Path,
        environ: Mapping[str, str] = os.environ,
        job_is_gone: JobIsGone = lambda _job, _cluster, _host: None,
    ) -> None:
        self._path = _lease_path(folder)
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
                found = _end_of_chain(self._folder)
                if self._is_mine(found):
                    return
                if not self._is_mine(_read_found(self._path)):
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
        return self._is_mine(_end_of_chain(self._folder))

    def _is_mine(self, found: _Found | None) -> bool:
        return found is not None and found.nonce == self._owner.nonce

    def _acquire(self) -> None:
        for number in range(_TRIES):
            if create_file(self._path, self._content):
                if self._holds():
                    _sweep(self._folder, STALE_SECONDS)
                    return
                continue
            found = _end_of_chain(self._folder, patient=True)
            if found is None:
                continue
            verdict = self._judge(found)
            if verdict is Verdict.WATCH:
                verdict = self._watch(found)
            # Whoever is about to write a file looks like one of those who may have torn it.
            if verdict is Verdict.HOLDS and (not found.damage or number >= _LOOKS_AT_DAMAGE):
                raise self._refused(found)
            if verdict is Verdict.STALE and self._take_over(found):
                _sweep(self._folder, STALE_SECONDS)
                return
            time.sleep(_TRY_AGAIN_SECONDS)
        raise CheckpointError(f"another job acquired the lease on {self._folder} at the same time")

    def _judge(self, found: _Found) -> Verdict:
        holder = found.holder
        return judge(
            holder,
            self._owner,
            age=self._age(found),
            lives=found.lives(),
            job_is_gone=lambda: (
                None
                if holder.job is None
                else self._job_is_gone(holder.job, holder.cluster, holder.host)
            ),
        )

    def _age(self, found: _Found) -> float:
        return _now_of(self._folder) - found.beat / 1e9

    def _watch(self, found: _Found) -> Verdict:
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
            latest = _end_of_chain(self._folder)
            if latest is None or latest.nonce != found.nonce:
                return Verdict.WATCH  # another one by now: judged anew
            if latest.beat != found.beat:
                return Verdict.HOLDS
            if now - asked > _ASK_SECONDS:
                asked = now
                if self._judge(latest) is Verdict.STALE:
                    break
        return Verdict.STALE

    def _take_over(self, found: _Found) -> bool:
        """Replace a holder that was judged stale; of several that do so one succeeds."""
        claim = claim_path(self._folder, found.nonce)
        temporary = temporary_name(self._path)
        claims = wins = False
        try:
            temporary.write_bytes(self._content)
            sync(temporary)
            claims = create_file(claim, self._content)
            # It counts only where it is part of the chain, and the holder has not woken up.
            if claims and _read_found(found.path) == found and self._holds():
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
            if self._is_mine(_read_found(path)):
                path.unlink()
        finally:
            seal.unlink()

    def _refused(self, found: _Found) -> CheckpointError:
        age = max(0.0, self._age(found))
        who = (
            f" ({found.path} is damaged: {found.damage})" if found.damage else f" ({found.holder})"
        )
        loop = began_together(found.holder, self._owner) and not found.damage
        return CheckpointError(
            f"another job trains in {self._folder}{who}, last heartbeat {age:.0f} s ago. Wait for "
            "it, end it, or choose another run.name"
            + (
                ". Were the two meant for one run? Its processes are started by one launcher, such "
                "as mpirun -np 2, and not one by one"
                if loop
                else ""
            )
        )

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            self._beat()

    def _beat(self) -> None:
        try:
            # Another job's lease is not to be kept alive.
            if self._is_mine(_read_found(self._path)):
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

    None where nobody holds it, or that is not known from here: it is on another host, or in a
    container with process ids of its own.
    """
    try:
        found = _end_of_chain(folder)
    except OSError:
        return None
    return None if found is None else found.lives()


@dataclass(frozen=True, slots=True)
class _Found:
    """A holder as a file names it.

    Attributes:
        beat: time of the last renewal, by the clock of the file system, in nanoseconds.
        damage: fault of the file, whose holder then has no more than a nonce; empty: none.
        makers: holders that may have been killed while they wrote a damaged file.
    """

    holder: Holder
    path: Path
    beat: int
    damage: str = ""
    makers: tuple[Holder, ...] = field(default=(), compare=False)

    @property
    def nonce(self) -> str:
        return self.holder.nonce

    def lives(self) -> bool | None:
        """Tell whether the holder's process lives; None if that cannot be determined from here."""
        if not self.damage:
            return lives_here(self.holder)
        gone = [lives_here(maker) is False for maker in self.makers]
        return False if gone and all(gone) else None


def _lease_path(folder: Path) -> Path:
    """Return the file that the chain of a folder begins with."""
    return folder / NAME


def claim_path(folder: Path, nonce: str) -> Path:
    """Return the file whose creation is the right to replace the holder of a nonce."""
    return folder / f".{NAME}.{nonce}"


def _end_of_chain(folder: Path, *, patient: bool = False) -> _Found | None:
    """Return who holds the lease on a folder, None if nobody does.

    Args:
        folder: the run folder.
        patient: wait a moment for a file that may be about to be written.

    Raises:
        OSError: if a file of the chain cannot be read.
    """
    found = _read_found(_lease_path(folder), patient=patient)
    for _ in range(_LONGEST_CHAIN):
        claim = None if found is None else claim_path(folder, found.nonce)
        following = None if claim is None else _read_found(claim, patient=patient)
        if following is None:
            break
        found = following
    return found


def _read_found(path: Path, *, patient: bool = False) -> _Found | None:
    """Return the holder that a file names, None if there is no such file.

    Raises:
        OSError: if it cannot be read.
    """
    found = _read_once(path)
    for _ in range(_READS_AGAIN if patient else 0):
        if found is None or not found.damage:
            break
        time.sleep(_READ_AGAIN_SECONDS)
        found = _read_once(path)
    return found


def _read_once(path: Path) -> _Found | None:
    try:
        # A pipe of this name would keep a reader waiting.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        content = b""
        try:
            if not stat.S_ISREG(facts.st_mode):
                raise ValueError("it is not a regular file")
            content = file.read(SMALL)
            return _Found(parse_checked(content, Holder), path, facts.st_mtime_ns)
        except ValueError as error:
            # Named after the file as it is now, so that nobody replaces one that is whole by then.
            nonce = f"damaged{facts.st_ino:x}m{facts.st_mtime_ns:x}"
            makers = tuple(_makers(path, content, facts.st_mtime))
            return _Found(Holder(nonce=nonce), path, facts.st_mtime_ns, str(error), makers)


def _makers(path: Path, torn: bytes, made: float) -> Iterator[Holder]:
    """Yield whose file this would have become: what they were about to write lies beside it.

    Where a file system has no links a file is not whole for a moment, and a kill then leaves it.
    """
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError, ValueError):
            content = temporary.read_bytes()
            if (
                content.startswith(torn)
                and abs(temporary.stat().st_mtime - made) < _MADE_TOGETHER_SECONDS
            ):
                yield parse_checked(content, Holder)


def _now_of(folder: Path) -> float:
    """Return the time by the clock of a folder's file system, in seconds.

    Raises:
        OSError: if nothing can be written there.
    """
    probe = temporary_name(_lease_path(folder))
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _sweep(folder: Path, older_than_seconds: float) -> None:
    """Remove what killed jobs have left: claims that no chain leads to, files half written."""
    with suppress(OSError):
        attached: set[Path] = set()
        found = _read_found(_lease_path(folder))
        while found is not None and len(attached) < _LONGEST_CHAIN:
            attached.add(claim_path(folder, found.nonce))
            found = _read_found(claim_path(folder, found.nonce))
        left = [*folder.glob(f".{NAME}.*"), *folder.glob(f"..{NAME}.*.tmp")]
        left = [path for path in left if path not in attached]
        if not left:
            return
        limit = _now_of(folder) - older_than_seconds
        for path in left:
            with suppress(OSError):
                if path.lstat().st_mtime < limit:
                    path.unlink()
