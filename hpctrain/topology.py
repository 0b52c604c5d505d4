"""Who and where a process is, and the little it may ask of the others.

Frozen facts and a protocol; `hpctrain.launch` finds the facts and implements the protocol over
MPI, over a torch.distributed store, and for one process. Everything below it receives them as
arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The place of one process in its world.

    Attributes:
        rank: 0 to world_size - 1.
        local_rank: 0 to local_world_size - 1, among the ranks of this node.
        node_rank: index of this node, in the order of each node's lowest rank.
        hosts: host name of every node, in the order of `node_rank`.
        launcher: label of the row of `hpctrain.launch.table` that started the job.
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

    Every method is collective: all ranks call it, in the same order. None of them burns a core
    while it waits. Only `start_max` may overlap other calls; it has a channel of its own.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank; it must pickle. Collective: all ranks."""
        ...

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order. Collective: all ranks."""
        ...

    def barrier(self) -> None:
        """Return once every rank has come. Collective: all ranks."""
        ...

    def start_max(self, values: Sequence[int]) -> Pending:
        """Start an elementwise maximum of int64 values, to be waited for later.

        Collective: all ranks.
        """
        ...
