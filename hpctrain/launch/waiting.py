"""Waits of the start: how long they may take, what ends them, and who is missing.

While C waits for other ranks, in MPI_Init or the rendezvous of torch, no handler of Python's runs,
and no limit of ours is looked at. A thread ends the process instead, where a signal asks for it or
the limit has passed.

Ranks that wait for others answer each other, so that each of them knows who is missing. Nothing is
sent as long as everybody comes in time.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from hpctrain.errors import ExitCode, LaunchError
from hpctrain.utils.text import listed, ranges

LIMIT_VARIABLE = "HPCTRAIN_START_SECONDS"
_LIMIT_SECONDS = 300.0
# Cold file systems serve a thousand ranks that import the same packages one after the other.
_SECONDS_PER_RANK = 0.2

# Mostly it is over by then, and the signal is a stop like any other.
_GRACE_SECONDS = 1.0
# The others see that this one has spoken for them.
_SEEN_SECONDS = 0.5
_ENDING = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger("hpctrain")

QUIET_SECONDS = 1.0
"""A wait of this length is looked at more closely."""

HEAD_START_SECONDS = 10.0
"""By then the rank that reports for all has ended the job."""

# Mostly somebody reads a cold file system: a note names who is waited for.
_NOTE_SECONDS = 60.0
_NOTED_RANKS = 256
_TAG = 18512
_ANSWER_SECONDS = 3.0
_SHOWN = 8


def limit_seconds(world_size: int | None) -> float:
    """Return how long ranks wait for others at one step of the start."""
    asked = os.environ.get(LIMIT_VARIABLE, "")
    with suppress(ValueError):
        if float(asked) > 0:
            return float(asked)
    return _LIMIT_SECONDS + _SECONDS_PER_RANK * (world_size or 1)


@contextmanager
def ended_from_outside(
    seconds: float, report: Callable[[str | None], str | None]
) -> Iterator[None]:
    """End the process where the body does not return in time, or not soon after a signal.

    SIGINT and SIGTERM end it a second later, if somebody handles them: those that nobody handles
    end it at once, and those that are ignored do not.

    Args:
        seconds: limit.
        report: returns what to say at the end, None for nothing, given the name of the signal, or
            None for the limit. It may take its time.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup: int | None = None
    with suppress(ValueError):  # in another thread than the main one: signals are not ours
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(
        target=_watch, args=(reader, seconds, report), name="hpctrain-start", daemon=True
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


def _watch(reader: int, seconds: float, report: Callable[[str | None], str | None]) -> None:
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
    text = report(signal.Signals(asked).name if asked else None)
    if text is not None:
        with suppress(OSError):
            sys.stderr.write(f"hpctrain: error: {text}\n")
            sys.stderr.flush()
        time.sleep(_SEEN_SECONDS)
    os._exit(128 + asked if asked else ExitCode.LAUNCH)


class RollCall:
    """One rank's part in finding out who is missing at one step.

    Args:
        communicator: mpi4py's, of all ranks that are meant to come.
        step: number of the step, by which answers of steps before are recognized.
        limit_seconds: how long to wait before others are asked.
    """

    def __init__(self, communicator: Any, step: int, limit_seconds: float) -> None:
        self._communicator = communicator
        self._step = step
        self._limit_seconds = limit_seconds
        self._program = program()
        self._programs = {communicator.Get_rank(): self._program}
        self._sent: dict[int, Any] = {}
        self._asked_at: float | None = None
        self._has_noted = False

    def attend(self, waited_seconds: float) -> None:
        """Answer those who ask, and ask when it is time; to be called as long as the wait lasts.

        Raises:
            LaunchError: naming who is missing, some seconds after the limit.
        """
        self._answer()
        communicator, limit = self._communicator, self._limit_seconds
        if self._asked_at is None:
            is_small = communicator.Get_size() <= _NOTED_RANKS
            if waited_seconds > (min(_NOTE_SECONDS, limit) if is_small else limit):
                self._asked_at = time.monotonic()
                for rank in range(communicator.Get_size()):
                    self._send(rank)
            return
        is_reporter = communicator.Get_rank() == min(self._programs)
        if time.monotonic() - self._asked_at < _ANSWER_SECONDS:
            return
        seconds = limit + _ANSWER_SECONDS + (0.0 if is_reporter else HEAD_START_SECONDS)
        if waited_seconds > seconds:
            raise LaunchError(missing_text(self._programs, communicator.Get_size(), limit))
        if is_reporter and not self._has_noted and waited_seconds < limit:
            self._has_noted = True
            text = missing_text(self._programs, communicator.Get_size(), waited_seconds)
            logger.warning("%s This is an error after %.0f s.", text, limit)

    def _answer(self) -> None:
        from mpi4py import MPI

        status = MPI.Status()
        while self._communicator.Iprobe(MPI.ANY_SOURCE, _TAG, status):
            answer = array("i", [0, 0])
            rank = status.Get_source()
            self._communicator.Recv(answer, rank, _TAG)
            # One that is further on has been here.
            if answer[0] >= self._step:
                self._programs[rank] = answer[1]
            self._send(rank)

    def _send(self, rank: int) -> None:
        if rank not in self._sent and rank != self._communicator.Get_rank():
            answer = array("i", [self._step, self._program])
            # Never waited for: the other may not come. The buffer is kept.
            self._sent[rank] = (answer, self._communicator.Isend(answer, rank, _TAG))


def program() -> int:
    """Return which of the programs that one mpirun has started this is, from 0."""
    from mpi4py import MPI

    number = MPI.COMM_WORLD.Get_attr(MPI.APPNUM)
    return number if isinstance(number, int) and number > 0 else 0


def missing_text(programs: Mapping[int, int], world_size: int, seconds: float) -> str:
    """Return a message that names who has not come.

    Args:
        programs: of the ranks that have.
        world_size: number of all ranks.
        seconds: limit that has passed.
    """
    missing = [rank for rank in range(world_size) if rank not in programs]
    if not missing:
        return (
            f"all {world_size} ranks have come to this step of the start, and it is not done after "
            f"{seconds:.0f} s: MPI's network between them does not work"
        )
    text = (
        f"{len(missing)} of {world_size} ranks have not come to the start of this job within "
        f"{seconds:.0f} s: {listed(ranges(missing), _SHOWN)}."
    )
    if len(programs) < world_size and any(programs.values()):
        text += f" MPI.APPNUM is {max(programs.values())} here: one mpirun has started several."
    return (
        f"{text} If they run another program, give hpctrain a communicator of its own ranks: "
        "hpctrain.connect(communicator=...)."
    )
