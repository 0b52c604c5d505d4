"""The ranks of one node, as their watchdog sees them."""

from __future__ import annotations

import functools
import mmap
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict

from hpctrain.launch.watchdog import processes, protocol
from hpctrain.launch.watchdog.evidence import Evidence
from hpctrain.launch.watchdog.member import peer_of, proof_of_rank
from hpctrain.launch.watchdog.messages import Channel, Message, parse_message
from hpctrain.launch.watchdog.pulse import ROW_BYTES, Reading, read_row
from hpctrain.launch.watchdog.rank import Rank
from hpctrain.launch.watchdog.verdicts import Death, Group
from hpctrain.utils.proc import num_oom_kills

# All ranks join at once; one that takes longer has died on the way.
_JOIN_SECONDS = 20.0
_KILL_SECONDS = 2.0
_ACCEPTS_AT_ONCE = 64
_HELLO_BYTES = 1024

Send = Callable[[Message], None]


class LocalRanks:
    """Tells what becomes of the ranks of this node, and does to them what the hub decides."""

    def __init__(
        self,
        group: Group,
        listener: socket.socket,
        secret: str,
        selector: selectors.BaseSelector,
        send: Send,
    ) -> None:
        """Wait for the ranks to join.

        Args:
            group: the ranks.
            listener: bound to the address that they know.
            secret: of the job.
            selector: of the process; every registered thing has a callable as its data.
            send: takes messages to the hub.
        """
        self._group = group
        self._secret = secret
        self._ranks = {rank: Rank(rank, index) for index, rank in enumerate(group.ranks)}
        self._listener = listener
        self._selector = selector
        self._send = send
        self._memory_fd = os.memfd_create("hpctrain-pulse")
        os.ftruncate(self._memory_fd, ROW_BYTES * len(group.ranks))
        self._memory = mmap.mmap(self._memory_fd, 0)
        self._last_progress: list[int] = [0] * len(group.ranks)
        self._oom_kills = num_oom_kills()
        self._join_until = time.monotonic() + _JOIN_SECONDS
        self._evidence = Evidence(group.host, list(self._ranks.values()), self._readings, send)
        self._kill_at: float | None = None
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, self._accept)

    @property
    def done(self) -> bool:
        """Whether no rank is left to watch."""
        return all(rank.left or rank.gone for rank in self._ranks.values())

    def obey(self, order: protocol.Order) -> None:
        """Do what the hub says."""
        match order:
            case protocol.Reply():
                rank = self._ranks[order.rank]
                if rank.alive and rank.channel is not None:
                    rank.channel.send({"may_speak": order.may_speak})
            case protocol.DumpStacks():
                self._evidence.collect(order.folder)
            case protocol.ShowStacks():
                self._evidence.show(order.folder)
            case protocol.StopRanks():
                for rank in self._ranks.values():
                    if rank.alive:
                        rank.signal(signal.SIGTERM)
            case protocol.EndRanks():
                self._end(order.code)

    def look(self, now: float) -> None:
        """Do what is due by the clock."""
        readings = self._readings()
        progress = [reading.progress for reading in readings]
        if progress != self._last_progress:
            self._last_progress = progress
            self._send({"moved": any(reading.unhurried for reading in readings)})
        if self._join_until <= now:
            self._close_door()
            for rank in self._ranks.values():
                if rank.channel is None:
                    self._bury(rank)
        self._evidence.look(now)
        if self._kill_at is not None and now >= self._kill_at:
            # Stopped, or stuck where no thread of theirs gets to run.
            for rank in self._ranks.values():
                if rank.alive:
                    rank.signal(signal.SIGKILL)
                rank.gone = True

    def due_seconds(self) -> float:
        """Return how long it may take until `look` is next worth calling."""
        return 0.05 if self._evidence.is_waiting or self._kill_at is not None else 1.0

    def _readings(self) -> list[Reading]:
        return [read_row(self._memory, index) for index in range(len(self._ranks))]

    def _close_door(self) -> None:
        """Listen no more: whoever is to come is there, or has died on the way."""
        self._join_until = float("inf")
        self._selector.unregister(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # nobody there any more, or no descriptor left for a moment
                time.sleep(0.01)
                return
            pid, is_ours = peer_of(connection)
            if not is_ours:  # anybody on this machine can see the address
                connection.close()
                continue
            connection.setblocking(False)
            greet = functools.partial(self._greet, connection, pid)
            self._selector.register(connection, selectors.EVENT_READ, greet)

    def _greet(self, connection: socket.socket, pid: int) -> None:
        """Take a rank in."""
        self._selector.unregister(connection)
        descriptors: list[int] = []
        try:
            data, descriptors, _, _ = socket.recv_fds(connection, _HELLO_BYTES, 1)
            rank = self._introduced(parse_message(data))
            (stacks,) = descriptors
            socket.send_fds(connection, [b"\n"], [self._memory_fd])
        except (OSError, ValueError):
            connection.close()
            for descriptor in descriptors:
                os.close(descriptor)
            return
        rank.channel, rank.pid, rank.stacks = Channel(connection), pid, stacks
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(rank))
        rank.pidfd = processes.open_pidfd(pid)
        if rank.pidfd is not None:
            self._selector.register(rank.pidfd, selectors.EVENT_READ, lambda: self._ended(rank))
        if all(each.channel is not None for each in self._ranks.values()):
            self._close_door()

    def _introduced(self, hello: Message) -> Rank:
        """Return the rank that says hello.

        Raises:
            ValueError: if it is none that is waited for, or does not know the secret.
        """
        number = hello.get("hello")
        rank = self._ranks.get(number) if type(number) is int else None
        if rank is None or rank.channel is not None:
            raise ValueError("no rank that is waited for")
        if hello.get("proof") != proof_of_rank(self._secret, rank.rank):
            raise ValueError("it does not know the secret")
        return rank

    def _hear(self, rank: Rank) -> None:
        assert rank.channel is not None
        messages = rank.channel.receive()
        if messages is None:
            self._selector.unregister(rank.channel)
            # Closed by the kernel, or by code that closes what it does not know: then the pidfd
            # tells.
            if rank.pidfd is None or processes.is_ending(rank.pid):
                self._bury(rank)
            return
        for message in messages:
            if "bye" in message:
                rank.left = True
            else:
                self._forward(rank, {**message, "rank": rank.rank})

    def _forward(self, rank: Rank, message: Message) -> None:
        """Tell the hub what a rank says of itself, if it is something that a rank may say."""
        try:
            if "about" in message:
                rank.about = protocol.parse_about(message)
                return
            if "shown" in message:
                rank.has_shown = True
                return
            if "collectives" in message:
                rank.collectives = protocol.parse_collectives(message)
                return
            report = protocol.parse_report(message, self._group)
        except ValueError:
            return
        names_folder = isinstance(report, protocol.RunFolder) and rank.rank == 0
        if names_folder or isinstance(report, protocol.Failing | protocol.Leaving):
            self._send(message)

    def _ended(self, rank: Rank) -> None:
        self._selector.unregister(rank.pidfd or -1)
        self._bury(rank)

    def _bury(self, rank: Rank) -> None:
        """Tell of a rank that has ended, unless it had taken leave."""
        if rank.gone:
            return
        rank.gone = True
        if rank.left:
            return
        status = processes.wait_status(rank.pid, rank.pidfd) if rank.pid else None
        number = None if status is None else status & 0x7F
        death = Death(
            rank=rank.rank,
            host=self._group.host,
            signal=processes.signal_name(number) if number else None,
            signal_number=number or None,
            exit_code=status >> 8 if status is not None and not number else None,
            oom_kills=num_oom_kills() - self._oom_kills,
            step=read_row(self._memory, rank.index).step,
            about=rank.about,
        )
        self._send({"died": asdict(death)})

    def _end(self, code: int) -> None:
        for rank in self._ranks.values():
            if rank.alive and rank.channel is not None:
                rank.channel.send({"end": code})
            elif rank.channel is None:
                rank.gone = True
        if self._kill_at is None:
            self._kill_at = time.monotonic() + _KILL_SECONDS
