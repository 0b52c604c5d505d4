"""Saves of all ranks together: each writes what it holds of a run whose parameters are sharded."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Event

from hpctrain.batch.stop import StopAgreement
from hpctrain.checkpoint.manager import CheckpointManager, Outcome, PartWriter
from hpctrain.checkpoint.safetensors_files import Written
from hpctrain.checkpoint.save import Snapshot
from hpctrain.errors import HpctrainError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together


class OthersParts:
    """Where the thread of rank 0 waits for what the others have written; it never communicates."""

    def __init__(self) -> None:
        self._there = Event()
        self._outcomes: Sequence[tuple[int, str, Outcome]] = ()

    def hand_over(self, outcomes: Sequence[tuple[int, str, Outcome]]) -> None:
        """Let the thread go on: (rank, host, outcome) of every other rank."""
        self._outcomes = outcomes
        self._there.set()

    def wait(self) -> list[Mapping[str, Written]]:
        """Return the files of every other rank.

        Raises:
            OSError: if one could not write its own.
        """
        self._there.wait()
        files: list[Mapping[str, Written]] = []
        for rank, host, outcome in self._outcomes:
            if isinstance(outcome, str):
                raise OSError(f"rank {rank} on {host}: {outcome}")
            files.append(outcome)
        return files


class TogetherSaver:
    """Saves of a run whose parameters are spread over the ranks.

    All ranks learn by the agreement that they make anyway that everybody's part is written; rank
    0's thread, which has waited for that, then writes meta.json and renames.
    """

    def __init__(self, world: World, stop: StopAgreement, store: CheckpointManager | None) -> None:
        """Take part in the agreement.

        Args:
            world: the ranks.
            stop: the agreement.
            store: of checkpoints, on rank 0.
        """
        self._world = world
        self._stop = stop
        self._store = store
        self._writer = PartWriter(world.topology.rank)
        self._begun = 0
        self._others: OthersParts | None = None
        self._open = False
        # Rank 0's own part needs no word: its thread knows.
        stop.count(lambda: self._begun if store is not None else self._writer.done)

    def save(self, snapshot: Snapshot) -> None:
        """Begin a save. Collective: all ranks.

        Raises:
            CheckpointError: on every rank, if the one before has failed or this one cannot begin.
        """
        if self._open and self._store is not None:
            self._store.report_waiting()
        self.finish()
        folder = None
        with raise_together(self._world.communicator):
            if self._store is not None:
                folder = self._store.open_folder(snapshot.step)
        folder = self._world.communicator.broadcast(folder)
        self._begun += 1
        self._open = True
        with raise_together(self._world.communicator):
            if self._store is None:
                self._writer.write(folder, snapshot)
            else:
                self._others = OthersParts()
                self._store.save(replace(snapshot, others=self._others.wait))

    def look(self) -> None:
        """Make a save whole whose parts are all written. Collective: all ranks."""
        if self._open and self._stop.least >= self._begun:
            self._hand_over()

    def finish(self) -> None:
        """Wait until the last save is on disk. Collective: all ranks.

        Raises:
            CheckpointError: on every rank, if it failed.
        """
        begin = time.perf_counter()
        with raise_together(self._world.communicator):
            if self._open:
                self._hand_over()
            if self._store is not None:
                waited = time.perf_counter() - begin
                self._store.finish()
                self._store.stall_seconds += waited

    @contextmanager
    def finished_after(self) -> Iterator[None]:
        """Finish the last save after the body, also where all ranks leave it by an error.

        Collective: all ranks.
        """
        try:
            yield
        except HpctrainError as error:
            if error.everywhere:
                # The first failure is the one to report.
                with suppress(HpctrainError), self._world.pulse.long_phase():
                    self.finish()
            raise
        with self._world.pulse.long_phase():
            self.finish()

    def _hand_over(self) -> None:
        """Tell rank 0's thread what all ranks have written. Collective: all ranks."""
        self._open = False
        mine: Outcome = {} if self._store is not None else self._writer.finish()
        everyone = self._world.communicator.all_gather((socket.gethostname(), mine))
        if self._others is not None:
            outcomes = [(rank, *item) for rank, item in enumerate(everyone) if rank]
            self._others.hand_over(outcomes)
