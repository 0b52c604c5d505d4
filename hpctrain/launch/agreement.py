"""Failures that all ranks learn of together, so that one speaks and all leave in order."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hpctrain.errors import HpctrainError
from hpctrain.topology import Communicator


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
    outcomes = communicator.all_gather((socket.gethostname(), failure))
    failed = [(rank, host, error) for rank, (host, error) in enumerate(outcomes) if error]
    if not failed:
        return
    rank, host, first = failed[0]
    message = str(first)
    if len({str(error) for _, _, error in failed}) > 1 or len(failed) < communicator.world_size > 1:
        others = f" (and {len(failed) - 1} more of {communicator.world_size})" if failed[1:] else ""
        message = f"rank {rank} on {host}{others}: {message}"
    raise type(first)(message, everywhere=True) from failure


@contextmanager
def closing_together(communicator: Communicator, close: Callable[[], None]) -> Iterator[None]:
    """Call `close` after the body where all ranks come to it: success, or a shared failure.

    Collective: all ranks. After a failure of this rank alone nothing that waits may follow.
    """
    try:
        yield
    except HpctrainError as error:
        if error.everywhere:
            communicator.barrier()
            close()
        raise
    communicator.barrier()
    close()
