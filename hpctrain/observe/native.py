"""Native stderr: what NCCL, MPI, gloo and other C libraries print, tagged with rank and host.

File descriptor 2 of a rank becomes a pipe to a small process, which copies all of it to the stderr
that was there, and each line with its rank to ranks.log. No thread of the rank takes part, so that
it costs no step, and what a rank has printed before it crashed or was killed is not lost. Python's
`sys.stderr` goes past it: its messages have a log of their own.

A process a rank is not started for nothing: only where HPCTRAIN_LOG or NCCL_DEBUG asks for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
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
_STDERR = 2
_END_SECONDS = 1.0

_still_open: list[subprocess.Popen[bytes]] = []
"""Relays of jobs whose child processes go on, and may print."""


def is_wanted(asked: Collection[str], environ: Mapping[str, str]) -> bool:
    """Tell whether native messages are to be tagged, by words of HPCTRAIN_LOG and by variables."""
    nccl_prints = "NCCL_DEBUG" in environ and "NCCL_DEBUG_FILE" not in environ
    return nccl_prints or not {WORD, "debug"}.isdisjoint(asked)


@contextmanager
def tagged(path: Path, who: str) -> Iterator[None]:
    """Have what is printed to file descriptor 2 in the body tagged in a file as well.

    Where no process can be started all stays as it is.

    Args:
        path: of ranks.log.
        who: this rank and its host.
    """
    try:
        process, writer = _start_relay(path, who)
    except OSError:
        yield
        return
    console, before = os.dup(_STDERR), sys.stderr
    _finish(before)
    if _leads_to_stderr(before):
        own = os.dup(console)
        sys.stderr = os.fdopen(
            own, "w", encoding=before.encoding, errors="backslashreplace", buffering=1
        )
    os.dup2(writer, _STDERR)
    os.close(writer)
    try:
        yield
    finally:
        _finish(sys.stderr)
        os.dup2(console, _STDERR)
        os.close(console)
        if sys.stderr is not before:
            own_stream, sys.stderr = sys.stderr, before
            with suppress(OSError):
                own_stream.close()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            _still_open.append(process)


def _start_relay(path: Path, who: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start the process, and return it with the end of the pipe to write to."""
    reader, writer = os.pipe()
    try:
        process = start_aside(
            "hpctrain.observe.native", "relay", str(path.absolute()), who, stdin=reader
        )
    except OSError:
        os.close(writer)
        raise
    finally:
        os.close(reader)
    return process, writer


def _leads_to_stderr(stream: object) -> bool:
    """Tell whether a stream writes to file descriptor 2, as under pytest it does not."""
    try:
        return stream.fileno() == _STDERR  # type: ignore[attr-defined,no-any-return]
    except (AttributeError, OSError, ValueError):
        return False


def _finish(stream: object) -> None:
    with suppress(AttributeError, OSError, ValueError):
        stream.flush()  # type: ignore[attr-defined]


def relay(path: str, who: str) -> None:
    """Copy stdin to stderr, and its lines to ranks.log, until all who print have ended."""
    with suppress(OSError):
        # A rank may be pinned to the core that it computes on: that one is not for us.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    file, left, rest = _opened(Path(path)), MOST_BYTES, b""
    while data := os.read(0, 1 << 16):
        _copy(data)
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            lines, rest = [*lines, rest], b""
        left = _append(file, lines, who, left)
    _append(file, [rest] if rest else [], who, left)


def _opened(path: Path) -> int | None:
    """Return the descriptor of ranks.log; None: it cannot be opened, and stderr has all of it."""
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        descriptor = open_regular(path, flags, follow_links=False)
        follow_folder(path)
    except OSError:
        return None
    return descriptor


def _copy(data: bytes) -> None:
    with suppress(OSError):  # its reader may be gone
        while data:
            data = data[os.write(_STDERR, data) :]


def _append(file: int | None, lines: list[bytes], who: str, left: int) -> int:
    """Append lines in one piece; return how many bytes may still be written."""
    if file is None or left <= 0 or not any(lines):
        return left
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    texts = [line[:_LONGEST_LINE].decode("utf-8", "backslashreplace").rstrip() for line in lines]
    tagged_lines = [f"{stamp}  {who}: stderr: {printable(text)}\n" for text in texts if text]
    content = "".join(tagged_lines).encode("utf-8", "backslashreplace")
    if len(content) > left:
        content = f"{stamp}  {who}: stderr: no more than {MOST_BYTES:,} bytes of a rank\n".encode()
        left = 0
    with suppress(OSError):
        os.write(file, content)
    return left - len(content)
