"""A budget of ranks at once on this machine, shared by all workers of pytest.

Ranks that wait for each other on cores that are taken are slow out of all proportion: MPI polls,
collectives wait for the one that gets no time. So a test says how many processes it keeps busy at
once, and begins when there is room for them. Where ranks that wait leave cores idle, there is room
for more of them.
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

MORE_WHERE_IDLE = 2
"""So many times the budget may be at work where cores are idle all the same."""

IDLE_SHARE = 0.25
"""Cores are idle that have had nothing to do for this part of a second and more."""


def budget() -> int:
    """Return how many ranks may be at work at once."""
    return RANKS_PER_CORE * _cores()


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
            taken, cores = 0, Cores()
            while True:
                places = budget() * (MORE_WHERE_IDLE if cores.are_idle() else 1)
                for number in range(places):
                    if taken < wanted and _take(folder / f"{number}", held):
                        taken += 1
                if taken == wanted:
                    break
                time.sleep(0.05)
        yield


class Cores:
    """What the cores have to do, from now on."""

    def __init__(self) -> None:
        self._since, self._ticks = time.monotonic(), _idle_ticks()
        self._idle = False

    def are_idle(self) -> bool:
        """Return whether they were, in the last whole second that was looked at."""
        now = time.monotonic()
        if now - self._since >= 1:
            ticks = _idle_ticks()
            possible = (now - self._since) * os.sysconf("SC_CLK_TCK") * _cores()
            self._idle = ticks - self._ticks >= IDLE_SHARE * possible
            self._since, self._ticks = now, ticks
        return self._idle


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _idle_ticks() -> int:
    """Return for how many ticks the cores of this process have had nothing to do so far."""
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    # The fourth number of a core's line is its idle time, the fifth that of waiting for disks.
    return sum(sum(map(int, line.split()[4:6])) for line in lines if line.split()[0] in ours)


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
