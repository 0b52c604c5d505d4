"""A budget of ranks at once on this machine, shared by all workers of pytest.

Ranks that wait for each other on cores that are taken are slow out of all proportion: MPI polls,
collectives wait for the one that gets no time. So a test says how many processes it keeps busy at
once, and begins when there is room for them. One that wants more than the whole budget runs alone.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

RANKS_PER_CORE = 4
"""Jobs wait a good part of their time, for starts, schedulers and limits."""


def budget() -> int:
    """Return how many ranks may be at work at once."""
    return RANKS_PER_CORE * len(os.sched_getaffinity(0))


@contextmanager
def room_for(ranks: int) -> Iterator[None]:
    """Have room for so many ranks during the body; wait for it first.

    Held are locks on files, which the system lets go of when a process ends in any way.
    """
    folder = Path(tempfile.gettempdir(), f"hpctrain-test-ranks-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    wanted = min(ranks, budget())
    with ExitStack() as held:
        # One at a time gathers many places, in the order of coming: no two wait for each other's,
        # and what it has gathered it keeps, so that it is not starved by those that want only one.
        with _locked(folder / "gate") if wanted > 1 else nullcontext():
            taken = 0
            while True:
                for number in range(budget()):
                    if taken < wanted and _take(folder / f"{number}", held):
                        taken += 1
                if taken == wanted:
                    break
                time.sleep(0.02)
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _take(path: Path, held: ExitStack) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    held.callback(os.close, descriptor)
    return True
