"""The coordinator: on rank 0's node, where the watchdogs of all nodes are heard."""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.errors import ExitCode
from hpctrain.launch.handshake import Doorkeeper, Refusals
from hpctrain.launch.watchdog import protocol
from hpctrain.launch.watchdog.evidence import (
    REQUEST_NAME,
    Requests,
    make_private_folder,
    python_stacks,
    write_ending,
    write_report,
    write_stacks,
)
from hpctrain.launch.watchdog.judge import Judge
from hpctrain.launch.watchdog.protocol import Channel, Message, notice_silence
from hpctrain.launch.watchdog.verdicts import (
    Action,
    AskStacks,
    AskToStop,
    Death,
    End,
    Group,
    LauncherGone,
    NodeLost,
    Reply,
    Tell,
    Verdict,
    story,
)
from hpctrain.utils.text import listed, plural, printable

if TYPE_CHECKING:
    from hpctrain.launch.watchdog.verdicts import Group

PURPOSE = "watchdog"
CONNECT_SECONDS = 20.0
"""Time for all nodes to reach the coordinator."""

_WRITE_SECONDS = 2.0
_FAREWELL_SECONDS = 2.0
_COMPLAINT_SECONDS = 60.0

Obey = Callable[[protocol.Order], None]

# Longer than a node takes to answer.
_ANSWER_SECONDS = 6.0
_SHOWN = 8


class Coordinator:
    """Hears all watchdogs, has the judge decide, and reports to user and watchdogs."""

    def __init__(
        self,
        judge: Judge,
        groups: Mapping[int, Group],
        *,
        leader: int,
        secret: str,
        listener: socket.socket | None,
        selector: selectors.BaseSelector,
    ) -> None:
        """Wait for the other watchdogs.

        Args:
            judge: decides.
            groups: of all nodes, by their lowest rank.
            leader: lowest rank of the coordinator's own node.
            secret: of the job; the others prove that they know it.
            listener: where they come; None where there is no other node.
            selector: of the process.
        """
        self.obey: Obey
        self._judge = judge
        self._groups = groups
        self._leader = leader
        self._selector = selector
        self._listener = listener
        self._channels: dict[int, Channel] = {}
        self._awaited = set(groups) - {leader}
        self._left: set[int] = {leader}
        self._folder: Path | None = None
        self._stacks: Path | None = None
        self._showing = Showing(groups, self._post_all)
        self._connect_until = time.monotonic() + CONNECT_SECONDS
        self._owner = {rank: key for key, group in groups.items() for rank in group.ranks}
        self._ended = False
        self._complained: tuple[int, float] = (0, 0.0)
        self._door: Doorkeeper | None = None
        self._refusals = Refusals()
        if listener is not None:
            self._door = Doorkeeper(
                listener,
                selector,
                secret=secret,
                purpose=PURPOSE,
                expected=len(self._awaited),
                admit=self._admit,
            )
            self._refusals = self._door.refusals

    def send(self, message: Message) -> None:
        """Hear the coordinator's own node."""
        self._hear(self._leader, protocol.parse_report(message, self._groups[self._leader]))

    def look(self, now: float) -> None:
        """Do what is due by the clock."""
        self._do(self._judge.look(now))
        if text := self._showing.look(now):
            say(text)
        if now >= self._connect_until:
            self._connect_until = float("inf")
            for leader in self._awaited:
                self._judge.lost(leader, now)
            self._close_door()
        if self._door is not None:
            self._door.look(now)
            self._complain(now)
        for channel in self._channels.values():
            channel.flush()

    def due_seconds(self, now: float) -> float:
        """Return how long it may take until `look` is next worth calling."""
        due = self._judge.due_seconds(now)
        return due if self._door is None else min(due, self._door.due_seconds(now))

    def leave(self) -> None:
        """Wait a little for the other watchdogs to leave as well, so that none is left alone."""
        self._close_door()
        until = time.monotonic() + _FAREWELL_SECONDS
        while self._channels and time.monotonic() < until:
            for key, _ in self._selector.select(0.1):
                key.data()
        for channel in self._channels.values():
            channel.send({"bye": True})

    def _admit(self, name: str, connection: socket.socket) -> None:
        """Take in a watchdog that has proved the secret."""
        leader = int(name) if name.isdecimal() else -1
        if leader not in self._awaited:
            connection.close()
            return
        # It may have given up on an earlier connection on which our answer came late.
        self._drop(leader)
        notice_silence(connection)
        channel = Channel(connection, protocol.longest_report(self._groups[leader]))
        self._channels[leader] = channel
        self._selector.register(
            connection, selectors.EVENT_READ, lambda: self._hear_channel(leader, channel)
        )

    def _drop(self, leader: int) -> None:
        channel = self._channels.pop(leader, None)
        if channel is not None:
            self._selector.unregister(channel)
            channel.close()

    def _hear_channel(self, leader: int, channel: Channel) -> None:
        if self._channels.get(leader) is not channel:
            return  # another one has taken its place since the selector saw it
        messages = channel.receive()
        try:
            reports = [
                protocol.parse_report(message, self._groups[leader]) for message in messages or ()
            ]
        except ValueError:
            messages = None
        if messages is None:
            self._drop(leader)
            # Before its first word it may not know yet that it was let in, and tries again.
            if leader not in self._left and leader not in self._awaited:
                self._judge.lost(leader, time.monotonic())
            return
        for report in reports:
            self._hear(leader, report)

    def _hear(self, leader: int, report: protocol.Report) -> None:
        now = time.monotonic()
        match report:
            case protocol.Here():
                self._awaited.discard(leader)
                if not self._awaited:
                    self._close_door()
            case protocol.Moved():
                self._judge.moved(leader, report.long_phase, now)
            case Death():
                self._do(self._judge.died(report))
            case protocol.Failing():
                code, may_be_echo = report.code, report.may_be_echo
                self._do(self._judge.failing(report.rank, code, may_be_echo, now))
            case LauncherGone():
                self._judge.launcher_gone(report, now)
            case protocol.Leaving() | protocol.Outside() | protocol.Entering():
                self._hear_where(report, now)
            case protocol.Stands():
                self._do(self._judge.stands(report.stands))
            case protocol.Shown():
                self._showing.hear(leader, report.count, report.missing)
            case protocol.RunFolder():
                self._folder = report.path
                self._showing.look_in(report.path)
            case protocol.Bye():
                self._left.add(leader)

    def _hear_where(
        self, report: protocol.Leaving | protocol.Outside | protocol.Entering, now: float
    ) -> None:
        match report:
            case protocol.Leaving():
                self._judge.leaving(report.rank, now)
            case protocol.Outside():
                self._judge.outside(report.rank)
            case protocol.Entering():
                self._judge.entering(
                    report.rank, report.hang_timeout_seconds, report.first_step_timeout_seconds
                )

    def _close_door(self) -> None:
        """Listen no more: whoever is to come is there, or is not waited for."""
        if self._door is not None and self._listener is not None:
            self._complain(time.monotonic())
            self._door.close()
            self._listener.close()
            self._door = None

    def _complain(self, now: float) -> None:
        """Tell of strangers that were refused, once a minute at most."""
        reported, at = self._complained
        if self._refusals.count > reported and (not reported or now >= at):
            self._complained = self._refusals.count, now + _COMPLAINT_SECONDS
            say(f"hpctrain: watchdog on {self._host}: {self._refusals}\n")

    @property
    def _host(self) -> str:
        return self._groups[self._leader].host

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Reply):
                answer = {"reply": action.rank, "may_speak": action.may_speak}
                self._post(self._owner[action.rank], answer)
            elif isinstance(action, AskStacks):
                self._ask_stacks()
            elif isinstance(action, AskToStop):
                self._announce(action.reason)
                self._post_all({"stop": True})
            elif isinstance(action, Tell):
                self._announce(action.verdict)
            elif isinstance(action, End) and not self._ended:
                self._ended = True
                self._post_all({"end": action.code & 0xFF or ExitCode.BUG})

    def _ask_stacks(self) -> None:
        """Have all nodes write stacks: to the run folder, or each to a folder of its own."""
        shared = None if self._folder is None else self._folder / "stacks"
        try:
            if shared is not None:
                shared.mkdir(exist_ok=True)
        except OSError:
            shared = None
        self._stacks = shared or make_private_folder()
        for leader in sorted(self._groups, reverse=True):
            folder = self._stacks if leader == self._leader else shared
            self._post(leader, {"stacks": None if folder is None else str(folder)})

    def _post(self, leader: int, message: Message) -> None:
        if leader == self._leader:
            self.obey(protocol.parse_order(message, self._groups[leader]))
        elif leader in self._channels:
            self._channels[leader].send(message)

    def _post_all(self, message: Message) -> None:
        # The others first: what ends here may take this process with it.
        for leader in sorted(self._groups, reverse=True):
            self._post(leader, message)

    def _announce(self, verdict: Verdict) -> None:
        self._close_door()  # the reports below may need its descriptors
        stacks = None if self._stacks is None else str(self._stacks)
        text = story(verdict, stacks)
        if isinstance(verdict, NodeLost) and self._awaited and self._refusals.count:
            text += f"Is the port of the watchdogs flooded? {self._refusals}.\n"
        say(text)
        if self._folder is None:
            return
        # A file system that hangs is not waited for: it may be why the job stands still.
        arguments = (self._folder, verdict, text)
        writer = threading.Thread(target=_write_reports, args=arguments, daemon=True)
        writer.start()
        writer.join(_WRITE_SECONDS)


def say(text: str) -> None:
    """Write to stderr in one piece, so that the lines of others do not get between."""
    with suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))


def _write_reports(folder: Path, verdict: Verdict, text: str) -> None:
    # stderr may end at a launcher that is gone.
    with suppress(OSError), (folder / "log.txt").open("a", encoding="utf-8") as log:
        log.write(text)
    if isinstance(verdict, LauncherGone) and verdict.is_front_end:
        return  # how the job ends the ranks tell themselves
    if isinstance(verdict, Death):
        write_report(
            folder,
            rank=verdict.rank,
            host=verdict.host,
            code=verdict.code,
            story=text,
            step=verdict.step,
            about=verdict.about,
        )
        return
    write_ending(folder, verdict.code, text.splitlines()[0].removeprefix("hpctrain: "))


class Showing:
    """Asks all nodes once a request is there, and says when they have answered."""

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
        """Do what is due by the clock, and return what to report to the user; "" for nothing."""
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
    """Return what is reported to the user, as a line."""
    text = (
        f"hpctrain: wrote the stacks of {plural(shown, 'rank')} to {folder / 'stacks'}, "
        f"as {folder / REQUEST_NAME} asked"
    )
    if missing:
        text += f"; none from rank {listed([str(rank) for rank in sorted(missing)], _SHOWN)}"
    return f"{printable(text)}\n"
