"""What the kernel knows of another process: whether it lives, how it ended, what it waits for."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from contextlib import suppress
from pathlib import Path

_EXITING = 0x4  # PF_EXITING of the kernel's sched.h

# Of struct pidfd_info, whose last member is the exit code. Source: linux/pidfd.h of Linux 6.15.
_PIDFD_INFO_BYTES = 64
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_GET_INFO = 3 << 30 | _PIDFD_INFO_BYTES << 16 | 0xFF << 8 | 11

# Positions after the command's closing bracket. Source: man 5 proc_pid_stat.
_STATE, _FLAGS, _EXIT_CODE = 0, 6, 49


def state(pid: int) -> str:
    """Return the state letter of a process (R, S, D, T, Z), "" if there is none."""
    fields = _stat(pid)
    return fields[_STATE] if fields else ""


def is_ending(pid: int) -> bool:
    """Tell whether a process is gone or on its way out."""
    fields = _stat(pid)
    return not fields or fields[_STATE] in "ZX" or bool(int(fields[_FLAGS]) & _EXITING)


def wait_status(pid: int, pidfd: int | None = None) -> int | None:
    """Return how a process ended, as `os.wait` would tell its parent; None if nobody knows.

    /proc knows it until the parent has asked, which is soon; newer kernels keep it for those who
    hold a pidfd.
    """
    fields = _stat(pid)
    if fields:
        return int(fields[_EXIT_CODE])
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


def num_oom_kills() -> int:
    """Return how many processes of this control group the kernel has killed for memory."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, group = line.split(":", 2)
            root, name = Path("/sys/fs/cgroup"), "memory.events"
            if controllers:
                root, name = root / "memory", "memory.oom_control"
            if controllers in ("", "memory"):
                events = (root / group.lstrip("/") / name).read_text(encoding="ascii")
                counts = dict(line.split() for line in events.splitlines())
                return int(counts.get("oom_kill", 0))
    return 0


def open_pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when a process ends; None on older kernels."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    # The command may hold spaces and brackets itself.
    return text.rpartition(")")[2].split()
