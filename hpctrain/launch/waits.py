"""Waits of the start that Python cannot end: MPI_Init, and the rendezvous of torch.

While C waits for other ranks no handler of Python's runs, and no limit of ours is looked at. A
thread ends the process instead, where a signal asks for it or the limit has passed.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hpctrain.errors import ExitCode

LIMIT_VARIABLE = "HPCTRAIN_START_SECONDS"
_LIMIT_SECONDS = 300.0
# Cold file systems serve a thousand ranks that import the same packages one after the other.
_SECONDS_PER_RANK = 0.2

# Mostly it is over by then, and the signal is a stop like any other.
_GRACE_SECONDS = 1.0
# The others see that this one has spoken for them.
_SEEN_SECONDS = 0.5
_ENDING = (signal.SIGINT, signal.SIGTERM)


def limit_seconds(world_size: int | None) -> float:
    """Return how long ranks wait for others at one step of the start."""
    asked = os.environ.get(LIMIT_VARIABLE, "")
    with suppress(ValueError):
        if float(asked) > 0:
            return float(asked)
    return _LIMIT_SECONDS + _SECONDS_PER_RANK * (world_size or 1)


@contextmanager
def ended_from_outside(seconds: float, tell: Callable[[str | None], str | None]) -> Iterator[None]:
    """End the process where the body does not return in time, or not soon after a signal.

    SIGINT and SIGTERM end it a second later, if somebody handles them: those that nobody handles
    end it at once, and those that are ignored do not.

    Args:
        seconds: limit.
        tell: returns what to say at the end, None for nothing, given the name of the signal, or
            None for the limit. It may take its time.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup: int | None = None
    with suppress(ValueError):  # in another thread than the main one: signals are not ours
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(
        target=_watch, args=(reader, seconds, tell), name="hpctrain-start", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        if wakeup is not None:
            signal.set_wakeup_fd(wakeup)
        os.close(writer)
        thread.join()
        os.close(reader)


def _watch(reader: int, seconds: float, tell: Callable[[str | None], str | None]) -> None:
    """End the process unless the other end of the pipe is closed in time."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    end, asked = time.monotonic() + seconds, 0
    while True:
        left = end - time.monotonic()
        if left <= 0:
            break
        if not poll.poll(1000 * left):
            continue
        numbers = os.read(reader, 64)
        if not numbers:
            return
        ending = [number for number in numbers if number in _ENDING]
        if ending and not asked:
            asked = ending[0]
            end = min(end, time.monotonic() + _GRACE_SECONDS)
    text = tell(signal.Signals(asked).name if asked else None)
    if text is not None:
        with suppress(OSError):
            sys.stderr.write(f"hpctrain: error: {text}\n")
            sys.stderr.flush()
        time.sleep(_SEEN_SECONDS)
    os._exit(128 + asked if asked else ExitCode.LAUNCH)
