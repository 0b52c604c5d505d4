"""The hub's part in showing the stacks of a job that runs: the request, and word of the answer."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.launch.watchdog.messages import Message
from hpctrain.launch.watchdog.stacks import REQUEST_NAME, Requests, python_stacks, write_stacks
from hpctrain.utils.text import listed, plural, printable

if TYPE_CHECKING:
    from hpctrain.launch.watchdog.verdicts import Group

# Longer than a node takes to answer.
_ANSWER_SECONDS = 6.0
_WRITE_SECONDS = 2.0
_SHOWN = 8


class Showing:
    """Asks all nodes once a request is there, and tells when they have answered."""

    def __init__(
        self,
        groups: Mapping[int, Group],
        post_all: Callable[[Message], None],
    ) -> None:
        """Wait for a run folder.

        Args:
            groups: of all nodes, by their lowest rank.
            post_all: sends a message to all of them.
        """
        self._groups = groups
        self._post_all = post_all
        self._folder: Path | None = None
        self._requests: Requests | None = None
        self._asked = threading.Event()
        self._awaited: set[int] = set()
        self._until = 0.0
        self._shown = 0
        self._missing: list[int] = []

    def look_in(self, folder: Path) -> None:
        """Look for requests in a run folder from now on."""
        if folder == self._folder:
            return
        if self._requests is not None:
            self._requests.close()
        self._folder = folder
        self._requests = Requests(folder, self._asked.set)

    def hear(self, leader: int, shown: int, missing: Collection[int]) -> None:
        """Take note of a node's answer."""
        if leader in self._awaited:
            self._awaited.remove(leader)
            self._shown += shown
            self._missing += missing

    def look(self, now: float) -> str:
        """Do what is due by the clock, and return what the user is to be told; "" for nothing."""
        if self._folder is None:
            return ""
        if self._asked.is_set() and self._until == 0.0:
            self._asked.clear()
            self._awaited, self._shown, self._missing = set(self._groups), 0, []
            self._until = now + _ANSWER_SECONDS
            self._post_all({"show_stacks": str(self._folder / "stacks")})
        if self._until and (not self._awaited or now >= self._until):
            self._until = 0.0
            missing = [rank for key in self._awaited for rank in self._groups[key].ranks]
            return answer_text(self._folder, self._shown, [*self._missing, *missing])
        return ""


def show_own_stacks(folder: Path) -> Requests:
    """Answer requests in the world of one process, which has no watchdog."""

    def answer() -> None:
        was_written = write_stacks(folder / "stacks", {0: python_stacks()}, _WRITE_SECONDS)
        with suppress(OSError):
            sys.stderr.write(answer_text(folder, int(was_written), [] if was_written else [0]))
            sys.stderr.flush()

    return Requests(folder, answer)


def answer_text(folder: Path, shown: int, missing: Collection[int]) -> str:
    """Return what the user is told, as a line."""
    text = (
        f"hpctrain: wrote the stacks of {plural(shown, 'rank')} to {folder / 'stacks'}, "
        f"as {folder / REQUEST_NAME} asked"
    )
    if missing:
        text += f"; none from rank {listed([str(rank) for rank in sorted(missing)], _SHOWN)}"
    return f"{printable(text)}\n"
