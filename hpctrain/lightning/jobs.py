"""A job of a script: the config that its arguments come to, and the ranks that it runs on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from hpctrain.batch.stop import SignalFlag
from hpctrain.config import Config
from hpctrain.config.validate import from_table
from hpctrain.errors import HpctrainError
from hpctrain.launch.environment import Claim
from hpctrain.launch.failure import Guard, end_quietly_if_uncaught, guard
from hpctrain.launch.process_group import alone_in_this_process, control_plane
from hpctrain.launch.voice import telling
from hpctrain.lightning.keys import Keys
from hpctrain.topology import Communicator, Topology

_GIVEN = frozenset(
    {("model", "use"), ("data", "use"), ("data", "train"), ("data", "validation")},
)
"""Keys that name the classes of what a script brings as objects."""


def make_config(keys: Keys, overrides: Sequence[str]) -> Config:
    """Return the config that keys with a dot come to.

    Args:
        keys: of the config.
        overrides: over them, as on a command line.

    Raises:
        ConfigError: with every mistake, as of a config file.
    """
    table: dict[str, dict[str, Any]] = {}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        table.setdefault(section, {})[name] = value
    return from_table("Trainer", table, overrides, given=_GIVEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What every rank has before the process group is made."""

    topology: Topology
    communicator: Communicator
    guard: Guard
    signals: SignalFlag


@contextmanager
def started(claim: Claim, *, stops: bool = True) -> Iterator[Started]:
    """Connect all ranks for messages; a failure that all share is told once. Collective: all ranks.

    An exception of one rank ends the job; in a world of one process it is the caller's to catch.

    Args:
        claim: what the launcher says of this process.
        stops: signals ask for a stop, which somebody acts upon; else they are as they were.

    Raises:
        HpctrainError: of all ranks.
    """
    try:
        with (
            alone_in_this_process(),
            SignalFlag() if stops else nullcontext(SignalFlag()) as signals,
            control_plane(claim, keep_mpi=True) as (topology, communicator),
            # One process tells nothing: its failure may be caught.
            telling(topology.is_rank_zero) if topology.world_size > 1 else nullcontext(),
            guard(topology, is_callers=True) as keeper,
        ):
            yield Started(
                topology=topology, communicator=communicator, guard=keeper, signals=signals
            )
    except HpctrainError as error:
        end_quietly_if_uncaught(error)
        raise
