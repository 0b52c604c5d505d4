"""Native output: what NCCL, MPI, gloo and other C libraries print, tagged with rank and host.

File descriptors 1 and 2 of a rank become pipes to a small process, which copies all of it to the
stdout and stderr that were there, and each line with its rank to ranks.log. NCCL's own lines go to
stdout, warnings too. No thread of the rank takes part, so that it costs no step, and what a rank
has printed before it crashed or was killed is not lost. Python's `sys.stdout` and `sys.stderr` go
past it: its messages have a log of their own.

A process a rank is not started for nothing: only where HPCTRAIN_LOG or NCCL_DEBUG asks for it.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from hpctrain.utils.files import open_regular
from hpctrain.utils.permissions import follow_folder
from hpctrain.utils.process_aside import start_aside
from hpctrain.utils.text import printable

WORD = "native"
"""Of HPCTRAIN_LOG."""

MOST_BYTES = 2**20
"""Of a rank and a job in ranks.log: all ranks together are to fill no disk."""

_LONGEST_LINE = 2000
"""Of a line in ranks.log; what is longer goes on in the next one."""

_NAMES = {1: "stdout", 2: "stderr"}
_END_SECONDS = 1.0
_NO_FILES = ("", "/dev/stderr", "/dev/stdout")

_still_open: list[subprocess.Popen[bytes]] = []
"""Relays of jobs whose child processes go on, and may print."""


def is_wanted(asked: Collection[str], environ: Mapping[str, str]) -> bool:
    """Tell whether native messages are to be tagged, by words of HPCTRAIN_LOG and by variables."""
    nccl_prints = environ.get("NCCL_DEBUG") and environ.get("NCCL_DEBUG_FILE", "") in _NO_FILES
    return bool(nccl_prints) or not {WORD, "debug"}.isdisjoint(asked)


@contextmanager
def tagged(path: Path, who: str) -> Iterator[None]:
    """Have what is printed to file descriptors 1 and 2 in the body tagged in a file as well.

    Where no process can be started, or a descriptor is closed, that stays as it is.

    Args:
        path: of ranks.log.
        who: this rank and its host.
    """
    consoles: dict[int, int] = {}
    for descriptor in _NAMES:
        with suppress(OSError):
            consoles[descriptor] = os.dup(descriptor)
    try:
        process, writers = _start_relay(path, who, consoles)
    except OSError:
        for console in consoles.values():
            os.close(console)
        yield
        return
    with ExitStack() as stack:
        stack.callback(_wait_for, process)
        for descriptor, writer in writers.items():
            stack.enter_context(_led_to(writer, descriptor, consoles[descriptor]))
        yield


@contextmanager
def _led_to(writer: int, descriptor: int, console: int) -> Iterator[None]:
    """Have a descriptor of this process lead into a pipe, and Python's stream past it."""
    name = _NAMES[descriptor]
    before = getattr(sys, name)
    _finish(before)
    if _leads_to(before, descriptor):
        own = os.fdopen(os.dup(console), "w", encoding=before.encoding, errors=before.errors)
        own.reconfigure(line_buffering=before.line_buffering, write_through=before.write_through)
        setattr(sys, name, own)
    os.dup2(writer, descriptor)
    os.close(writer)
    try:
        yield
    finally:
        now = getattr(sys, name)
        _finish(now)
        os.dup2(console, descriptor)
        os.close(console)
        if now is not before:
            setattr(sys, name, before)
            with suppress(OSError):
                now.close()


def _wait_for(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        _still_open.append(process)


def _start_relay(
    path: Path, who: str, consoles: Mapping[int, int]
) -> tuple[subprocess.Popen[bytes], dict[int, int]]:
    """Start the process, and return it with the ends of the pipes to write to, by descriptor."""
    readers: dict[int, int] = {}
    writers: dict[int, int] = {}
    try:
        for descriptor in consoles:
            readers[descriptor], writers[descriptor] = os.pipe()
        streams = [
            f"{readers[each]} {console} {_NAMES[each]}" for each, console in consoles.items()
        ]
        process = start_aside(
            *("hpctrain.observe.native", "relay", str(path.absolute()), who, *streams),
            stdin=subprocess.DEVNULL,
            pass_fds=[*readers.values(), *consoles.values()],
        )
    except OSError:
        for writer in writers.values():
            os.close(writer)
        raise
    finally:
        for reader in readers.values():
            os.close(reader)
    return process, writers


def _leads_to(stream: object, descriptor: int) -> bool:
    """Tell whether a stream writes to a descriptor, as under pytest it does not."""
    if not isinstance(stream, TextIOWrapper):
        return False
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError):
        return False


def _finish(stream: object) -> None:
    with suppress(AttributeError, OSError, ValueError):
        stream.flush()  # type: ignore[attr-defined]


def relay(path: str, who: str, *streams: str) -> None:
    """Copy streams to where they went, and their lines to ranks.log, until all printers have ended.

    Args:
        path: of ranks.log.
        who: the rank and its host.
        streams: the descriptors to read from and to write to, and the name, of each.
    """
    with suppress(OSError):
        # A rank may be pinned to the core that it computes on: that one is not for us.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    file, left = _opened(Path(path)), MOST_BYTES
    waiting = select.poll()
    open_streams: dict[int, tuple[int, str]] = {}
    for stream in streams:
        source, target, name = stream.split()
        open_streams[int(source)] = int(target), f"{who}: {name}"
        waiting.register(int(source), select.POLLIN)
    rests = dict.fromkeys(open_streams, b"")
    while open_streams:
        for reader, _ in waiting.poll():
            console, whose = open_streams[reader]
            data = os.read(reader, 1 << 16)
            _copy(data, console)
            *lines, rest = (rests[reader] + data).split(b"\n")
            if not data or len(rest) > _LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            rests[reader] = rest
            left = _append(file, lines, whose, left)
            if not data:
                waiting.unregister(reader)
                del open_streams[reader]


def _opened(path: Path) -> int | None:
    """Return the descriptor of ranks.log; None: it cannot be opened, and stderr has all of it."""
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        descriptor = open_regular(path, flags, follow_links=False)
        follow_folder(path)
    except OSError:
        return None
    return descriptor


def _copy(data: bytes, console: int) -> None:
    with suppress(OSError):  # its reader may be gone
        while data:
            data = data[os.write(console, data) :]


def _append(file: int | None, lines: list[bytes], whose: str, left: int) -> int:
    """Append lines in one piece; return how many bytes may still be written."""
    if file is None or left <= 0 or not any(lines):
        return left
    head = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {whose}: "
    texts = [piece.decode("utf-8", "backslashreplace").rstrip() for piece in _pieces(lines)]
    tagged_lines = [f"{head}{printable(text)}\n" for text in texts if text]
    content = "".join(tagged_lines).encode("utf-8", "backslashreplace")
    if len(content) > left:
        content = f"{head}no more than {MOST_BYTES:,} bytes of a rank\n".encode()
        left = 0
    with suppress(OSError):
        os.write(file, content)
    return left - len(content)


def _pieces(lines: list[bytes]) -> Iterator[bytes]:
    for line in lines:
        for start in range(0, len(line), _LONGEST_LINE):
            yield line[start : start + _LONGEST_LINE]
