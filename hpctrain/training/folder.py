"""A run's folder in the hands of one job: the lease on it, and word of how the job ended."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from hpctrain.batch.outcome import Outcome, read_outcome, write_outcome
from hpctrain.checkpoint.lease import Lease
from hpctrain.errors import CheckpointError, ExitCode


class RunFolder:
    """Owns a run folder while a job lives; a context manager, for rank 0.

    Attributes:
        tries: jobs of this run so far, this one included.
        step: the last one that is known to be saved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tries = 1
        self.step = 0
        self._lease = Lease(path)

    def __enter__(self) -> RunFolder:
        """Make the folder and take its lease.

        Raises:
            CheckpointError: if that is not possible, or another job holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {self.path}: {error.strerror}") from error
        self._lease.__enter__()
        last = read_outcome(self.path)
        if last is not None:
            self.tries, self.step = last.tries + 1, last.step
        # Until the job says otherwise: a killed one says nothing more.
        self.end(None, "running")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lease.__exit__(kind, error, trace)

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
        outcome = Outcome(code=code, reason=reason, step=self.step, tries=self.tries)
        write_outcome(self.path, outcome)
