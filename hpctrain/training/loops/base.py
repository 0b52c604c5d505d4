"""What the parts of an own loop know of its world, which `hpctrain.connect()` makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpctrain.config.schema import Precision
from hpctrain.launch import process_group

if TYPE_CHECKING:  # it imports torch, and MPI has to be up first
    from hpctrain.training.loops.registry import Setups


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopWorld(process_group.World):
    """A proven world, and what was chosen and set up in it.

    Attributes:
        seed: of weights, data and draws; None: nothing was seeded.
        precision: of models that are set up without another one.
        training: the same of the strategy, as keys of `[training]`.
        setups: what was set up in it.
    """

    seed: int | None = None
    precision: Precision = "32-true"
    training: Mapping[str, Any] = field(default_factory=dict)
    setups: Setups = field(repr=False)

    @property
    def rank(self) -> int:
        """Of this process, 0 to world_size - 1."""
        return self.topology.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.topology.world_size

    @property
    def local_rank(self) -> int:
        """Of this process among those of its node."""
        return self.topology.local_rank

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.topology.is_rank_zero
