"""A rank's side of the watchdog: its heartbeat in shared memory, and its line to the watchdog."""

from __future__ import annotations

import errno
import faulthandler
import hmac
import json
import mmap
import os
import socket
import struct
import sys
import threading
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from hpctrain.errors import ExitCode
from hpctrain.launch.watchdog.evidence import (
    STACKS_SIGNAL,
    in_time,
    positions,
    python_stacks,
    write_ending,
)
from hpctrain.launch.watchdog.protocol import Channel, Message
from hpctrain.utils.files import put_file

_FIELDS = 3
_PROGRESS, _LONG_PHASE, _STEP = range(_FIELDS)
NUM_NOTES = 10
"""Numbers that a rank notes for others of its node, whose meaning is theirs alone."""
_ROW = _FIELDS + NUM_NOTES
ROW_BYTES = 8 * _ROW

_ANSWER_SECONDS = 1.5
_WATCHED_SECONDS = 20.0
_WRITE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What a rank has last said of itself.

    Attributes:
        progress: grows with every heartbeat; 0: none yet.
        long_phase: it is in something that may take long, such as its first step.
        step: the last one that it finished.
    """

    progress: int
    long_phase: bool
    step: int


class Pulse:
    """A rank's heartbeats. Writing one costs as much as an assignment: no call, no lock."""

    def __init__(self) -> None:
        # Its own until there is a watchdog.
        self._row = memoryview(bytearray(ROW_BYTES)).cast("q")
        self._row[_LONG_PHASE] = 1
        self._rows = self._row

    def tick(self) -> None:
        """Say that this rank makes progress."""
        self._row[_PROGRESS] += 1

    def step_done(self, step: int) -> None:
        """Say that a whole step is done; from the first one on the shorter limit holds."""
        self._row[_STEP] = step
        self._row[_LONG_PHASE] = 0
        self._row[_PROGRESS] += 1

    def begin(self) -> None:
        """Have the longer limit hold again, as before a first step."""
        self._row[_LONG_PHASE] = 1

    @contextmanager
    def long_phase(self) -> Iterator[None]:
        """Have the longer limit hold in the body."""
        before = self._row[_LONG_PHASE]
        self._row[_LONG_PHASE] = 1
        try:
            yield
        finally:
            self._row[_LONG_PHASE] = before
            self._row[_PROGRESS] += 1

    def share(self, memory: mmap.mmap, index: int) -> None:
        """Go on in row `index` of memory that the watchdog sees."""
        rows = memoryview(memory).cast("q")
        row = rows[_ROW * index : _ROW * (index + 1)]
        row[:] = self._row
        self._row, self._rows = row, rows

    def note(self, numbers: Sequence[int]) -> None:
        """Note NUM_NOTES numbers for whoever of this node reads them, by one copy."""
        self._row[_FIELDS:] = array("q", numbers)

    def notes(self) -> list[list[int]]:
        """Return what each rank of this node has noted last; of a rank alone, its own."""
        numbers = self._rows.tolist()
        return [numbers[first + _FIELDS : first + _ROW] for first in range(0, len(numbers), _ROW)]

    @property
    def step(self) -> int:
        return self._row[_STEP]


def read_row(memory: mmap.mmap, index: int) -> Reading:
    """Return what the rank of row `index` has written."""
    with memoryview(memory) as view, view.cast("q") as rows:
        progress, long_phase, step = rows[_ROW * index : _ROW * index + _FIELDS].tolist()
    return Reading(progress, bool(long_phase), step)


class WatchdogClient:
    """Says what the watchdog cannot see, and does what it asks; made by `join`."""

    def __init__(self, connection: socket.socket, pulse: Pulse, index: int, stacks: int) -> None:
        self._connection = connection
        self._stacks = stacks
        self._channel = Channel(connection)
        self._pulse = pulse
        self._index = index
        self._watched = threading.Event()
        self._answered = threading.Event()
        self._may_speak = True
        self._has_left = False
        self._socket = _inode(connection)
        self._folder: Path | None = None
        # Blocked until the watchdog has something to say, which is next to never.
        thread = threading.Thread(target=self._listen, name="hpctrain-watchdog", daemon=True)
        thread.start()

    def wait_until_watched(self) -> None:
        """Return once the watchdog has taken this rank in; it has mostly done so long ago."""
        self._watched.wait(_WATCHED_SECONDS)

    def send_folder(self, folder: Path) -> None:
        """Say where reports go; rank 0's word counts."""
        self._folder = folder
        self._channel.send({"folder": str(folder.absolute())})

    def send_about(self, about: Mapping[str, object]) -> None:
        """Say what a report on this rank should hold if it can no longer write one."""
        self._channel.send({"about": dict(about)})

    def ask_to_speak(self, code: int, *, may_be_echo: bool) -> bool:
        """Ask whether this rank's failure is the one to tell.

        Where nobody answers in time, it is.

        Args:
            code: the exit code that the job is to end with.
            may_be_echo: the failure may be the mere consequence of another rank's end.
        """
        self._channel.send({"failing": code, "may_be_echo": may_be_echo})
        self._answered.wait(_ANSWER_SECONDS)
        return self._may_speak

    def leaving(self) -> None:
        """Say that this rank has done its part, and waits for the others."""
        self._channel.send({"leaving": True})

    def outside(self) -> None:
        """Say that this rank goes on in its program, where it may take its time."""
        self._channel.send({"outside": True})

    def entering(self, hang_timeout_seconds: float, first_step_timeout_seconds: float) -> None:
        """Say that this rank enters a job's body; rank 0's limits hold in there."""
        limits = (float(hang_timeout_seconds), float(first_step_timeout_seconds))
        self._channel.send(dict(zip(("entering", "first_step"), limits, strict=True)))

    def leave(self) -> None:
        """Say that this rank ends in good order."""
        self._has_left = True
        self._channel.send({"bye": True})
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def _listen(self) -> None:
        with suppress(OSError, ValueError):
            _, descriptors, _, _ = socket.recv_fds(self._connection, 1, 1)
            if not descriptors:
                return
            memory = mmap.mmap(descriptors[0], 0)
            os.close(descriptors[0])
            self._pulse.share(memory, self._index)
            self._watched.set()
            while (messages := self._channel.receive()) is not None:
                for message in messages:
                    self._obey(message)
        # Code that closes descriptors it does not know has ended the line, not the watchdog.
        is_open = _inode(self._connection) == self._socket
        if self._watched.is_set() and not self._has_left and is_open:
            self._end_unwatched()

    def _end_unwatched(self) -> None:
        """End this rank, whose watchdog was killed: a job that nobody watches may hang for ever."""
        if self._index == 0:
            reason = f"the watchdog of {socket.gethostname()} was killed, and the job ends"
            with suppress(OSError):
                os.write(2, f"hpctrain: {reason}.\n".encode())
            folder = self._folder
            if folder is not None:
                in_time(lambda: write_ending(folder, ExitCode.LAUNCH, reason), _WRITE_SECONDS)
        else:
            time.sleep(_WRITE_SECONDS + 1)  # launchers end the job with the first rank that leaves
        os._exit(ExitCode.LAUNCH)

    def _obey(self, message: Message) -> None:
        if "end" in message:
            os._exit(message["end"])
        if "may_speak" in message:
            self._may_speak = message["may_speak"]
            self._answered.set()
        if "show_stacks" in message:
            with suppress(OSError):
                os.write(self._stacks, python_stacks().encode())
            self._channel.send({"shown": True})
        if "flight_recorder" in message:
            self._send_record(Path(message["flight_recorder"]))

    def _send_record(self, path: Path) -> None:
        """Tell how far this rank has come in its collectives, and write the whole record."""
        record = flight_record()
        known = []
        if record is not None:
            with suppress(ValueError, KeyError, TypeError):
                known = [asdict(position) for position in positions(record)]
        self._channel.send({"collectives": known})
        if record is not None:
            in_time(lambda: put_file(path, record), _WRITE_SECONDS)


def _inode(connection: socket.socket) -> int | None:
    """Return what names an open socket; None once its descriptor is closed."""
    try:
        return os.fstat(connection.fileno()).st_ino
    except OSError:
        return None


def peer_of(connection: socket.socket) -> tuple[int, bool]:
    """Return the process at the other end of a local connection, and whether it is of our user."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", packed)
    return pid, uid == os.geteuid()


def proof_of_rank(secret: str, rank: int) -> str:
    """Return what a rank says to its watchdog to prove that it knows the secret."""
    return hmac.new(secret.encode(), f"rank {rank}".encode(), "sha256").hexdigest()


def join(address: str, secret: str, rank: int, index: int, pulse: Pulse) -> WatchdogClient:
    """Connect to the watchdog of this node, and let it ask for stacks.

    Args:
        address: name of its socket, which is no secret.
        secret: of the job.
        rank: of this process.
        index: of this rank in its group, and so of its row in the shared memory.
        pulse: is shared from the moment when the watchdog answers.

    Raises:
        OSError: if it cannot be reached.
    """
    stacks = os.memfd_create("hpctrain-stacks")
    faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    if not peer_of(connection)[1]:
        connection.close()
        raise OSError(errno.EACCES, "another user's process has taken its address")
    hello = json.dumps({"hello": rank, "proof": proof_of_rank(secret, rank)}).encode() + b"\n"
    socket.send_fds(connection, [hello], [stacks])
    # It stays open as long as the process: faulthandler goes on writing to it.
    return WatchdogClient(connection, pulse, index, stacks)


def flight_record() -> bytes | None:
    """Return torch's JSON record of the last collectives of this process; None without one."""
    torch = sys.modules.get("torch")
    distributed = sys.modules.get("torch.distributed")
    if torch is None or distributed is None or not distributed.is_initialized():
        return None
    # Each kind of process group has a recorder of its own; before torch 2.9 gloo had none.
    is_nccl = distributed.get_backend() == "nccl"
    name = "_dump_nccl_trace_json" if is_nccl else "_dump_fr_trace_json"
    with suppress(AttributeError, RuntimeError):
        record = getattr(torch._C._distributed_c10d, name)()
        return record if isinstance(record, bytes) else record.encode()
    return None
