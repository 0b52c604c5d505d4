"""What all checks share: every rank measures, all learn what came of it, nobody is left waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TextIO, TypeVar

from torch.distributed import distributed_c10d

from hpctrain.config import Config
from hpctrain.errors import HpctrainError
from hpctrain.launch.failure import Guard
from hpctrain.preflight.rank_facts import RankFacts
from hpctrain.preflight.report import Finding, Status, finding_text
from hpctrain.topology import Communicator, Topology
from hpctrain.utils.streams import write_out

T = TypeVar("T")

HOST_FIX = "look at that node; sbatch --exclude leaves it out"

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
        measure: what it raises becomes a finding, whatever it is: users' own models and
            datasets run in here. Where it communicates, it has to fail on all ranks or on none.

    Raises:
        CheckError: on every rank, if it raises on any.
    """
    answer: Answer[T]
    try:
        answer = Answer(topology.rank, topology.host, measure())
    except Exception as error:  # noqa: BLE001 - one failing check must not end the others
        answer = Answer(topology.rank, topology.host, None, _in_words(error))
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
                    f"{_in_words(error)}"
                ) from error
            raise

    return measured


class _FailedAloneError(BaseException):
    """Ends the job: no check can tell of it, as the other ranks do not come to the next one."""


def _in_words(error: BaseException) -> str:
    """Return an exception in words; one that hpctrain did not write keeps its class."""
    text = str(error).strip()
    if isinstance(error, HpctrainError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Checks:
    """The checks of one job. All ranks make them together and come to the same findings.

    Attributes:
        config: the same on all ranks.
        topology: of this rank.
        communicator: of all ranks.
        guard: ends the job where a rank is lost.
        findings: so far.
        ranks: facts of every rank; empty where they could not be gathered.
        backend: of the process group; None where there is none.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        communicator: Communicator,
        guard: Guard,
        *,
        out: TextIO | None,
    ) -> None:
        """Begin.

        Args:
            config: the same on all ranks.
            topology: of this rank.
            communicator: of all ranks.
            guard: ends the job where a rank is lost.
            out: where findings are reported as they come; None: nowhere.
        """
        self.config = config
        self.topology = topology
        self.communicator = communicator
        self.guard = guard
        self.findings: list[Finding] = []
        self.ranks: list[RankFacts] = []
        self.backend: str | None = None
        self._out = out

    @property
    def hosts(self) -> list[str]:
        """The host of every rank."""
        # Without facts of the ranks, only those of one process are known.
        return [rank.host for rank in self.ranks] or ["?"] * self.topology.world_size

    def gather(self, name: str, fix: str, measure: Callable[[], T]) -> list[T] | None:
        """Return what all ranks measure; None, and a finding, where one fails.

        Collective: all ranks.
        """
        try:
            return ask(self.topology, self.communicator, measure)
        except CheckError as error:
            self.add(error.finding(name, fix))
            return None

    def keep(self, name: str, fix: str, make: Callable[[], T]) -> T | None:
        """Return what this rank makes, if all ranks can make theirs. Collective: all ranks."""
        made: list[T] = []
        failed = self.gather(name, fix, lambda: made.append(make())) is None
        return None if failed else made[0]

    def skip(self, names: Sequence[str], why: str) -> None:
        """Note checks for which there is nothing to check, or nothing to check it with."""
        for name in names:
            self.add(Finding(name=name, status="skip", fact=why))

    def add(self, finding: Finding) -> None:
        """Note a finding, and report it."""
        self.guard.pulse.tick()
        self.findings.append(finding)
        self.report(finding_text(finding))

    def report(self, text: str) -> None:
        """Print a text, on the rank that reports."""
        if self._out is not None:
            write_out(f"{text}\n", self._out)
