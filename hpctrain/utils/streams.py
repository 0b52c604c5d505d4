"""Standard streams that may be closed, full, or read by nobody any more."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from hpctrain.errors import OutputError

_NAMES = ("stdin", "stdout", "stderr")


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


def finish_out() -> None:
    """Write what was printed on stdout; what does not fit is lost without a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        _lead_nowhere(sys.stdout)


def _lead_nowhere(stream: TextIO) -> None:
    """Let what a stream still holds vanish: Python would try to write it again at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
