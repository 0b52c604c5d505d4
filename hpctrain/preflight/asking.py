"""Every rank tries something, and all learn what came of it: nobody is left waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch.distributed import distributed_c10d

from hpctrain.errors import HpctrainError
from hpctrain.preflight.finding import Finding, Status
from hpctrain.topology import Communicator, Topology

T = TypeVar("T")

_PATIENCE_SECONDS = 30.0
_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What one rank has found.

    Attributes:
        value: None where it failed.
        failure: what it failed of; None where it did not.
    """

    rank: int
    host: str
    value: T | None
    failure: str | None = None


class CheckError(Exception):
    """A check could not be made, on some rank or on all; the same on all ranks.

    Attributes:
        answers: of the ranks that failed.
    """

    def __init__(self, answers: Sequence[Answer[object]], world_size: int) -> None:
        self.answers = [answer for answer in answers if answer.failure is not None]
        self.world_size = world_size
        first = self.answers[0]
        text = first.failure or ""
        if len(self.answers) < world_size or any(a.failure != text for a in self.answers):
            rest = len(self.answers) - 1
            others = f" (and {rest} more of {world_size})" if rest else ""
            text = f"rank {first.rank} on {first.host}{others}: {text}"
        super().__init__(text)

    def finding(self, name: str, fix: str, status: Status = "fail") -> Finding:
        """Return the failure as the outcome of the check."""
        return Finding(
            name=name,
            status=status,
            fact=str(self),
            fix=fix,
            values={"ranks": [answer.rank for answer in self.answers]},
        )


def ask(topology: Topology, communicator: Communicator, measure: Callable[[], T]) -> list[T]:
    """Return what `measure` gives on every rank, in rank order. Collective: all ranks.

    Args:
        topology: of this rank.
        communicator: of all ranks.
        measure: what it raises is told as a finding, whatever it is: users' own models and
            datasets run in here. Where it communicates, it has to fail on all ranks or on none.

    Raises:
        CheckError: on every rank, if it raises on any.
    """
    answer: Answer[T]
    try:
        answer = Answer(topology.rank, topology.host, measure())
    except Exception as error:  # noqa: BLE001 - one failing check must not end the others
        answer = Answer(topology.rank, topology.host, None, describe(error))
    answers = communicator.all_gather(answer)
    if any(each.failure is not None for each in answers):
        raise CheckError(answers, topology.world_size)
    return [each.value for each in answers]


def failing_together(
    name: str, topology: Topology, measure: Callable[[], T], patience: float = _PATIENCE_SECONDS
) -> Callable[[], T]:
    """Return `measure`, for what communicates and may all the same fail on some ranks only.

    Those that wait for a rank that has failed would never be asked. Where not all fail within some
    time, the first ones raise what ends the job.

    Args:
        name: of the check, not used before; the same on all ranks.
        topology: of this rank.
        measure: communicates over the process group.
        patience: s to wait for the others to fail.
    """

    def measured() -> T:
        try:
            return measure()
        except Exception as error:
            if topology.world_size == 1:
                raise
            store = distributed_c10d._get_default_store()
            failed = store.add(f"hpctrain/failed/{name}", 1)
            end = time.monotonic() + patience
            while failed < topology.world_size and time.monotonic() < end:
                time.sleep(_PAUSE_SECONDS)
                failed = store.add(f"hpctrain/failed/{name}", 0)
            if failed < topology.world_size:
                raise _FailedAloneError(
                    f"check of the {name}: {failed} of {topology.world_size} ranks failed, and the "
                    f"others wait for them. Rank {topology.rank} on {topology.host}: "
                    f"{describe(error)}"
                ) from error
            raise

    return measured


class _FailedAloneError(BaseException):
    """Ends the job: no check can tell of it, as the other ranks do not come to the next one."""


def describe(error: BaseException) -> str:
    """Return an exception in words; one that hpctrain did not write keeps its class."""
    text = str(error).strip()
    if isinstance(error, HpctrainError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
