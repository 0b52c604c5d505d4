"""phases.jsonl: what every job of a run did with its time, which nothing ever takes back.

metrics.jsonl is cut back where a run goes on from an earlier step; this file is not, so that it
also tells what had to be computed twice. Four kinds of lines, each with "step" and "wall_time":

    job       a job holds the folder: "job" its number, "began" its process, "before" how the last
              job ended, as far as exit.json knew
    training  its first step is next: "nodes" and "ranks"
    phases    "seconds" of rank 0 by phase since the line "training"
    end       it has ended in order, or by an error that all ranks know of: "code" and "reason"
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hpctrain.observe.records import WALL_TIME, read_records, to_line
from hpctrain.utils.files import AppendedFile
from hpctrain.utils.permissions import explained

FILE = "phases.jsonl"

LEAST_SECONDS, MOST_SECONDS = 1.0, 60.0
"""Between two lines of phases, at least and at most: the interval grows with the job."""

_GROWTH = 0.005
"""Of a job's age: what a kill may leave unknown."""

_logger = logging.getLogger(__name__)

_free_since: float | None = None
"""When a job before in this process ended; None: there was none."""


class PhaseLog:
    """Writes phases.jsonl; for rank 0, which holds the folder. What fails is told once."""

    def __init__(self, run_folder: Path, now: Callable[[], float] = time.time) -> None:
        self._path = run_folder / FILE
        self._now = now
        self._file: AppendedFile | None = None
        self._training_since = self._due = 0.0

    def begin(self, job: int, step: int, began: float, before: Mapping[str, Any] | None) -> None:
        """Note that a job holds the folder.

        Args:
            job: its number, from 1.
            step: that is known to be saved.
            began: when its process did, in seconds since 1970.
            before: code, reason and time of the last job's end; None: there was none.
        """
        try:
            self._file = AppendedFile(self._path)
        except OSError as error:
            self._give_up(error)
            return
        # A program may run several jobs, one after the other: the time before is not this one's.
        began = began if _free_since is None else max(began, _free_since)
        self._write("job", step, job=job, began=round(began, 3), before=before)

    def begin_training(self, step: int, *, nodes: int, ranks: int) -> None:
        """Note that the first step is next."""
        self._training_since = self._now()
        self._due = 0.0
        self._write("training", step, nodes=nodes, ranks=ranks)

    def note(self, step: int, seconds: Callable[[], Mapping[str, float]]) -> None:
        """Note the seconds by phase up to a step, if it is time for that."""
        if self._now() >= self._due:
            self.note_now(step, seconds())

    def note_now(self, step: int, seconds: Mapping[str, float]) -> None:
        """Note the seconds by phase up to a step."""
        age = self._now() - self._training_since
        self._due = self._now() + min(max(LEAST_SECONDS, _GROWTH * age), MOST_SECONDS)
        rounded = {phase: round(value, 3) for phase, value in seconds.items()}
        self._write("phases", step, seconds=rounded)

    def end(self, step: int, code: int, reason: str) -> None:
        """Note how the job has ended, and close the file."""
        self._write("end", step, code=int(code), reason=reason)
        self.close()

    def close(self) -> None:
        """Close the file: this job has nothing more to say."""
        global _free_since  # noqa: PLW0603 - the process has one life
        _free_since = self._now()
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._give_up(error)

    def _write(self, kind: str, step: int, **facts: Any) -> None:
        if self._file is None:
            return
        line = {"kind": kind, "step": step, **facts, WALL_TIME: round(self._now(), 3)}
        try:
            self._file.append(to_line(line))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        why = explained(error, self._path)
        _logger.warning("%s: %s; the goodput of this job stays unknown", self._path, why)


def read_phases(run_folder: Path) -> Iterable[dict[str, Any]]:
    """Yield the lines of a run's phases.jsonl, none where there is no such file."""
    try:
        yield from read_records(run_folder / FILE)
    except OSError:
        return
