"""Who and where a process is, the little it may ask of the others, and how all of them fail.

Frozen facts and a protocol; `hpctrain.launch` finds the facts and implements the protocol over
MPI, over a torch.distributed store, and for one process. Everything below it receives them as
arguments.

A failure of one rank becomes known to all by `raise_together`, `on_rank_zero` or `on_all_ranks`, so
that one reports it and all leave in order, rather than by a rank that others wait for in vain.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from hpctrain.errors import HpctrainError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The place of one process in its world.

    Attributes:
        rank: 0 to world_size - 1.
        local_rank: 0 to local_world_size - 1, among the ranks of this node.
        node_rank: index of this node, in the order of each node's lowest rank.
        hosts: host name of every node, in the order of `node_rank`.
        launcher: label of the row of `hpctrain.launch.launchers` that started the job.
        mpi: name and version of the bound MPI library; None in a world without MPI.
        reasons: where each value came from, such as {"rank": "PMI_RANK=3, confirmed by MPI"}.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int
    hosts: tuple[str, ...]
    launcher: str
    mpi: str | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def host(self) -> str:
        """Host name of this process's node."""
        return self.hosts[self.node_rank]

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


class Pending(Protocol):
    """A reduction that was started and not yet waited for."""

    def wait(self) -> tuple[int, ...]:
        """Return the elementwise maximum over all ranks."""
        ...


class Communicator(Protocol):
    """The control plane: few, small messages between all ranks. Gradients do not go here.

    Every method but `limit` is collective: all ranks call it, in the same order. None of them burns
    a core while it waits. Only `start_max` may overlap other calls; it has a channel of its own.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def limit(self, seconds: float | None) -> None:
        """Say how long one wait for the others may take; None: for ever. Not collective."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank. Collective: all ranks.

        It is of the types that `hpctrain.launch.messages` knows.
        """
        ...

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, of the same types, in rank order. Collective: all ranks."""
        ...

    def barrier(self) -> None:
        """Return once every rank has come. Collective: all ranks."""
        ...

    def start_max(self, values: Sequence[int]) -> Pending:
        """Start an elementwise maximum of int64 values, to be waited for later.

        Collective: all ranks.
        """
        ...


@contextmanager
def raise_together(communicator: Communicator) -> Iterator[None]:
    """Raise on every rank if the body raises an HpctrainError on any. Collective: all ranks.

    The body must not communicate, or must fail in the same place on every rank.

    Raises:
        HpctrainError: of the class of the lowest failing rank, `everywhere`, naming the ranks
            where only some have failed.
    """
    failure: HpctrainError | None = None
    try:
        yield
    except HpctrainError as error:
        if error.everywhere:
            raise
        failure = error
    _raise_first(communicator.all_gather((socket.gethostname(), failure)), failure)


def on_rank_zero(communicator: Communicator, make: Callable[[], T]) -> T:
    """Return on every rank what `make()` returns on rank 0, the only one to call it.

    Collective: all ranks.

    Raises:
        HpctrainError: on every rank, if it fails there.
    """
    outcome = _outcome(make) if communicator.rank == 0 else None
    value, error = communicator.broadcast(outcome)
    if error is not None:
        error.everywhere = True
        raise error
    return value  # type: ignore[no-any-return]


def on_all_ranks(communicator: Communicator, make: Callable[[], T]) -> list[T]:
    """Return on every rank what `make()` returned on each, in rank order.

    Collective: all ranks. `make` itself must not communicate.

    Raises:
        HpctrainError: as `raise_together` does.
    """
    value, failure = _outcome(make)
    outcomes = communicator.all_gather((socket.gethostname(), failure, value))
    _raise_first([(host, error) for host, error, _ in outcomes], failure)
    return [value for _, _, value in outcomes]


def _outcome(make: Callable[[], T]) -> tuple[T | None, HpctrainError | None]:
    try:
        return make(), None
    except HpctrainError as error:
        return None, error


def _raise_first(
    outcomes: Sequence[tuple[str, HpctrainError | None]], own: HpctrainError | None
) -> None:
    """Raise the failure of the lowest rank, if any rank has one; equal on all of them.

    Args:
        outcomes: host and failure of every rank, in rank order.
        own: failure of this rank, whose traceback stays with what is raised.
    """
    failed = [(rank, host, error) for rank, (host, error) in enumerate(outcomes) if error]
    if not failed:
        return
    rank, host, first = failed[0]
    message = str(first)
    if len({str(error) for _, _, error in failed}) > 1 or len(failed) < len(outcomes):
        others = f" (and {len(failed) - 1} more of {len(outcomes)})" if failed[1:] else ""
        message = f"rank {rank} on {host}{others}: {message}"
    raise type(first)(message, everywhere=True) from own


@contextmanager
def closing_together(communicator: Communicator, close: Callable[[], None]) -> Iterator[None]:
    """Call `close` after the body where all ranks come to it: success, or a shared failure.

    Collective: all ranks. After a failure of this rank alone nothing that waits may follow; one
    process has nobody to wait for.
    """
    try:
        yield
    except BaseException as error:
        if communicator.world_size == 1 or getattr(error, "everywhere", False):
            communicator.barrier()
            close()
        raise
    communicator.barrier()
    close()
