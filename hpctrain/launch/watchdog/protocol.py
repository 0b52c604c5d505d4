"""Messages of watchdogs, and of ranks with theirs: JSON, one object a line, of a closed set.

Types are checked as messages are taken apart. A sender reports on the ranks of its own group only,
and its host is the one that is known of it, whatever it says. Numbers are integers of a bounded
size: the protocol has no others.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hpctrain.launch.watchdog.evidence import MOST_GROUPS, GroupPosition
from hpctrain.launch.watchdog.verdicts import Death, Group, LauncherGone, Stand

Message = dict[str, Any]

LONGEST_BYTES = 1 << 16
"""Of one message, where nothing else is said."""

# A node that has lost power or network acknowledges nothing: with these its connection ends after
# 8 s, where the defaults of TCP would take hours. The kernel answers for a live node, whatever its
# processes are busy with.
_SILENCE_SECONDS = 8
_PROBE_EVERY_SECONDS = 2

T = TypeVar("T")

_LARGEST = 2**63 - 1
_LARGEST_CODE = 255
# A stack is cut at 4,000 characters, of which JSON makes up to 6 bytes each.
_BYTES_PER_RANK = 1 << 15


class Channel:
    """One end of a connection; sends and receives whole messages, in order."""

    def __init__(self, connection: socket.socket, longest_bytes: int = LONGEST_BYTES) -> None:
        self._connection = connection
        self._longest_bytes = longest_bytes
        self._received = b""
        self._unsent = b""

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._connection.fileno()

    def send(self, message: Message) -> None:
        """Send a message, or as much of it as the connection takes now; `flush` sends the rest.

        A peer that is gone is no error here: `receive` says so.
        """
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Go on sending what the connection has not taken yet."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent = b""

    def receive(self) -> list[Message] | None:
        """Return the messages that have come whole, and None once the peer is gone.

        A peer that says what is no message, or a longer one than it may, counts as gone.
        """
        try:
            data = self._connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if max(map(len, [*lines, self._received])) > self._longest_bytes:
            return None
        try:
            return [parse_message(line) for line in lines]
        except ValueError:
            return None

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def parse_message(line: bytes) -> Message:
    """Return the message that a line holds.

    Raises:
        ValueError: if it holds none.
    """
    try:
        message = json.loads(line, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(message, dict):
        raise ValueError("it is not an object")
    return message


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")


def notice_silence(connection: socket.socket) -> None:
    """Have the kernel end a TCP connection whose other host is silent for 8 s."""
    num_probes = _SILENCE_SECONDS // _PROBE_EVERY_SECONDS - 1
    for level, option, value in (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", _PROBE_EVERY_SECONDS),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", _PROBE_EVERY_SECONDS),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", num_probes),
        # Keep-alive rests while data is on its way; this holds then. In milliseconds.
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 1000 * _SILENCE_SECONDS),
    ):
        with suppress(AttributeError, OSError):
            connection.setsockopt(level, getattr(socket, option), value)


@dataclass(frozen=True, slots=True)
class Here:
    """The watchdog of a node has proved the secret, and knows that the coordinator has."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Some rank of the group has sent a heartbeat."""

    long_phase: bool


@dataclass(frozen=True, slots=True)
class Failing:
    """A rank fails, and asks to report it."""

    rank: int
    code: int
    may_be_echo: bool


@dataclass(frozen=True, slots=True)
class Leaving:
    """A rank has left the job's body."""

    rank: int


@dataclass(frozen=True, slots=True)
class Outside:
    """A rank is in its program, and in no job's body: it may take its time."""

    rank: int


@dataclass(frozen=True, slots=True)
class Entering:
    """A rank enters a job's body, with the limits on standing still there."""

    rank: int
    hang_timeout_seconds: float
    first_step_timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Stands:
    """Where the ranks of the group stand."""

    stands: tuple[Stand, ...]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where reports go; only rank 0's node says so."""

    path: Path


@dataclass(frozen=True, slots=True)
class Bye:
    """All ranks of the group have left."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Ranks of the group have written their stacks, but for those that are missing."""

    count: int
    missing: tuple[int, ...]


OfRank = Failing | Leaving | Outside | Entering
"""What any rank may say for all to hear."""

Report = Here | Moved | Death | LauncherGone | OfRank | Stands | Shown | RunFolder | Bye


def longest_report(group: Group) -> int:
    """Return how many bytes a message of a group may have."""
    return LONGEST_BYTES + _BYTES_PER_RANK * len(group.ranks)


def parse_report(message: Message, group: Group) -> Report:
    """Return what a watchdog says of the ranks of its group.

    Raises:
        ValueError: if it says nothing that it may say.
    """
    for kind, parse in _REPORTS.items():
        if kind in message:
            return parse(message, group)
    raise ValueError("no message of this kind")


@dataclass(frozen=True, slots=True)
class Reply:
    """The coordinator's answer to a rank that asked to report its failure."""

    rank: int
    may_speak: bool


@dataclass(frozen=True, slots=True)
class DumpStacks:
    """Write the stacks of all ranks, to a folder that all nodes may see, or None."""

    folder: Path | None


@dataclass(frozen=True, slots=True)
class ShowStacks:
    """Write the stacks of ranks that go on."""

    folder: Path


@dataclass(frozen=True, slots=True)
class StopRanks:
    """Ask all ranks to save and end, as a scheduler would."""


@dataclass(frozen=True, slots=True)
class EndRanks:
    """End all ranks with an exit code."""

    code: int


Order = Reply | DumpStacks | ShowStacks | StopRanks | EndRanks | Bye


def parse_order(message: Message, group: Group) -> Order:
    """Return what the coordinator says to the watchdog of a group.

    Raises:
        ValueError: if it says nothing that it may say.
    """
    if "reply" in message:
        return Reply(_rank(message, "reply", group), _flag(message, "may_speak"))
    if "stacks" in message:
        return DumpStacks(None if message["stacks"] is None else _path(message, "stacks"))
    if "show_stacks" in message:
        return ShowStacks(_path(message, "show_stacks"))
    if "stop" in message:
        return StopRanks()
    if "end" in message:
        return EndRanks(_integer(message, "end", most=_LARGEST_CODE))
    if "bye" in message:
        return Bye()
    raise ValueError("no order of this kind")


def _death(message: Message, group: Group) -> Death:
    facts = _get(message, "died", dict)
    return Death(
        rank=_rank(facts, "rank", group),
        host=group.host,
        signal=_optional(facts, "signal", str),
        signal_number=_optional_integer(facts, "signal_number"),
        exit_code=_optional_integer(facts, "exit_code"),
        oom_kills=_integer(facts, "oom_kills", least=-_LARGEST),
        step=_integer(facts, "step", least=-_LARGEST),
        about=parse_about(facts),
    )


def parse_about(message: Message) -> Message:
    """Return what a rank says of itself for a report: texts and numbers, and tables of them.

    Raises:
        ValueError: if it is anything else.
    """
    facts = _get(message, "about", dict)
    tables = [facts, *(value for value in facts.values() if isinstance(value, dict))]
    for table in tables:
        for value in table.values():
            if isinstance(value, list) or (isinstance(value, dict) and table is not facts):
                raise ValueError("about is nested")
    return facts


def _failing(message: Message, group: Group) -> Failing:
    code = _integer(message, "failing", least=-_LARGEST)
    return Failing(_rank(message, "rank", group), code, _flag(message, "may_be_echo"))


def _entering(message: Message, group: Group) -> Entering:
    limits = [_get(message, key, float) for key in ("entering", "first_step")]
    if not all(0 < seconds < _LARGEST for seconds in limits):
        raise ValueError("limits are out of range")
    return Entering(_rank(message, "rank", group), *limits)


def _stands(message: Message, group: Group) -> Stands:
    found = _get(message, "stands", list)
    if len(found) > len(group.ranks):
        raise ValueError("stands of more ranks than the group has")
    return Stands(tuple(_stand(each, group) for each in found))


def _stand(facts: object, group: Group) -> Stand:
    if not isinstance(facts, dict):
        raise ValueError("a stand is not an object")
    return Stand(
        rank=_rank(facts, "rank", group),
        host=group.host,
        progress=_integer(facts, "progress", least=-_LARGEST),
        step=_integer(facts, "step", least=-_LARGEST),
        state=_get(facts, "state", str),
        stack=_get(facts, "stack", str),
        collectives=parse_collectives(facts) if "collectives" in facts else (),
    )


def parse_collectives(message: Message) -> tuple[GroupPosition, ...]:
    """Return how far a rank has come in its process groups.

    Raises:
        ValueError: if it is anything else.
    """
    found = _get(message, "collectives", list)
    if len(found) > MOST_GROUPS or not all(isinstance(each, dict) for each in found):
        raise ValueError("collectives are not a short list of objects")
    return tuple(
        GroupPosition(
            group=_get(each, "group", str),
            last=_integer(each, "last"),
            pending=_integer(each, "pending"),
            name=_get(each, "name", str),
        )
        for each in found
    )


def _launcher_gone(message: Message, group: Group) -> LauncherGone:
    facts = _get(message, "launcher_gone", dict)
    return LauncherGone(
        host=group.host,
        ranks=group.ranks,
        name=_get(facts, "name", str),
        pid=_integer(facts, "pid"),
        signal=_optional(facts, "signal", str),
        is_front_end=_flag(facts, "is_front_end"),
    )


def _shown(message: Message, group: Group) -> Shown:
    missing = _get(message, "missing", list)
    if any(rank not in group.ranks for rank in missing):
        raise ValueError("missing names ranks of other groups")
    return Shown(_integer(message, "shown", most=len(group.ranks)), tuple(missing))


def _run_folder(message: Message, group: Group) -> RunFolder:
    if 0 not in group.ranks:
        raise ValueError("only rank 0's node names the run folder")
    return RunFolder(_path(message, "folder"))


_REPORTS: Mapping[str, Callable[[Message, Group], Report]] = {
    "here": lambda message, group: Here(),
    "moved": lambda message, group: Moved(_flag(message, "moved")),
    "died": _death,
    "launcher_gone": _launcher_gone,
    "shown": _shown,
    "failing": _failing,
    "leaving": lambda message, group: Leaving(_rank(message, "rank", group)),
    "outside": lambda message, group: Outside(_rank(message, "rank", group)),
    "entering": _entering,
    "stands": _stands,
    "folder": _run_folder,
    "bye": lambda message, group: Bye(),
}


def _get(facts: Message, key: str, kind: type[T]) -> T:
    value = facts.get(key)
    if type(value) is not kind:
        raise ValueError(f"{key} is not {kind.__name__}")
    return value


def _optional(facts: Message, key: str, kind: type[T]) -> T | None:
    return None if facts.get(key) is None else _get(facts, key, kind)


def _flag(facts: Message, key: str) -> bool:
    return _get(facts, key, bool)


def _integer(facts: Message, key: str, *, least: int = 0, most: int = _LARGEST) -> int:
    value = _get(facts, key, int)
    if not least <= value <= most:
        raise ValueError(f"{key} is out of range")
    return value


def _optional_integer(facts: Message, key: str) -> int | None:
    return None if facts.get(key) is None else _integer(facts, key)


def _rank(facts: Message, key: str, group: Group) -> int:
    rank = _get(facts, key, int)
    if rank not in group.ranks:
        raise ValueError(f"rank {rank} is not of the sender's group")
    return rank


def _path(facts: Message, key: str) -> Path:
    text = _get(facts, key, str)
    if "\0" in text or not text.startswith("/"):
        raise ValueError(f"{key} is not an absolute path")
    return Path(text)
