"""Work of several ranks whose failures all of them hear of."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar

from hpctrain.errors import HpctrainError
from hpctrain.topology import Communicator

T = TypeVar("T")


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
        HpctrainError: on every rank, that of the lowest one where it fails.
    """
    outcomes = communicator.all_gather((socket.gethostname(), *_outcome(make)))
    for rank, (host, _, error) in enumerate(outcomes):
        if error is not None:
            where = f"rank {rank} on {host}: " if communicator.world_size > 1 else ""
            raise type(error)(f"{where}{error}", everywhere=True)
    return [value for _, value, _ in outcomes]


def _outcome(make: Callable[[], T]) -> tuple[T | None, HpctrainError | None]:
    try:
        return make(), None
    except HpctrainError as error:
        return None, error
