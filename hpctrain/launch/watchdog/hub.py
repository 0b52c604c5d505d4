"""Where the watchdogs of all nodes are heard: on rank 0's node, and on the others the way there."""

from __future__ import annotations

import os
import selectors
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from hpctrain.launch.crash import write_ending, write_report
from hpctrain.launch.watchdog.judge import (
    Action,
    AskStacks,
    Death,
    End,
    Group,
    Judge,
    NodeLost,
    Reply,
    Stand,
    Tell,
    Verdict,
)
from hpctrain.launch.watchdog.messages import Channel, Message, notice_silence
from hpctrain.launch.watchdog.telling import story

_CONNECT_SECONDS = 20.0
_WRITE_SECONDS = 2.0
_FAREWELL_SECONDS = 2.0

Obey = Callable[[Message], None]


class Hub:
    """Hears all watchdogs, has the judge decide, and tells user and watchdogs."""

    def __init__(
        self,
        judge: Judge,
        groups: Mapping[int, Group],
        *,
        leader: int,
        nonce: str,
        listener: socket.socket | None,
        selector: selectors.BaseSelector,
    ) -> None:
        """Wait for the other watchdogs.

        Args:
            judge: decides.
            groups: of all nodes, by their lowest rank.
            leader: lowest rank of the hub's own node.
            nonce: what the others say first.
            listener: where they come; None where there is no other node.
            selector: of the process.
        """
        self.obey: Obey
        self._judge = judge
        self._groups = groups
        self._leader = leader
        self._nonce = nonce
        self._selector = selector
        self._listener = listener
        self._channels: dict[int, Channel] = {}
        self._left: set[int] = {leader}
        self._folder: Path | None = None
        self._stacks: Path | None = None
        self._connect_until = time.monotonic() + _CONNECT_SECONDS
        self._owner = {rank: key for key, group in groups.items() for rank in group.ranks}
        self._ended = False
        if listener is not None:
            selector.register(listener, selectors.EVENT_READ, self._accept)

    def send(self, message: Message) -> None:
        """Hear the hub's own node."""
        self._hear(self._leader, message)

    def look(self, now: float) -> None:
        """Do what is due by the clock."""
        self._do(self._judge.look(now))
        if now >= self._connect_until:
            self._connect_until = float("inf")
            for leader in self._groups.keys() - self._channels.keys() - self._left:
                self._judge.lost(leader, now)
        for channel in self._channels.values():
            channel.flush()

    def due_seconds(self, now: float) -> float:
        """Return how long it may take until `look` is next worth calling."""
        return self._judge.due_seconds(now)

    def leave(self) -> None:
        """Wait a little for the other watchdogs to leave as well, so that none is left alone."""
        until = time.monotonic() + _FAREWELL_SECONDS
        while self._channels and time.monotonic() < until:
            for key, _ in self._selector.select(0.1):
                key.data()
        for channel in self._channels.values():
            channel.send({"bye": True})

    def _accept(self) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        notice_silence(connection)
        connection.setblocking(False)
        channel = Channel(connection)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._greet(channel))

    def _greet(self, channel: Channel) -> None:
        """Take in a watchdog that knows the nonce; whoever else finds the port is sent away."""
        messages = channel.receive()
        if messages == []:
            return
        self._selector.unregister(channel)
        first = messages[0] if messages else {}
        leader: int = first.get("group", -1)
        if first.get("nonce") != self._nonce or leader not in self._groups:
            channel.close()
            return
        self._channels[leader] = channel
        self._selector.register(
            channel, selectors.EVENT_READ, lambda: self._hear_channel(leader, channel)
        )
        for message in (messages or [])[1:]:
            self._hear(leader, message)

    def _hear_channel(self, leader: int, channel: Channel) -> None:
        messages = channel.receive()
        if messages is None:
            self._selector.unregister(channel)
            del self._channels[leader]
            if leader not in self._left:
                self._judge.lost(leader, time.monotonic())
            return
        for message in messages:
            self._hear(leader, message)

    def _hear(self, leader: int, message: Message) -> None:
        now = time.monotonic()
        if "moved" in message:
            self._judge.moved(leader, message["moved"], now)
        elif "died" in message:
            self._do(self._judge.died(Death(**message["died"])))
        elif "failing" in message:
            code, may_be_echo = message["failing"], message["may_be_echo"]
            self._do(self._judge.failing(message["rank"], code, may_be_echo, now))
        elif "leaving" in message:
            self._judge.leaving(message["rank"], now)
        elif "stands" in message:
            self._do(self._judge.stands([Stand(**stand) for stand in message["stands"]]))
        elif "folder" in message:
            self._folder = Path(message["folder"])
        elif "bye" in message:
            self._left.add(leader)

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Reply):
                answer = {"reply": action.rank, "may_speak": action.may_speak}
                self._post(self._owner[action.rank], answer)
            elif isinstance(action, AskStacks):
                self._stacks = _make_stacks_folder(self._folder, self._nonce)
                self._post_all({"stacks": str(self._stacks)})
            elif isinstance(action, Tell):
                self._tell(action.verdict)
            elif isinstance(action, End) and not self._ended:
                self._ended = True
                self._post_all({"end": action.code})

    def _post(self, leader: int, message: Message) -> None:
        if leader == self._leader:
            self.obey(message)
        elif leader in self._channels:
            self._channels[leader].send(message)

    def _post_all(self, message: Message) -> None:
        # The others first: what ends here may take this process with it.
        for leader in sorted(self._groups, reverse=True):
            self._post(leader, message)

    def _tell(self, verdict: Verdict) -> None:
        stacks = None if self._stacks is None else str(self._stacks)
        text = story(verdict, stacks)
        say(text)
        if self._folder is None:
            return
        # A file system that hangs is not waited for: it may be why the job stands still.
        arguments = (self._folder, verdict, text)
        writer = threading.Thread(target=_write_reports, args=arguments, daemon=True)
        writer.start()
        writer.join(_WRITE_SECONDS)


class Spoke:
    """A watchdog's connection to the hub."""

    def __init__(
        self,
        connection: socket.socket,
        *,
        leader: int,
        nonce: str,
        hub: Group,
        speaks_for_hub: bool,
        selector: selectors.BaseSelector,
    ) -> None:
        """Introduce this watchdog.

        Args:
            connection: to the hub.
            leader: lowest rank of this node.
            nonce: of the job.
            hub: the group of the hub.
            speaks_for_hub: this is the one watchdog that tells of the hub's end.
            selector: of the process.
        """
        self.obey: Obey
        notice_silence(connection)
        connection.setblocking(False)
        self._hub = hub
        self._speaks_for_hub = speaks_for_hub
        self._channel = Channel(connection)
        self._selector = selector
        self._over = False
        self._channel.send({"nonce": nonce, "group": leader})
        selector.register(connection, selectors.EVENT_READ, self._hear)

    def send(self, message: Message) -> None:
        """Tell the hub."""
        self._channel.send(message)

    def look(self, _now: float) -> None:
        """Send what did not go out at once."""
        self._channel.flush()

    def due_seconds(self, _now: float) -> float:
        """Return how long it may take until `look` is next worth calling."""
        return 1.0

    def leave(self) -> None:
        """Take leave of the hub."""
        self._channel.send({"bye": True})
        self._channel.close()

    def _hear(self) -> None:
        messages = self._channel.receive()
        if messages is None:
            self._selector.unregister(self._channel)
            if not self._over:
                lost = NodeLost(self._hub)
                if self._speaks_for_hub:
                    say(story(lost))
                self.obey({"end": lost.code})
            return
        for message in messages:
            if "bye" in message or "end" in message:
                self._over = True
            self.obey(message)


def say(text: str) -> None:
    """Write to stderr in one piece, so that the lines of others do not get between."""
    with suppress(OSError):
        os.write(2, text.encode())


def _make_stacks_folder(folder: Path | None, nonce: str) -> Path:
    local = Path(tempfile.gettempdir(), f"hpctrain-stacks-{nonce[:8]}")
    for path in ([folder / "stacks"] if folder is not None else []) + [local]:
        with suppress(OSError):
            path.mkdir(exist_ok=True)
            return path
    return local


def _write_reports(folder: Path, verdict: Verdict, text: str) -> None:
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
