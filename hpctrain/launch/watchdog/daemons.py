"""The launcher's processes on this node, as the watchdog sees them: there, or gone."""

from __future__ import annotations

import os
import selectors
from collections.abc import Callable, Sequence
from dataclasses import asdict

from hpctrain.launch.watchdog import processes
from hpctrain.launch.watchdog.messages import Message
from hpctrain.launch.watchdog.verdicts import Group, LauncherGone
from hpctrain.utils.proc import start_time


class Daemons:
    """Tells of the first of the launcher's processes that ends before the ranks do."""

    def __init__(
        self,
        daemons: Sequence[tuple[int, str, str, bool]],
        group: Group,
        selector: selectors.BaseSelector,
        send: Callable[[Message], None],
    ) -> None:
        """Watch them.

        Args:
            daemons: id, start time and name of each, and whether it started the ranks itself.
            group: the ranks that they have started.
            selector: of the process; every registered thing has a callable as its data.
            send: takes messages to the hub.
        """
        self._group = group
        self._selector = selector
        self._send = send
        self._pidfds: dict[int, int] = {}
        self._watched = {daemon[0]: daemon for daemon in daemons}
        for pid in tuple(self._watched):
            self._watch(pid)

    def look(self) -> None:
        """Look after those of which no event will come, on kernels without pidfd."""
        for pid in self._watched.keys() - self._pidfds.keys():
            if self._is_gone(pid):
                self._gone(pid)

    def _watch(self, pid: int) -> None:
        pidfd = processes.open_pidfd(pid)
        if pidfd is not None:
            self._pidfds[pid] = pidfd
            self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._gone(pid))
            if start_time(pid) != self._watched[pid][1]:
                self._gone(pid)  # and its id is another process's by now

    def _is_gone(self, pid: int) -> bool:
        return start_time(pid) != self._watched[pid][1] or processes.is_ending(pid)

    def _gone(self, pid: int) -> None:
        _, _, name, started_ranks = self._watched.pop(pid)
        pidfd = self._pidfds.pop(pid, None)
        status = processes.wait_status(pid, pidfd)
        if pidfd is not None:
            self._selector.unregister(pidfd)
            os.close(pidfd)
        number = 0 if status is None else status & 0x7F
        gone = LauncherGone(
            host=self._group.host,
            ranks=self._group.ranks,
            name=name,
            pid=pid,
            signal=processes.signal_name(number) if number else None,
            is_front_end=not started_ranks,
        )
        self._send({"launcher_gone": asdict(gone)})
