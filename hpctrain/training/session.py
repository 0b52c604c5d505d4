"""A job on its run folder: the lease, the log, the agreement to stop, and exit.json at its end.

What a job of a config and a loop of one's own have in common.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from hpctrain.batch.scheduler import Deadline
from hpctrain.batch.stop import (
    SAVE_DUE,
    SignalFlag,
    StopAgreement,
    Watch,
    describe,
    reserve_seconds,
)
from hpctrain.config import Config
from hpctrain.config.semantics import Semantics
from hpctrain.errors import CheckpointError, ExitCode, HpctrainError
from hpctrain.launch.failure import Guard
from hpctrain.launch.process_group import World
from hpctrain.observe import log
from hpctrain.observe.notify import Notifier
from hpctrain.topology import Communicator, raise_together
from hpctrain.training.checkpointing.resume import Resumed, find_checkpoint
from hpctrain.training.data.run_data import Data
from hpctrain.training.rank_zero import RunFolder
from hpctrain.training.record import rules_and_changes
from hpctrain.training.run import Run
from hpctrain.training.summary import summary_text

logger = logging.getLogger("hpctrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a job has while it holds its run folder.

    Attributes:
        folder: of the run, on rank 0; None on the others.
        stop: the agreement of all ranks to stop.
        stack: what is left once exit.json has how the job ended.
    """

    communicator: Communicator
    folder: RunFolder | None
    stop: StopAgreement
    stack: ExitStack

    def end(self, code: ExitCode, reason: str) -> None:
        """Write an end in order to exit.json. Collective: all ranks."""
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
        guard: takes the run folder, for its report.

    Raises:
        CheckpointError: on every rank, if the folder cannot be had.
    """
    path = Path(config.run.directory, config.run.name)
    folder: RunFolder | None = None
    notifier = Notifier(config.notify, path)
    with ExitStack() as stack:
        stack.enter_context(_failures_notified(guard, notifier))
        # A lease that cannot be judged at once is watched.
        with guard.pulse.long_phase(), raise_together(communicator):
            if communicator.rank == 0:
                folder = stack.enter_context(
                    RunFolder(
                        path,
                        group_writable=config.run.group_writable,
                        report=config.logging.report,
                        notifier=notifier,
                    )
                )
            who = f"rank {communicator.rank} on {socket.gethostname()}"
            stack.enter_context(log.start(path, is_reporter=folder is not None, who=who))
        guard.report_to(path)
        try:
            stop = _stop_agreement(config, communicator, signals, folder, stack)
            yield Session(communicator=communicator, folder=folder, stop=stop, stack=stack)
        except HpctrainError as error:
            if folder is not None:
                with suppress(CheckpointError):  # the first failure is the one to report
                    folder.end(error.exit_code, str(error).splitlines()[0])
            raise


@contextmanager
def _failures_notified(guard: Guard, notifier: Notifier) -> Iterator[None]:
    """Have a failure of one rank alone, which ends the job there, reported as well."""

    def report(reason: str, code: int) -> None:
        seconds = notifier.crash_seconds
        notifier.notify("failure", reason, step=guard.pulse.step or 0, code=code, seconds=seconds)

    guard.notify, guard.notify_seconds = report, notifier.crash_seconds
    try:
        yield
    except Exception:
        raise  # it is still to be reported
    guard.notify, guard.notify_seconds = None, 0.0


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


def find_beginning(
    config: Config, world: World, folder: RunFolder | None
) -> tuple[Resumed | None, Semantics, list[str]]:
    """Return what a run goes on from, its rules, and what is not as it was. Collective: all ranks.

    Args:
        config: of this job.
        world: the ranks.
        folder: of the run, on rank 0; None on the others.

    Raises:
        HpctrainError: on every rank, if the run cannot go on from there.
    """
    resumed = (
        find_checkpoint(config, world, None)
        if folder is None
        else find_checkpoint(config, world, folder.path, folder.resume)
    )
    return resumed, *rules_and_changes(config, resumed)


def finish(
    config: Config, world: World, run: Run, data: Data, *, complete: bool, command: Sequence[str]
) -> tuple[ExitCode, str]:
    """Have all that a job writes on disk, and report what came of it. Collective: all ranks.

    Args:
        config: of the job.
        world: the ranks, which wait while rank 0 writes the last checkpoint to its end.
        run: that has come to its end, or was stopped.
        data: of it; they are closed.
        complete: whether it has come to its end.
        command: that the job was started by.

    Returns:
        How the job ends, and why.

    Raises:
        CheckpointError: on every rank, if the last save failed.
    """
    run.finish()
    data.staging.report_problems(world)
    rank_zero, phases = run.rank_zero, run.phases
    with world.pulse.long_phase(), raise_together(world.communicator):
        if rank_zero is not None:
            with phases.measure("checkpoint"):
                rank_zero.store.finish()
            rank_zero.folder.step = run.place.step
            rank_zero.folder.phase_log.note_now(run.place.step, phases.totals())
            rank_zero.progress.close()
            rank_zero.writer.close()
            logger.info(summary_text(config, world, run, rank_zero, data, complete, command))
    data.close()
    if complete:
        return ExitCode.DONE, run.stopping.reason or "complete"
    return ExitCode.STOPPED, f"stopped by {describe(run.reasons)}"


LEAST_SECONDS = 60.0
"""Between two saves for this reason: trouble that comes and goes is not to fill the disk."""


class FailingReads(Protocol):
    """What counts them."""

    @property
    def failed_reads(self) -> int:
        """How often a read failed so far, whatever came of it."""
        ...


class ReadTrouble:
    """Asks for a save as soon as a read fails.

    Reading runs ahead of the steps. So between the read that fails and the step that would need it
    there are batches left, and waits before the retries: time for all ranks to save together.
    Once the failing rank has nothing left to compute with, it is too late for that.
    """

    def __init__(self, reads: FailingReads, clock: Callable[[], float] = time.monotonic) -> None:
        self._reads = reads
        self._clock = clock
        self._known = 0
        self._next = 0.0

    def bit(self) -> int:
        """Return SAVE_DUE if reads have failed since the last time, else 0."""
        failed = self._reads.failed_reads
        if failed == self._known:
            return 0
        self._known = failed
        now = self._clock()
        if now < self._next:
            return 0
        self._next = now + LEAST_SECONDS
        return SAVE_DUE
