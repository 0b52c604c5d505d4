"""Standard streams: closed, full, read by nobody any more, or kept for one report."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import TextIO

from hpctrain.errors import OutputError

_NAMES = ("stdin", "stdout", "stderr")

_STDOUT, _STDERR = 1, 2


def open_missing() -> None:
    """Give a process that was started with closed standard streams such as lead nowhere.

    Otherwise the next files that it opens take their numbers, and what C libraries print on stderr
    goes into a checkpoint.
    """
    for number, name in enumerate(_NAMES):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def write_out(text: str, out: TextIO | None = None) -> None:
    """Write a result to stdout, whole, or to another stream that leads there.

    A reader that has seen enough, such as `head`, is no failure.

    Raises:
        OutputError: if it does not fit.
    """
    stream = out or sys.stdout
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        _lead_nowhere(stream)
    except OSError as error:
        _lead_nowhere(stream)
        raise OutputError(f"cannot write to stdout: {error.strerror}") from error


@contextmanager
def reserved_stdout(reserved: bool) -> Iterator[TextIO]:
    """Give a stream to stdout; where it is reserved, all other output there goes to stderr.

    That of C libraries, child processes and users' modules too: the file descriptor is exchanged.
    """
    if not reserved:
        yield sys.stdout
        return
    finish_out()
    kept = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as stream:
            yield stream
    finally:
        finish_out()
        os.dup2(kept, _STDOUT)
        os.close(kept)


def finish_out() -> None:
    """Write what was printed on stdout; what does not fit is lost without a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        _lead_nowhere(sys.stdout)


def quiet_native_libraries(environ: MutableMapping[str, str] = os.environ) -> None:
    """Ask torch's C++ side for errors only, where the user has not set a level.

    It writes its warnings to stderr by itself, once per rank. Those seen at start-up concern what
    hpctrain has dealt with: "Unable to resolve hostname ... using the loopback address" (gloo).
    Torch reads this when it is imported, so it has to be called before.
    """
    environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _lead_nowhere(stream: TextIO) -> None:
    """Let what a stream still holds vanish: Python would try to write it again at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
