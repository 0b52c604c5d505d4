"""What all checks share: the ranks, the findings so far, and asking everybody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TextIO, TypeVar

from hpctrain.config import Config
from hpctrain.launch.failure import Guard
from hpctrain.preflight.asking import CheckError, ask
from hpctrain.preflight.finding import Finding
from hpctrain.preflight.probes.process import RankFacts
from hpctrain.preflight.report import finding_text
from hpctrain.topology import Communicator, Topology
from hpctrain.utils.streams import write_out

T = TypeVar("T")

HOST_FIX = "look at that node; sbatch --exclude leaves it out"


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
            out: where findings are told as they come; None: nowhere.
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
        """Note a finding, and tell it."""
        self.guard.pulse.tick()
        self.findings.append(finding)
        self.say(finding_text(finding))

    def say(self, text: str) -> None:
        """Tell something, on the rank that speaks."""
        if self._out is not None:
            write_out(f"{text}\n", self._out)
