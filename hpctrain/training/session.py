"""A job on its run folder: the lease, the log, the agreement to stop, and word of how it ended.

What a job of a config and a loop of one's own have in common.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from hpctrain.batch.scheduler import Deadline
from hpctrain.batch.stop import SignalFlag, StopAgreement, Watch, reserve_seconds
from hpctrain.config import Config
from hpctrain.errors import CheckpointError, ExitCode, HpctrainError
from hpctrain.launch.failure import Guard
from hpctrain.launch.process_group import World
from hpctrain.observe import log
from hpctrain.topology import Communicator, raise_together
from hpctrain.training.position import Position
from hpctrain.training.rank_zero import RankZero, RunFolder
from hpctrain.training.trainer import Phases

logger = logging.getLogger("hpctrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a job has while it holds its run folder.

    Attributes:
        folder: of the run, on rank 0; None on the others.
        stop: the agreement of all ranks to stop.
        stack: what is left once there is word of how the job ended.
    """

    communicator: Communicator
    folder: RunFolder | None
    stop: StopAgreement
    stack: ExitStack

    def end(self, code: ExitCode, reason: str) -> None:
        """Leave word of an end in order. Collective: all ranks."""
        with raise_together(self.communicator):
            if self.folder is not None:
                self.folder.end(code, reason)


@contextmanager
def session(
    config: Config, communicator: Communicator, *, signals: SignalFlag, guard: Guard
) -> Iterator[Session]:
    """Hold the run folder in the body; an error that ends it is in exit.json. Collective.

    Args:
        config: names the run.
        communicator: of all ranks.
        signals: this rank's requests to stop.
        guard: is told the run folder, for its report.

    Raises:
        CheckpointError: on every rank, if the folder cannot be had.
    """
    path = Path(config.run.directory, config.run.name)
    folder: RunFolder | None = None
    with ExitStack() as stack:
        # A lease that cannot be judged at once is watched.
        with guard.pulse.long_phase(), raise_together(communicator):
            if communicator.rank == 0:
                folder = stack.enter_context(
                    RunFolder(path, group_writable=config.run.group_writable)
                )
        guard.report_to(path)
        stack.enter_context(log.start(path if folder else None, is_reporter=folder is not None))
        try:
            stop = _stop_agreement(config, communicator, signals, folder, stack)
            yield Session(communicator=communicator, folder=folder, stop=stop, stack=stack)
        except HpctrainError as error:
            if folder is not None:
                with suppress(CheckpointError):  # the first failure is the one to tell
                    folder.end(error.exit_code, str(error).splitlines()[0])
            raise


def _stop_agreement(
    config: Config,
    communicator: Communicator,
    signals: SignalFlag,
    folder: RunFolder | None,
    stack: ExitStack,
) -> StopAgreement:
    """Return the agreement to stop; rank 0's watch begins with it. Collective: all ranks."""
    stop = StopAgreement(communicator, lambda: signals.value)
    with raise_together(communicator):
        if folder is not None:
            deadline = Deadline(
                max_seconds=config.run.max_seconds,
                environ=os.environ,
                began=psutil.Process().create_time(),
                warn=logger.warning,
            )
            watch = Watch(
                folder.path,
                deadline,
                lambda: reserve_seconds(stop.reaction_seconds, folder.save_seconds),
            )
            stop.add(stack.enter_context(watch).reasons)
    return stop


def finish_writing(
    world: World,
    rank_zero: RankZero | None,
    phases: Phases,
    place: Position,
    summary: Callable[[RankZero], str],
) -> None:
    """Have all that a job writes on disk, and tell what came of it. Collective: all ranks.

    Args:
        world: the ranks, which wait while rank 0 writes the last checkpoint to its end.
        rank_zero: what writes, on rank 0.
        phases: that the wait counts in.
        place: that the job has come to.
        summary: makes the last words.

    Raises:
        CheckpointError: on every rank, if the last save failed.
    """
    with world.pulse.long_phase(), raise_together(world.communicator):
        if rank_zero is not None:
            with phases.measure("checkpoint"):
                rank_zero.store.finish()
            rank_zero.folder.step = place.step
            rank_zero.progress.close()
            rank_zero.writer.close()
            logger.info(summary(rank_zero))
