"""The files of a lease: who holds it, and who has won the right to replace whom.

`lease.json` names a holder. Whoever judges that one gone creates, exclusively, a claim: a file
named after the holder's nonce, which names the new one. So there is a chain, from lease.json by way
of claims, and its end is who holds the lease, at every moment and whoever was killed at which. Only
the end of the chain replaces or removes lease.json, which makes the chain short again.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hpctrain.checkpoint.lease_holder import Holder, lives_here
from hpctrain.utils.files import temporary_name
from hpctrain.utils.json_files import SMALL, parse_checked

NAME = "lease.json"

_READS_AGAIN = 4
_READ_AGAIN_SECONDS = 0.1
_LONGEST_CHAIN = 1000
_MADE_TOGETHER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Found:
    """A holder as a file names it.

    Attributes:
        beat: when it was last renewed, by the clock of the file system, in nanoseconds.
        damage: what is wrong with the file; its holder then has no more than a nonce.
        makers: who may have been killed while they wrote a damaged file.
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
        """Tell whether the holder's process lives; None if that cannot be told from here."""
        if not self.damage:
            return lives_here(self.holder)
        gone = [lives_here(maker) is False for maker in self.makers]
        return False if gone and all(gone) else None


def lease_path(folder: Path) -> Path:
    """Return the file that the chain of a folder begins with."""
    return folder / NAME


def claim_path(folder: Path, nonce: str) -> Path:
    """Return the file whose creation is the right to replace the holder of a nonce."""
    return folder / f".{NAME}.{nonce}"


def end_of_chain(folder: Path, *, patient: bool = False) -> Found | None:
    """Return who holds the lease on a folder, None if nobody does.

    Args:
        folder: the run folder.
        patient: wait a moment for a file that may be about to be written.

    Raises:
        OSError: if a file of the chain cannot be read.
    """
    found = read_found(lease_path(folder), patient=patient)
    for _ in range(_LONGEST_CHAIN):
        claim = None if found is None else claim_path(folder, found.nonce)
        following = None if claim is None else read_found(claim, patient=patient)
        if following is None:
            break
        found = following
    return found


def read_found(path: Path, *, patient: bool = False) -> Found | None:
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


def _read_once(path: Path) -> Found | None:
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
            return Found(parse_checked(content, Holder), path, facts.st_mtime_ns)
        except ValueError as error:
            # Named after the file as it is now, so that nobody replaces one that is whole by then.
            nonce = f"damaged{facts.st_ino:x}m{facts.st_mtime_ns:x}"
            makers = tuple(_makers(path, content, facts.st_mtime))
            return Found(Holder(nonce=nonce), path, facts.st_mtime_ns, str(error), makers)


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


def now_of(folder: Path) -> float:
    """Return the time by the clock of a folder's file system, in seconds.

    Raises:
        OSError: if nothing can be written there.
    """
    probe = temporary_name(lease_path(folder))
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def sweep(folder: Path, older_than_seconds: float) -> None:
    """Remove what killed jobs have left: claims that no chain leads to, files half written."""
    with suppress(OSError):
        attached: set[Path] = set()
        found = read_found(lease_path(folder))
        while found is not None and len(attached) < _LONGEST_CHAIN:
            attached.add(claim_path(folder, found.nonce))
            found = read_found(claim_path(folder, found.nonce))
        left = [*folder.glob(f".{NAME}.*"), *folder.glob(f"..{NAME}.*.tmp")]
        left = [path for path in left if path not in attached]
        if not left:
            return
        limit = now_of(folder) - older_than_seconds
        for path in left:
            with suppress(OSError):
                if path.lstat().st_mtime < limit:
                    path.unlink()
