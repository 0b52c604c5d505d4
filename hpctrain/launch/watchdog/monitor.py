"""One node as its watchdog sees it: the ranks, and the launcher's processes above them."""

from __future__ import annotations

import functools
import mmap
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hpctrain.launch.watchdog import processes, protocol
from hpctrain.launch.watchdog.client import ROW_BYTES, Reading, peer_of, proof_of_rank, read_row
from hpctrain.launch.watchdog.evidence import (
    STACKS_SIGNAL,
    empty,
    make_private_folder,
    read_all,
    write_stacks,
)
from hpctrain.launch.watchdog.processes import Rank
from hpctrain.launch.watchdog.protocol import Channel, Message, parse_message
from hpctrain.launch.watchdog.verdicts import Death, Group, LauncherGone, Stand, main_stack
from hpctrain.utils.proc import num_oom_kills, start_time

# All ranks join at once; one that takes longer has died on the way.
_JOIN_SECONDS = 20.0
_KILL_SECONDS = 2.0
_ACCEPTS_AT_ONCE = 64
_HELLO_BYTES = 1024

Send = Callable[[Message], None]

_DUMP_SECONDS = 0.3
# Together as long as the judge waits for all nodes, less the way there.
_WRITE_SECONDS = 0.8
_RECORDS_SECONDS = 1.2
# A rank answers within milliseconds, unless some library holds Python's lock.
_SHOW_SECONDS = 3.0
_STACK_CHARACTERS = 4000


class LocalRanks:
    """Reports what becomes of this node's ranks, and does to them what the coordinator decides."""

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
            send: takes messages to the coordinator.
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
        """Do what the coordinator says."""
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
            self._send({"moved": any(reading.long_phase for reading in readings)})
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
        """Pass on what a rank says of itself, if it is something that a rank may say."""
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
        if names_folder or isinstance(report, protocol.OfRank):
            self._send(message)

    def _ended(self, rank: Rank) -> None:
        self._selector.unregister(rank.pidfd or -1)
        if _is_killed(_status(rank)):
            # Maybe by a launcher that has seen another rank end, which is the one to tell of.
            for other in self._ranks.values():
                if other is not rank and other.alive and _failed_by_itself(other):
                    self._bury(other)
        self._bury(rank)

    def _bury(self, rank: Rank) -> None:
        """Tell of a rank that has ended, unless it had taken leave."""
        if rank.gone:
            return
        rank.gone = True
        if rank.left:
            return
        status = _status(rank)
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


def _status(rank: Rank) -> int | None:
    return processes.wait_status(rank.pid, rank.pidfd) if rank.pid else None


def _is_killed(status: int | None) -> bool:
    return status is not None and status & 0x7F == signal.SIGKILL


def _failed_by_itself(rank: Rank) -> bool:
    """Return whether a rank has ended by a fault of its own or an exit code, as far as is known."""
    status = _status(rank) if processes.is_ending(rank.pid) else None
    return bool(status) and not _is_killed(status)


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
            send: takes messages to the coordinator.
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


@dataclass(slots=True)
class _Show:
    """A request for the stacks of ranks that go on."""

    folder: Path
    until: float
    has_signalled: bool = False


class Evidence:
    """Asks the ranks where they are, and reports to the coordinator."""

    def __init__(
        self,
        host: str,
        ranks: Sequence[Rank],
        readings: Callable[[], Sequence[Reading]],
        send: Callable[[Message], None],
    ) -> None:
        """Ask nothing yet.

        Args:
            host: of the ranks.
            ranks: of this node.
            readings: what they have said of themselves, in their order.
            send: takes messages to the coordinator.
        """
        self._host = host
        self._ranks = ranks
        self._readings = readings
        self._send = send
        self._dump_at: tuple[float, Path | None] | None = None
        self._stands_at: float | None = None
        self._dumps: dict[int, str] = {}
        self._show: _Show | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether `look` is to be called soon."""
        return not (self._dump_at is None and self._stands_at is None and self._show is None)

    def collect(self, folder: Path | None) -> None:
        """Have the ranks say where they stand still; the coordinator hears it from `look`.

        Args:
            folder: for the stacks; None: a new one on this node.
        """
        for rank in self._ranks:
            empty(rank.stacks)
            rank.collectives = None
            if rank.alive:
                rank.signal(STACKS_SIGNAL)
        self._show = None  # the verdict comes first
        self._dump_at = (time.monotonic() + _DUMP_SECONDS, folder or make_private_folder())

    def show(self, folder: Path) -> None:
        """Have the ranks say where they are, for somebody who looks at a job that runs."""
        if self.is_waiting:
            return
        for rank in self._ranks:
            empty(rank.stacks)
            rank.has_shown = False
            if rank.alive and rank.channel is not None:
                rank.channel.send({"show_stacks": True})
        self._show = _Show(folder, time.monotonic() + _SHOW_SECONDS)

    def look(self, now: float) -> None:
        """Do what is due by the clock."""
        if self._dump_at is not None and now >= self._dump_at[0]:
            folder, self._dump_at = self._dump_at[1], None
            self._ask_records(folder)
        if self._stands_at is not None and (now >= self._stands_at or self._has_records()):
            self._stands_at = None
            self._send({"stands": [_message(stand) for stand in self._stands()]})
        if self._show is not None:
            self._look_at_show(self._show, now)

    def _ask_records(self, folder: Path | None) -> None:
        """Take the stacks, and ask for the collectives.

        Not before: faulthandler trips over threads that begin to run while it looks.
        """
        self._dumps = {rank.rank: read_all(rank.stacks) for rank in self._ranks}
        for rank in self._ranks:
            if rank.alive and rank.channel is not None and folder is not None:
                record = folder / f"flight-recorder-rank-{rank.rank}.json"
                rank.channel.send({"flight_recorder": str(record)})
        self._stands_at = time.monotonic() + _RECORDS_SECONDS
        if folder is not None:
            write_stacks(folder, self._dumps, _WRITE_SECONDS)

    def _has_records(self) -> bool:
        return all(rank.collectives is not None for rank in self._ranks if rank.alive)

    def _stands(self) -> list[Stand]:
        readings = self._readings()
        return [
            Stand(
                rank=rank.rank,
                host=self._host,
                progress=readings[rank.index].progress,
                step=readings[rank.index].step,
                state=processes.state(rank.pid),
                stack=main_stack(self._dumps.get(rank.rank, ""))[:_STACK_CHARACTERS],
                collectives=rank.collectives or (),
            )
            for rank in self._ranks
        ]

    def _look_at_show(self, show: _Show, now: float) -> None:
        silent = [rank for rank in self._ranks if rank.alive and not rank.has_shown]
        if silent and now < show.until:
            return
        if silent and not show.has_signalled:
            # Python's lock is held, so that no other thread's frames change: from C, then.
            for rank in silent:
                rank.signal(STACKS_SIGNAL)
            show.has_signalled, show.until = True, now + _DUMP_SECONDS
            return
        self._show = None
        dumps = {rank.rank: read_all(rank.stacks) for rank in self._ranks}
        was_written = write_stacks(show.folder, dumps, _WRITE_SECONDS)
        missing = [rank for rank, dump in dumps.items() if not dump or not was_written]
        self._send({"shown": len(dumps) - len(missing), "missing": missing})


def _message(stand: Stand) -> Message:
    """Return a stand as it comes out of JSON, which the own node's does not go through."""
    return {**asdict(stand), "collectives": [asdict(each) for each in stand.collectives]}
