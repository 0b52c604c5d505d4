"""What only rank 0 has: the folder of the run and its lease, the writers, saves by the clock."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from hpctrain.batch.exit_status import (
    Outcome,
    conclude,
    forget_endings,
    newest_saved,
    read_outcome,
    write_outcome,
)
from hpctrain.batch.scheduler import job_is_gone
from hpctrain.batch.stop import SAVE_DUE
from hpctrain.checkpoint.lease import Lease
from hpctrain.checkpoint.manager import CheckpointManager, Retention
from hpctrain.config import Config
from hpctrain.config.registry import resolve_listed
from hpctrain.config.schema import NotifySection
from hpctrain.config.writing import flat_config
from hpctrain.errors import CheckpointError, ConfigError, ExitCode, HpctrainError
from hpctrain.observe.goodput import PhaseLog
from hpctrain.observe.job_record import JobRecord
from hpctrain.observe.metrics import MetricsWriter
from hpctrain.observe.notify import Notifier, state_of
from hpctrain.observe.progress import Progress
from hpctrain.observe.redacting import toml_for_others
from hpctrain.observe.trackers import Handing, handing
from hpctrain.training.build import Parts
from hpctrain.training.checkpointing.snapshot import expected_bytes
from hpctrain.training.data.run_data import Data
from hpctrain.training.early_stopping import directions
from hpctrain.training.position import Position
from hpctrain.utils.batch_job import budget, job_identity, lineage
from hpctrain.utils.files import replace_file
from hpctrain.utils.permissions import (
    explained,
    is_open_to_group,
    open_to_group,
    open_tree_to_group,
)
from hpctrain.utils.run_folder import refuse_sweep

logger = logging.getLogger("hpctrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankZero:
    """The folder, the metrics and the terminal."""

    folder: RunFolder
    store: CheckpointManager
    save_clock: SaveClock
    writer: MetricsWriter
    progress: Progress


def prepare_rank_zero(
    config: Config,
    parts: Parts,
    data: Data,
    folder: RunFolder,
    place: Position,
    evaluation_owed: bool,
) -> RankZero:
    """Open all that rank 0 writes to in the run folder.

    Args:
        config: of the job, written to config.toml there.
        parts: of the step, for the size of a checkpoint.
        data: for the length of the run.
        folder: of the run, held by this job.
        place: where the job begins.
        evaluation_owed: an evaluation at `place` was cut short, and comes again.

    Raises:
        CheckpointError: if the folder cannot be written to, or has no room for a checkpoint.
    """
    try:
        replace_file(folder.path / "config.toml", toml_for_others(config).encode())
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder.path}: {error}") from error
    section = config.checkpoint
    keep_best = section.keep_best
    mode = directions(config, parts.task)[keep_best] if keep_best else "min"
    store = CheckpointManager(
        folder.path,
        retention=Retention(
            keep_last=section.keep_last,
            keep_every=section.keep_every,
            metric=keep_best,
            keep_best_count=section.keep_best_count,
            mode=mode,
        ),
        confirm=folder.confirm,
        warn=logger.warning,
        saved_within=folder.saved_within,
    )
    state_bytes = expected_bytes(parts.step)
    store.require_space(state_bytes)
    folder.expect_save(state_bytes)
    folder.record.note_modules()  # the model is built: what it needs is imported
    hyperparameters = flat_config(config)
    writer = MetricsWriter(
        folder.path,
        place.step if place.step else None,
        again="evaluation" if evaluation_owed else None,
        hyperparameters=hyperparameters,
    )
    writer.hand_to(_trackers(config, folder, hyperparameters, place))
    folder.at_exit(lambda: writer.close("failed"))  # but that it is closed by then
    return RankZero(
        folder=folder,
        store=store,
        save_clock=SaveClock(section.every_minutes, lambda: store.failed),
        writer=writer,
        progress=Progress(
            data.stop_at.total_steps(place),
            start_step=place.step,
            total_epochs=config.training.max_epochs,
            mode=config.logging.progress,
            every_seconds=config.logging.progress_every_seconds,
        ),
    )


def _trackers(
    config: Config, folder: RunFolder, hyperparameters: Mapping[str, Any], place: Position
) -> list[Handing]:
    """Return what hands lines of metrics to the trackers of the config."""
    names: list[str] = []
    found = []
    for component, make in zip(config.trackers, resolve_listed(config, "trackers"), strict=True):
        name = component.use.rpartition(":")[2].lower()
        names.append(name)
        count = names.count(name)
        each = handing(
            folder.path,
            name if count == 1 else f"{name}-{count}",
            functools.partial(make, **component.arguments),
            hyperparameters,
            # A job that goes on from nothing goes on with the run, unless it is to begin one.
            is_new=not place.step and config.checkpoint.resume != "auto",
        )
        if each is not None:
            found.append(each)
    return found


class SaveClock:
    """Asks for a save once its time has come, and where the last one failed.

    A failed save is reported by the next one: to ask for that ends the job soon, not hours later.
    """

    def __init__(
        self,
        every_minutes: float,
        failed: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            every_minutes: between two saves; 0: no save by the clock.
            failed: whether the last save has failed.
            clock: seconds.
        """
        self._seconds = every_minutes * 60
        self._failed = failed
        self._clock = clock
        self._saved_at = clock()

    def saved(self) -> None:
        """Start anew: a save has begun, whatever for."""
        self._saved_at = self._clock()

    def bit(self) -> int:
        """Return SAVE_DUE if it is time, else 0."""
        due = self._seconds and self._clock() - self._saved_at >= self._seconds
        return SAVE_DUE if due or self._failed() else 0


class RunFolder:
    """Owns a run folder while a job lives; a context manager, for rank 0.

    Attributes:
        tries: jobs of this run so far, this one included.
        step: the last one that is known to be saved.
        save_seconds: of a save, from its first copy until it is on disk: the slowest of late,
            in this job or the ones before.
        skipped_steps: steps of the run that were not applied, as far as is known.
        record: of this job, for those who ask later what a checkpoint was made by.
        phase_log: what this job does with its time.
        notifier: reports to the notify command.
    """

    def __init__(
        self,
        path: Path,
        *,
        group_writable: bool = False,
        report: bool = False,
        notifier: Notifier | None = None,
    ) -> None:
        """Prepare; nothing is done before the folder is entered.

        Args:
            path: of the folder.
            group_writable: open it to its group, and all that is in it.
            report: write report.html once the run is complete.
            notifier: reports to the notify command how a job ends; None: there is none.
        """
        self.path = path
        self._has_report = report
        self.notifier = notifier or Notifier(NotifySection(), path)
        self._group_writable = group_writable
        self.tries = 1
        self.step = 0
        self.save_seconds = 0.0
        self.skipped_steps = 0
        self.record = JobRecord(path)
        self.phase_log = PhaseLog(path)
        self._at_exit = ExitStack()
        self._first_step = 0
        self._last: Outcome | None = None
        self._budget = budget(os.environ)
        self._asked_node_hours = self._budget.node_hours
        self._token: str | None = None
        self._lease = Lease(
            path,
            job_is_gone=lambda job, cluster, host: job_is_gone(job, cluster, host, os.environ),
        )

    def __enter__(self) -> RunFolder:
        """Make the folder and take its lease.

        Raises:
            CheckpointError: if that is not possible, or another job holds it.
            ConfigError: if it is the folder of a sweep.
        """
        refuse_sweep(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._group_writable and not is_open_to_group(self.path):
                open_to_group(self.path)
        except OSError as error:
            problem = explained(error, self.path)
            raise CheckpointError(f"cannot make {self.path}: {problem}") from error
        self._lease.__enter__()
        open_tree_to_group(self.path)
        self._last = last = read_outcome(self.path)
        if last is not None:
            self._token = last.token
            self.tries, self.save_seconds = last.tries + 1, last.save_seconds
            self.skipped_steps = last.skipped_steps
            self._asked_node_hours += last.asked_node_hours
            # A killed job has saved more than it could say; that is not this one's gain.
            self.step = self._first_step = last.step
            # Where the pointer is damaged the folders themselves show what to go on from.
            with suppress(CheckpointError):
                self.step = self._first_step = max(last.step, newest_saved(self.path)[1])
        before = None
        if last is not None and last.code is not None:
            before = {"code": last.code, "reason": last.reason, "time": last.time}
        began = psutil.Process().create_time()
        self.phase_log.begin(self.tries, self.step, began, before)
        forget_endings(self.path)
        # Until the job says otherwise: a killed one says nothing more.
        self.end(None, "running")
        return self

    def at_exit(self, close: Callable[[], None]) -> None:
        """Have something closed before the folder is given up."""
        self._at_exit.callback(close)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._at_exit.close()
        self.phase_log.close()
        open_tree_to_group(self.path)
        self._lease.__exit__(kind, error, trace)

    def begin(self, step: int) -> None:
        """Note the step that this job begins at, by which its progress is measured."""
        self.step = self._first_step = step
        # From here on the chain has acted upon `checkpoint.resume`.
        self._token = lineage(os.environ)[0]
        self.end(None, "running")

    def resume(self, wanted: str) -> str:
        """Return what `checkpoint.resume` is for this job.

        "never" and a path are acted upon by the first job of a chain; the later ones go on from
        what the chain itself has saved.

        Raises:
            ConfigError: if this job may be one of a chain and cannot know.
        """
        last = self._last
        if wanted == "auto" or last is None:
            return wanted
        token, attempt = lineage(os.environ)
        if token is not None:
            return "auto" if attempt > 1 and last.token == token else wanted
        is_of_batch = job_identity(os.environ) is not None and last.job is not None
        if is_of_batch and last.code in (None, ExitCode.STOPPED):
            raise ConfigError(
                f'checkpoint.resume = "{wanted}" in a batch job, and the job before ({last.job}) '
                "stopped or was killed: one that was submitted again would undo it. Take a script "
                'of `python -m hpctrain job`, which counts its jobs, resume = "auto", or another '
                "run.name"
            )
        return wanted

    def expect_save(self, num_bytes: int) -> None:
        """Guess what a save takes, where none was measured yet."""
        if not self.save_seconds:
            self.save_seconds = num_bytes / _SLOW_DISK_BYTES_PER_SECOND

    def saved_within(self, seconds: float) -> None:
        """Take note of how long a save took."""
        self.save_seconds = max(seconds, _FORGET * self.save_seconds)

    def confirm(self) -> None:
        """Make sure that the folder is still this job's.

        Raises:
            CheckpointError: if another job has taken it over.
        """
        self._lease.confirm()

    def end(self, code: ExitCode | None, reason: str) -> None:
        """Write exit.json.

        Raises:
            CheckpointError: if it cannot be written.
        """
        write = write_outcome if code is None else conclude
        write(
            self.path,
            Outcome(
                code=code,
                reason=reason,
                step=self.step,
                tries=self.tries,
                first_step=self._first_step,
                job=job_identity(os.environ),
                save_seconds=self.save_seconds,
                token=self._token,
                skipped_steps=self.skipped_steps,
                max_tries=self._budget.max_jobs,
                node_hours=self._budget.node_hours,
                asked_node_hours=self._asked_node_hours,
                max_node_hours=self._budget.max_node_hours,
            ),
        )
        if code is not None:
            self.phase_log.end(self.step, code, reason)
            self.record.end(
                reason=reason,
                exit_code=code,
                steps={"first": self._first_step, "last": self.step},
            )
        if code == ExitCode.DONE and self._has_report:
            _write_report(self.path)
        if code is not None:
            self.notifier.notify(state_of(code), reason, step=self.step, code=code)


def _write_report(run: Path) -> None:
    """Write the page of a run beside its metrics; a run is complete without it."""
    from hpctrain.watch.report import NAME, write_report  # what only a complete run needs
    from hpctrain.watch.run_files import RunFiles

    try:
        write_report([RunFiles(run, lambda _: False)], run / NAME)
    except (HpctrainError, OSError, ValueError) as error:
        logger.warning("no %s is written: %s", NAME, error)


_SLOW_DISK_BYTES_PER_SECOND = 200e6
_FORGET = 0.8
