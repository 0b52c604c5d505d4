"""Saves of a run: tried at its start, made by rank 0 or all ranks together, read at a roll back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from hpctrain.batch.stop import StopAgreement
from hpctrain.checkpoint.load import Loaded, load_newest
from hpctrain.checkpoint.save import Snapshot, try_snapshot
from hpctrain.config import Config
from hpctrain.launch.process_group import World
from hpctrain.observe.redacting import toml_for_others
from hpctrain.topology import raise_together
from hpctrain.training.checkpointing.resume import reading, roll_back
from hpctrain.training.checkpointing.save import TogetherSaver
from hpctrain.training.checkpointing.snapshot import capture
from hpctrain.training.data.run_data import Data
from hpctrain.training.position import Position
from hpctrain.training.rank_zero import RankZero
from hpctrain.training.record import made_by
from hpctrain.training.step import TrainStep

logger = logging.getLogger("hpctrain")


class Saver:
    """Saves of a run, on one rank."""

    def __init__(
        self,
        config: Config,
        world: World,
        data: Data,
        step: TrainStep,
        *,
        stop: StopAgreement,
        rank_zero: RankZero | None,
    ) -> None:
        """Begin without a save.

        Args:
            config: of the job, which is saved as well.
            world: the ranks.
            data: of the run.
            step: whose state is saved.
            stop: the agreement of all ranks, by which ranks that save together learn of a failure.
            rank_zero: what only rank 0 has; None on the others.
        """
        self._config = config
        self._world = world
        self._data = data
        self._step = step
        self._rank_zero = rank_zero
        self._together: TogetherSaver | None = None
        if step.sharded is not None:
            store = rank_zero.store if rank_zero else None
            self._together = TogetherSaver(world, stop, store, config.checkpoint.files)

    def attempt(self, place: Position, memory: Mapping[str, Any]) -> None:
        """Send what a save would hold to memory and back. Collective: all ranks.

        Args:
            place: where the run stands.
            memory: what else a run that goes on should know of this one.

        Raises:
            CheckpointError: on every rank, naming what could not be saved.
        """
        with self._world.pulse.long_phase():
            snapshot = self._capture(place, None, memory)
            with raise_together(self._world.communicator):
                if snapshot is not None:
                    try_snapshot(snapshot)

    def save(
        self, place: Position, metrics: Mapping[str, float] | None, memory: Mapping[str, Any]
    ) -> None:
        """Save a checkpoint in the background. Collective: all ranks.

        Args:
            place: where the run stands.
            metrics: of an evaluation there; None: there was none.
            memory: what else a run that goes on should know of this one.
        """
        with self._world.pulse.long_phase():
            snapshot = self._capture(place, metrics, memory)
            if self._rank_zero is not None:
                assert snapshot is not None
                job = self._rank_zero.folder.record
                snapshot = replace(snapshot, made_by=made_by(job, self._world))
                self._rank_zero.save_clock.saved()
            if self._together is not None:
                assert snapshot is not None
                self._together.save(snapshot)
                return
            with raise_together(self._world.communicator):
                if self._rank_zero is not None and snapshot is not None:
                    self._rank_zero.store.save(snapshot)

    def look(self) -> None:
        """Notice a save of all ranks that has ended. Collective: all ranks, at a boundary."""
        if self._together is not None:
            self._together.look()

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Finish the last save, of which ranks write parts, after the body.

        Collective: all ranks.
        """
        with nullcontext() if self._together is None else self._together.finished_after():
            yield

    def roll_back(self) -> int:
        """Put the parameters of the newest checkpoint back. Collective: all ranks.

        Returns:
            The step that it was saved at.
        """
        with self._world.pulse.long_phase():
            return roll_back(self._world, self._step, self._load_newest)

    def _capture(
        self, place: Position, metrics: Mapping[str, float] | None, memory: Mapping[str, Any]
    ) -> Snapshot | None:
        """Return what this rank has to save. Collective: all ranks."""
        return capture(
            self._world,
            self._step,
            place,
            data=self._data.state(place),
            extra=memory,
            config_toml=toml_for_others(self._config),
            metrics=metrics,
        )

    def _load_newest(self) -> Loaded | None:
        """Read the newest checkpoint on rank 0. Collective: all ranks."""
        if self._together is not None:
            self._together.finish()
        loaded = None
        with (
            raise_together(self._world.communicator),
            reading(self._world, together=self._together is not None) as read,
        ):
            if self._rank_zero is not None:
                store = self._rank_zero.store
                store.finish()
                loaded = load_newest(store.folder, logger.warning, read)
        return loaded
