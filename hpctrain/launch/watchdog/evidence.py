"""Where the ranks of one node are: their stacks and collectives, for a verdict or for the user."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hpctrain.launch.watchdog import processes
from hpctrain.launch.watchdog.messages import Message
from hpctrain.launch.watchdog.pulse import Reading
from hpctrain.launch.watchdog.rank import Rank
from hpctrain.launch.watchdog.stacks import (
    STACKS_SIGNAL,
    empty,
    make_private_folder,
    read_all,
    write_stacks,
)
from hpctrain.launch.watchdog.telling import main_stack
from hpctrain.launch.watchdog.verdicts import Stand

_DUMP_SECONDS = 0.3
# Together as long as the judge waits for all nodes, less the way there.
_WRITE_SECONDS = 0.8
_RECORDS_SECONDS = 1.2
# A rank answers within milliseconds, unless some library holds Python's lock.
_SHOW_SECONDS = 3.0
_STACK_CHARACTERS = 4000


@dataclass(slots=True)
class _Show:
    """A request for the stacks of ranks that go on."""

    folder: Path
    until: float
    has_signalled: bool = False


class Evidence:
    """Asks the ranks where they are, and tells the hub."""

    def __init__(
        self,
        host: str,
        ranks: Sequence[Rank],
        readings: Callable[[], Sequence[Reading]],
        send: Callable[[Message], None],
    ) -> None:
        """Ask nothing yet.

        Args:
            host: of the ranks.
            ranks: of this node.
            readings: what they have said of themselves, in their order.
            send: takes messages to the hub.
        """
        self._host = host
        self._ranks = ranks
        self._readings = readings
        self._send = send
        self._dump_at: tuple[float, Path | None] | None = None
        self._stands_at: float | None = None
        self._dumps: dict[int, str] = {}
        self._show: _Show | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether `look` is to be called soon."""
        return not (self._dump_at is None and self._stands_at is None and self._show is None)

    def collect(self, folder: Path | None) -> None:
        """Have the ranks say where they stand still; the hub hears it from `look`.

        Args:
            folder: for the stacks; None: a new one on this node.
        """
        for rank in self._ranks:
            empty(rank.stacks)
            rank.collectives = None
            if rank.alive:
                rank.signal(STACKS_SIGNAL)
        self._show = None  # the verdict comes first
        self._dump_at = (time.monotonic() + _DUMP_SECONDS, folder or make_private_folder())

    def show(self, folder: Path) -> None:
        """Have the ranks say where they are, for somebody who looks at a job that runs."""
        if self.is_waiting:
            return
        for rank in self._ranks:
            empty(rank.stacks)
            rank.has_shown = False
            if rank.alive and rank.channel is not None:
                rank.channel.send({"show_stacks": True})
        self._show = _Show(folder, time.monotonic() + _SHOW_SECONDS)

    def look(self, now: float) -> None:
        """Do what is due by the clock."""
        if self._dump_at is not None and now >= self._dump_at[0]:
            folder, self._dump_at = self._dump_at[1], None
            self._ask_records(folder)
        if self._stands_at is not None and (now >= self._stands_at or self._has_records()):
            self._stands_at = None
            self._send({"stands": [_message(stand) for stand in self._stands()]})
        if self._show is not None:
            self._look_at_show(self._show, now)

    def _ask_records(self, folder: Path | None) -> None:
        """Take the stacks, and ask for the collectives.

        Not before: faulthandler trips over threads that begin to run while it looks.
        """
        self._dumps = {rank.rank: read_all(rank.stacks) for rank in self._ranks}
        for rank in self._ranks:
            if rank.alive and rank.channel is not None and folder is not None:
                record = folder / f"flight-recorder-rank-{rank.rank}.json"
                rank.channel.send({"flight_recorder": str(record)})
        self._stands_at = time.monotonic() + _RECORDS_SECONDS
        if folder is not None:
            write_stacks(folder, self._dumps, _WRITE_SECONDS)

    def _has_records(self) -> bool:
        return all(rank.collectives is not None for rank in self._ranks if rank.alive)

    def _stands(self) -> list[Stand]:
        readings = self._readings()
        return [
            Stand(
                rank=rank.rank,
                host=self._host,
                progress=readings[rank.index].progress,
                step=readings[rank.index].step,
                state=processes.state(rank.pid),
                stack=main_stack(self._dumps.get(rank.rank, ""))[:_STACK_CHARACTERS],
                collectives=rank.collectives or (),
            )
            for rank in self._ranks
        ]

    def _look_at_show(self, show: _Show, now: float) -> None:
        silent = [rank for rank in self._ranks if rank.alive and not rank.has_shown]
        if silent and now < show.until:
            return
        if silent and not show.has_signalled:
            # Python's lock is held, so that no other thread's frames change: from C, then.
            for rank in silent:
                rank.signal(STACKS_SIGNAL)
            show.has_signalled, show.until = True, now + _DUMP_SECONDS
            return
        self._show = None
        dumps = {rank.rank: read_all(rank.stacks) for rank in self._ranks}
        was_written = write_stacks(show.folder, dumps, _WRITE_SECONDS)
        missing = [rank for rank, dump in dumps.items() if not dump or not was_written]
        self._send({"shown": len(dumps) - len(missing), "missing": missing})


def _message(stand: Stand) -> Message:
    """Return a stand as it comes out of JSON, which the hub's own node does not go through."""
    return {**asdict(stand), "collectives": [asdict(each) for each in stand.collectives]}
