"""Control planes: over MPI, few and small messages from host memory; of one process."""

from __future__ import annotations

import pickle
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.launch.waiting import QUIET_SECONDS, RollCall, limit_seconds, program

_LONGEST_PAUSE_SECONDS = 0.005


class MPICommunicator:
    """The control plane over MPI, from host memory.

    Blocking MPI calls poll as fast as they can: sixteen ranks in a barrier on two cores starve
    the one that works. Every wait here tests a non-blocking request with short, growing pauses.

    Making it is collective over the ranks of the communicator that is given, and waits for them.
    """

    def __init__(self, communicator: Any, library: str) -> None:
        self._asks_on = communicator
        self._limit_seconds: float | None = limit_seconds(communicator.Get_size())
        self._num_waits = 0
        self._messages = self._duplicate(communicator)
        # A posted maximum is still in flight while other messages pass.
        self._reductions = self._duplicate(communicator)
        self._asks_on = self._messages
        self.library = library
        self.program = program()
        self.rank: int = communicator.Get_rank()
        self.world_size: int = communicator.Get_size()

    def limit(self, seconds: float | None) -> None:
        """Say how long one wait for others may take; None: for ever."""
        self._limit_seconds = seconds

    def free(self) -> None:
        """Give the communicators back to MPI, which goes on without. Collective: all ranks."""
        self._reductions.Free()
        self._messages.Free()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank; it must pickle. Collective: all ranks."""
        payload = bytearray(pickle.dumps(value)) if self.rank == 0 else bytearray()
        size = array("q", [len(payload)])
        self._wait(self._messages.Ibcast(size, root=0))
        if self.rank != 0:
            payload = bytearray(size[0])
        self._wait(self._messages.Ibcast(payload, root=0))
        return value if self.rank == 0 else pickle.loads(payload)

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order. Collective: all ranks."""
        payload = pickle.dumps(value)
        sizes = array("q", [0] * self.world_size)
        self._wait(self._messages.Iallgather(array("q", [len(payload)]), sizes))
        received = bytearray(sum(sizes))
        self._wait(self._messages.Iallgatherv(payload, (received, list(sizes))))
        values, start = [], 0
        for size in sizes:
            values.append(pickle.loads(received[start : start + size]))
            start += size
        return values

    def barrier(self) -> None:
        """Return once every rank has come. Collective: all ranks."""
        self._wait(self._messages.Ibarrier())

    def start_max(self, values: Sequence[int]) -> PendingMaximum:
        """Start an elementwise maximum of int64 values. Collective: all ranks."""
        from mpi4py import MPI

        sent = array("q", values)
        received = array("q", [0] * len(values))
        request = self._reductions.Iallreduce(sent, received, op=MPI.MAX)
        return PendingMaximum(request, sent, received)

    def _duplicate(self, communicator: Any) -> Any:
        duplicate, request = communicator.Idup()
        self._wait(request)
        return duplicate

    def _wait(self, request: Any) -> None:
        """Return once a request is done.

        Raises:
            LaunchError: naming those who have not come within the limit.
        """
        self._num_waits += 1
        if self._limit_seconds is None:
            _wait(request)
            return
        began, pause, roll = time.monotonic(), 0.0, None
        while not request.Test():
            time.sleep(pause)
            pause = min(pause + 2e-5, _LONGEST_PAUSE_SECONDS)
            waited = time.monotonic() - began
            if waited > min(QUIET_SECONDS, self._limit_seconds):
                roll = roll or RollCall(self._asks_on, self._num_waits, self._limit_seconds)
                roll.attend(waited)


class PendingMaximum:
    """A maximum in flight; it keeps the buffers that MPI still reads and writes."""

    def __init__(self, request: Any, sent: array[int], received: array[int]) -> None:
        self._request = request
        self._sent = sent
        self._received = received

    def wait(self) -> tuple[int, ...]:
        """Return the elementwise maximum over all ranks."""
        _wait(self._request)
        return tuple(self._received)


def _wait(request: Any) -> None:
    pause = 0.0
    while not request.Test():
        time.sleep(pause)
        pause = min(pause + 2e-5, _LONGEST_PAUSE_SECONDS)


class SingleCommunicator:
    """Everybody is here already."""

    rank = 0
    world_size = 1

    def limit(self, seconds: float | None) -> None:
        """Nobody is waited for."""

    def broadcast(self, value: Any) -> Any:
        """Return the value."""
        return value

    def all_gather(self, value: Any) -> list[Any]:
        """Return the one value."""
        return [value]

    def barrier(self) -> None:
        """Return at once."""

    def start_max(self, values: Sequence[int]) -> Settled:
        """Return the values as their own maximum."""
        return Settled(tuple(values))


@dataclass(frozen=True, slots=True)
class Settled:
    """A reduction that has its result."""

    values: tuple[int, ...]

    def wait(self) -> tuple[int, ...]:
        """Return the elementwise maximum over all ranks."""
        return self.values
