"""A run's folder in the hands of one job: the lease on it, and word of how the job ended."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from hpctrain.batch.exit_status import (
    Outcome,
    conclude,
    forget_endings,
    newest_saved,
    read_outcome,
    write_outcome,
)
from hpctrain.batch.scheduler import job_is_gone
from hpctrain.checkpoint.lease import Lease
from hpctrain.errors import CheckpointError, ConfigError, ExitCode
from hpctrain.observe.job_record import JobRecord
from hpctrain.utils.batch_job import job_identity, lineage
from hpctrain.utils.permissions import (
    explained,
    is_open_to_group,
    open_to_group,
    open_tree_to_group,
)


class RunFolder:
    """Owns a run folder while a job lives; a context manager, for rank 0.

    Attributes:
        tries: jobs of this run so far, this one included.
        step: the last one that is known to be saved.
        save_seconds: of a save, from its first copy until it is on disk: the slowest of late,
            in this job or the ones before.
        skipped_steps: steps of the run that were not applied, as far as is known.
        record: of this job, for those who ask later what a checkpoint was made by.
    """

    def __init__(self, path: Path, *, group_writable: bool = False) -> None:
        """Prepare; nothing is done before the folder is entered.

        Args:
            path: of the folder.
            group_writable: open it to its group, and all that is in it.
        """
        self.path = path
        self._group_writable = group_writable
        self.tries = 1
        self.step = 0
        self.save_seconds = 0.0
        self.skipped_steps = 0
        self.record = JobRecord(path)
        self._first_step = 0
        self._last: Outcome | None = None
        self._token: str | None = None
        self._lease = Lease(
            path,
            job_is_gone=lambda job, cluster, host: job_is_gone(job, cluster, host, os.environ),
        )

    def __enter__(self) -> RunFolder:
        """Make the folder and take its lease.

        Raises:
            CheckpointError: if that is not possible, or another job holds it.
        """
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
            # A killed job has saved more than it could say; that is not this one's gain.
            self.step = self._first_step = last.step
            # Where the pointer is damaged the folders themselves tell what to go on from.
            with suppress(CheckpointError):
                self.step = self._first_step = max(last.step, newest_saved(self.path)[1])
        forget_endings(self.path)
        # Until the job says otherwise: a killed one says nothing more.
        self.end(None, "running")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        """Leave word in exit.json.

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
            ),
        )
        if code is not None:
            self.record.end(
                reason=reason,
                exit_code=code,
                steps={"first": self._first_step, "last": self.step},
            )


_SLOW_DISK_BYTES_PER_SECOND = 200e6
_FORGET = 0.8
