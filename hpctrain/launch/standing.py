"""The ranks that stand around the whole of a program, if there are some.

`python -m hpctrain run` connects them before the program's first line, and has them watched until
after its last. What the program makes of them, by `hpctrain.connect()` or a Trainer, again and
again, is of these ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpctrain.topology import Communicator, Topology

if TYPE_CHECKING:
    from hpctrain.launch.failure import Guard


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """This rank among the others, connected and watched.

    Attributes:
        guard: ends the job for a failure of this rank.
    """

    topology: Topology
    communicator: Communicator
    guard: Guard


_here: list[Standing] = []


def standing() -> Standing | None:
    """Return the ranks that stand around this program; None where there are none."""
    return _here[0] if _here else None


@contextmanager
def stands(ranks: Standing) -> Iterator[None]:
    """Have these ranks stand around the body, which is a whole program."""
    _here.append(ranks)
    try:
        yield
    finally:
        _here.clear()
