"""A process as a watchdog knows it: by the kernel, and a rank by what it has said too."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from contextlib import suppress
from dataclasses import dataclass, field

from hpctrain.launch.watchdog.evidence import GroupPosition
from hpctrain.launch.watchdog.protocol import Channel
from hpctrain.utils.proc import EXIT_CODE, FLAGS, STATE, stat_fields

_EXITING = 0x4  # PF_EXITING of the kernel's sched.h

# Of struct pidfd_info, whose last member is the exit code. Source: linux/pidfd.h of Linux 6.15.
_PIDFD_INFO_BYTES = 64
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_GET_INFO = 3 << 30 | _PIDFD_INFO_BYTES << 16 | 0xFF << 8 | 11


def state(pid: int) -> str:
    """Return the state letter of a process (R, S, D, T, Z), "" if there is none."""
    fields = stat_fields(pid)
    return fields[STATE] if fields else ""


def is_ending(pid: int) -> bool:
    """Tell whether a process is gone or on its way out."""
    fields = stat_fields(pid)
    return not fields or fields[STATE] in "ZX" or bool(int(fields[FLAGS]) & _EXITING)


def wait_status(pid: int, pidfd: int | None = None) -> int | None:
    """Return how a process ended, as `os.wait` would tell its parent; None if nobody knows.

    /proc knows it until the parent has asked, which is soon; newer kernels keep it for those who
    hold a pidfd.
    """
    fields = stat_fields(pid)
    if fields:
        return int(fields[EXIT_CODE])
    if pidfd is None:
        return None
    information = bytearray(struct.pack("=Q", _PIDFD_INFO_EXIT).ljust(_PIDFD_INFO_BYTES, b"\0"))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, information)
    except OSError:  # Linux before 6.15
        return None
    (mask,) = struct.unpack_from("=Q", information)
    (status,) = struct.unpack_from("=i", information, _PIDFD_INFO_BYTES - 4)
    return status if mask & _PIDFD_INFO_EXIT else None


def signal_name(number: int) -> str:
    """Return a signal's name, such as "SIGKILL"."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def open_pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when a process ends; None on older kernels."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


@dataclass(slots=True)
class Rank:
    """One rank; without a channel it has not joined yet.

    Attributes:
        stacks: memory file that the rank writes its stacks to.
        has_shown: it has done so when it was asked.
        collectives: how far it has come in each process group; None until it has answered.
    """

    rank: int
    index: int
    channel: Channel | None = None
    pid: int = 0
    pidfd: int | None = None
    stacks: int = -1
    about: dict[str, object] = field(default_factory=dict)
    has_shown: bool = False
    collectives: tuple[GroupPosition, ...] | None = None
    left: bool = False
    gone: bool = False

    @property
    def alive(self) -> bool:
        return self.channel is not None and not (self.left or self.gone)

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        with suppress(OSError):
            if self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, number)
            else:
                os.kill(self.pid, number)
