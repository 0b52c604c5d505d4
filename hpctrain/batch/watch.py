"""Rank 0's watch over the time limit and the file STOP, in a thread that nobody waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from hpctrain.batch.reasons import DEADLINE, STOP_FILE, STOP_FILE_NAME
from hpctrain.batch.scheduler import Deadline

MARGIN_SECONDS = 10.0
"""For what nobody measures: leaving MPI, closing files, the launcher's own end."""

_SAFETY = 1.5
_LOOK_EVERY_SECONDS = 1.0


def reserve_seconds(reaction_seconds: float, save_seconds: float) -> float:
    """Return how long before the end of a job its last save has to be asked for.

    Args:
        reaction_seconds: from the request until all ranks act on it.
        save_seconds: of one save, from its first copy until it is on disk. Another one may still
            be under way and is waited for.
    """
    return _SAFETY * (reaction_seconds + 2 * save_seconds) + MARGIN_SECONDS


class Watch:
    """Looks for reasons to stop beyond signals; a context manager, for rank 0.

    Args:
        folder: of the run, in which somebody may put a file named STOP.
        deadline: of this job.
        reserve: seconds before the deadline at which to stop.
    """

    def __init__(self, folder: Path, deadline: Deadline, reserve: Callable[[], float]) -> None:
        self._file = folder / STOP_FILE_NAME
        self._deadline = deadline
        self._reserve = reserve
        self._file_seen = False
        self._ended = threading.Event()
        # A daemon: a scheduler or file system that does not answer must not keep the job alive.
        self._thread = threading.Thread(target=self._look, name="hpctrain-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()

    def reasons(self) -> int:
        """Return what is known at this moment, as bits; costs no system call but the clock."""
        found = STOP_FILE if self._file_seen else 0
        if self._deadline.seconds_left() < self._reserve():
            found |= DEADLINE
        return found

    def _look(self) -> None:
        while True:
            with suppress(OSError):  # a file system in trouble is no wish of the user
                self._file_seen = self._file.exists()
            self._deadline.refresh()
            if self._ended.wait(_LOOK_EVERY_SECONDS):
                return
