"""Goodput: phases.jsonl, what every job of a run did with its time, and what came of all of it.

metrics.jsonl is cut back where a run goes on from an earlier step; phases.jsonl is not, so that it
also says what had to be computed twice. Four kinds of lines, each with "step" and "wall_time":

    job       a job holds the folder: "job" its number, "began" its process, "before" how the last
              job ended, as far as exit.json knew
    training  its first step is next: "nodes" and "ranks"
    phases    "seconds" of rank 0 by phase since the line "training"
    end       it has ended in order, or by an error that all ranks know of: "code" and "reason"
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from hpctrain.observe.records import WALL_TIME, read_records, to_line
from hpctrain.utils import text
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
    """Writes phases.jsonl; for rank 0, which holds the folder. What fails is reported once."""

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


HANG = "hang timeout"
"""Word of exit.json for a job that stood still."""

_IN_ORDER = (0, 75)

_LAST_MOMENT = 1e11
"""Seconds since 1970, in the year 5138: what is later is damage, and no sum of it is drawn."""

_OF_PHASES = {
    "compute": "trained",
    "communication": "trained",
    "data": "read",
    "evaluation": "evaluated",
    "checkpoint": "saved",
}
"""From a phase of the run to what it counts as; others count as trained."""

PARTS = (
    "trained",
    "read",
    "evaluated",
    "saved",
    "recomputed",
    "started",
    "ended",
    "hung",
    "waited",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Seconds of a run since its first job began, by what came of them.

    Attributes:
        total: all of them, up to the last job's end, or until now.
        trained: steps that the run stands on, rank 0's waiting for others included.
        read: waiting for data.
        evaluated: evaluations.
        saved: what training waited for saves.
        recomputed: work of a job behind the step from which the next one went on, lost.
        started: from the start of a process to its first step.
        ended: from the last step to the end of the process.
        hung: standing still, until the watchdog ended the job.
        waited: no job ran: they were queued, or held.
        jobs: how many there were.
        node_seconds: of all nodes together, while jobs ran.
    """

    total: float
    trained: float = 0.0
    read: float = 0.0
    evaluated: float = 0.0
    saved: float = 0.0
    recomputed: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    hung: float = 0.0
    waited: float = 0.0
    jobs: int = 0
    node_seconds: float = 0.0

    @property
    def unattributed(self) -> float:
        """Seconds of which nobody knows: of a job that runs, those since its last line."""
        known: float = sum(getattr(self, part) for part in PARTS)
        return max(0.0, self.total - known)

    def to_json(self) -> dict[str, float]:
        """Return all numbers by name, the unattributed seconds with them."""
        numbers = {**asdict(self), "unattributed": self.unattributed}
        return {name: round(value, 3) for name, value in numbers.items()}

    def line(self) -> str:
        """Return the parts in a line, the largest first, and the node-hours."""
        seconds = {part: getattr(self, part) for part in PARTS} | {
            "unattributed": self.unattributed
        }
        parts = sorted(
            (part for part in seconds if seconds[part] >= 0.001 * self.total and part != "trained"),
            key=lambda part: -seconds[part],
        )
        shares = [f"{part} {text.percent(seconds[part], self.total)}" for part in parts]
        return ", ".join(
            [
                f"{text.percent(self.trained, self.total)} of {text.duration(self.total)} trained",
                *shares,
                f"{text.number(self.node_seconds / 3600)} node-hours",
            ]
        )


@dataclass(slots=True)
class _Stretch:
    """Some steps of a job, and the seconds by part that they took."""

    first_step: int
    last_step: int
    seconds: dict[str, float]


@dataclass(slots=True)
class _Job:
    """What is known of one job by its lines."""

    began: float
    last_sign: float
    nodes: int = 1
    trains: bool = False
    step: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    stretches: list[_Stretch] = field(default_factory=list)
    started: float = 0.0
    tail: dict[str, float] = field(default_factory=dict)
    ended: bool = False

    def reach(self, moment: float, part: str) -> None:
        """Count the time from the last heartbeat up to a moment as a part."""
        spent = max(0.0, moment - self.last_sign)
        self.tail[part] = self.tail.get(part, 0.0) + spent
        self.last_sign = max(self.last_sign, moment)


def goodput(
    lines: Iterable[Mapping[str, Any]],
    *,
    signs_of_life: Callable[[], Sequence[float]] = tuple,
    end: tuple[int, str, float] | None = None,
    now: float | None = None,
) -> Goodput | None:
    """Return what came of a run's seconds; None where its jobs have left no lines.

    Args:
        lines: of phases.jsonl, in its order.
        signs_of_life: returns moments at which some job is known to have lived, such as those of
            the lines of machine figures; asked only where a job was killed, which says no more.
        end: code, reason and moment of the last job's end by exit.json, as a watchdog writes it;
            None: it says no end.
        now: the moment, where a job runs; None: none does.
    """
    jobs: list[_Job] = []
    for line in lines:
        if (moment := _moment(line.get(WALL_TIME))) is None:
            continue
        if line["kind"] == "job":
            if jobs:
                _close(jobs[-1], _end_of(line.get("before")), signs_of_life, moment)
            began = _moment(line.get("began"))
            began = moment if began is None else min(began, moment)
            if jobs:
                began = max(began, jobs[-1].last_sign)
            jobs.append(_Job(began=began, last_sign=began))
        elif jobs:
            _take(jobs, line, moment)
    if not jobs:
        return None
    if now is None:
        _close(jobs[-1], end, signs_of_life, math.inf)
    return _sum(jobs, now)


def _take(jobs: list[_Job], line: Mapping[str, Any], moment: float) -> None:
    """Take a line of the newest job into account."""
    job, step = jobs[-1], line["step"]
    if line["kind"] == "training":
        job.reach(moment, "started")
        job.trains, job.step, job.seconds = True, step, {}
        job.nodes = _count(line.get("nodes"))
        for before in jobs[:-1]:
            _lose(before, step)
    elif line["kind"] == "phases" and isinstance(line.get("seconds"), Mapping):
        spent = _spent(line["seconds"], job.seconds)
        job.stretches.append(_Stretch(job.step, step, spent))
        job.step, job.seconds = step, dict(line["seconds"])
        job.last_sign = max(job.last_sign, moment)
    elif line["kind"] == "end":
        code, reason = line.get("code"), str(line.get("reason"))
        job.reach(moment, _part_of_tail(job, code, reason))
        job.ended = True


def _close(
    job: _Job,
    end: tuple[int, str, float] | None,
    signs: Callable[[], Sequence[float]],
    before: float,
) -> None:
    """Count the time of a job from its last line until it was seen alive for the last time."""
    if job.ended:
        return
    if end is not None and job.last_sign <= end[2] <= before:
        job.reach(end[2], _part_of_tail(job, end[0], end[1]))
    else:
        seen = [sign for sign in signs() if job.last_sign < sign < before]
        job.reach(max(seen, default=job.last_sign), "recomputed" if job.trains else "started")
    job.ended = True


def _part_of_tail(job: _Job, code: object, reason: str) -> str:
    """Return what the time of a job behind its last line counts as."""
    if HANG in reason:
        return "hung"
    if not job.trains:
        return "started"
    return "ended" if code in _IN_ORDER else "recomputed"


def _lose(job: _Job, step: int) -> None:
    """Count what a job did behind a step, from which a later one has gone on, as lost."""
    for stretch in job.stretches:
        steps = stretch.last_step - stretch.first_step
        if stretch.last_step <= step:
            continue
        behind = min(steps, stretch.last_step - step)
        share = behind / steps if steps else 1.0
        spent = stretch.seconds
        lost = sum(value * share for part, value in spent.items() if part != "recomputed")
        kept = {part: value * (1 - share) for part, value in spent.items() if part != "recomputed"}
        stretch.seconds = {**kept, "recomputed": spent.get("recomputed", 0.0) + lost}
        stretch.last_step = max(stretch.first_step, step)


def _spent(seconds: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, float]:
    """Return by part what the phases of a job took since its line before."""
    spent: dict[str, float] = {}
    for phase, value in seconds.items():
        now, then = _moment(value) or 0.0, _moment(before.get(phase, 0.0)) or 0.0
        part = _OF_PHASES.get(phase, "trained")
        spent[part] = spent.get(part, 0.0) + now - then
    return {part: max(0.0, value) for part, value in spent.items()}


def _sum(jobs: Sequence[_Job], now: float | None) -> Goodput:
    parts = dict.fromkeys(PARTS, 0.0)
    node_seconds = 0.0
    end = jobs[-1].last_sign if now is None else max(now, jobs[-1].last_sign)
    for job, after in zip(jobs, [*jobs[1:], None], strict=True):
        for seconds in [job.tail, *(stretch.seconds for stretch in job.stretches)]:
            for part, value in seconds.items():
                parts[part] += value
        if after is not None:
            parts["waited"] += after.began - job.last_sign
        alive_until = end if after is None else job.last_sign
        node_seconds += job.nodes * (alive_until - job.began)
    total = end - jobs[0].began
    return Goodput(total=total, jobs=len(jobs), node_seconds=node_seconds, **parts)


def end_of_outcome(code: int | None, reason: str, time: str) -> tuple[int, str, float] | None:
    """Return the end that exit.json names; None where it names none."""
    if code is None:
        return None
    try:
        return code, reason, datetime.strptime(time, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


def _end_of(before: object) -> tuple[int, str, float] | None:
    if not isinstance(before, Mapping) or not isinstance(before.get("code"), int):
        return None
    return end_of_outcome(before["code"], str(before.get("reason")), str(before.get("time")))


def _moment(value: object) -> float | None:
    """Return seconds, or a moment in seconds since 1970; None for what no clock shows."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LAST_MOMENT else None


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 1
