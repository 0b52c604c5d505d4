"""A run by what its folder holds: files that grow, read on from an offset, facts, goodput, energy.

A run folder may be a colleague's, in use, or damaged: nothing but regular files is opened, no link
is followed below the folder, and what cannot be read is left out.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hpctrain.batch.exit_status import NAME as OUTCOME
from hpctrain.batch.exit_status import read_status
from hpctrain.errors import ConfigError, HpctrainError
from hpctrain.observe.goodput import FILE as PHASES
from hpctrain.observe.goodput import PARTS, Goodput, end_of_outcome, goodput, read_phases
from hpctrain.observe.job_record import FOLDER as JOBS
from hpctrain.observe.job_record import JobTime
from hpctrain.observe.machine.log import FOLDER as MACHINE
from hpctrain.observe.machine.log import energy_between, signs_of_life
from hpctrain.observe.metrics import JSONL_FILE
from hpctrain.observe.records import lines_of
from hpctrain.utils.files import open_regular
from hpctrain.utils.json_files import SMALL, parse_json, read_whole
from hpctrain.utils.permissions import explained
from hpctrain.utils.run_folder import CHECKPOINTS, step_of

LOG = "log.txt"
PIECE_BYTES = 2**20
"""Of a file, in one answer."""

_GROWING = re.compile(rf"{re.escape(JSONL_FILE)}|{re.escape(LOG)}|{MACHINE}/[\w.-]{{1,255}}\.jsonl")
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC  # one may be entered, and not be listed
_MOST_MACHINES = 256
_MOST_JOBS = 1000
_RECORD_BYTES = 4 * 2**20
_CONFIG_BYTES = 2**20
_NUMBERED = re.compile(r"(\d{1,9})\.json")


@dataclass(frozen=True, slots=True)
class GrowingFile:
    """A file that jobs append to.

    Attributes:
        name: below the run folder.
        size: bytes.
        identity: another one once the file was replaced, as a resume does that cuts metrics back.
    """

    name: str
    size: int
    identity: str


class RunFiles:
    """The folder of one run, looked at again and again; what has not changed is not read again."""

    def __init__(self, folder: Path, lives: Callable[[Path], bool | None]) -> None:
        """Open a run.

        Args:
            folder: of the run.
            lives: returns whether the process that holds a run's folder lives; None: not from here.

        Raises:
            ConfigError: if there is no such folder, or it is closed to this user.
        """
        try:
            is_there = stat.S_ISDIR(folder.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            is_there = False
        except OSError as error:
            raise ConfigError(f"{folder}: {explained(error, folder)}") from error
        if not is_there:
            raise ConfigError(f"{folder}: no such folder")
        self.path = folder
        self.name = folder.resolve().name or str(folder)
        self._lives = lives
        self._read: dict[str, tuple[tuple[int, int, int], Any]] = {}
        self._steps: tuple[int, ...] = ()
        self._found_best: dict[str, Any] | None = None
        self._phases_size = -1
        self._found_spent: dict[str, Any] = {}
        self._require_open()

    def _require_open(self) -> None:
        """Refuse a run that shows nothing since it is closed to this user."""
        for name in (OUTCOME, JSONL_FILE):
            try:
                with self._opened(name):
                    pass
            except PermissionError as error:
                path = self.path / name
                why = explained(PermissionError(error.errno, error.strerror), path)
                raise ConfigError(f"{self.path} cannot be read: {why}") from error
            except OSError:  # not there yet, or not a file: it is left out
                continue

    def growing(self) -> list[GrowingFile]:
        """Return the files that grow, those that are there."""
        names = [JSONL_FILE, LOG]
        with suppress(OSError):
            machines = sorted(f"{MACHINE}/{each.name}" for each in (self.path / MACHINE).iterdir())
            names += filter(_GROWING.fullmatch, machines)
        found = []
        for name in names[: 2 + _MOST_MACHINES]:
            with suppress(OSError), self._opened(name) as descriptor:
                facts = os.fstat(descriptor)
                found.append(GrowingFile(name, facts.st_size, str(facts.st_ino)))
        return found

    def piece(self, name: str, start: int, most: int = PIECE_BYTES) -> bytes:
        """Return what stands in a growing file from an offset on.

        Raises:
            FileNotFoundError: if it is none of those files, or not there.
            OSError: if it cannot be read.
        """
        if not _GROWING.fullmatch(name):
            raise FileNotFoundError(f"{name!r:.100} is not a file of a run that grows")
        with self._opened(name) as descriptor:
            return os.pread(descriptor, most, start)

    def lines(self, name: str, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yield the lines of a growing file, each with the offset behind it, see `lines_of`.

        There are none where it is not there, or cannot be read.
        """
        if not _GROWING.fullmatch(name):
            return
        with (
            suppress(OSError),
            self._opened(name) as descriptor,
            open(descriptor, "rb", closefd=False) as file,
        ):
            file.seek(start)
            for line in lines_of(file):
                yield file.tell(), line

    def facts(self) -> dict[str, Any]:
        """Return all that is known of the run beside its growing files, as JSON.

        Keys: state, explanation, reason, code, step, tries, since, checkpoint, and with them
        "max_steps" and "max_epochs" of its config, "config" (text), "best", "checkpoints" (step,
        time), "jobs" (number, start, end, first_step, step, reason, code, ranks, nodes, job,
        launcher, command; times in seconds since 1970), "goodput" (seconds of each part) and
        "node_hours".
        """
        checkpoints = self._checkpoints()
        config = self._content("config.toml", _CONFIG_BYTES, bytes.decode) or ""
        return {
            **self._status(),
            **_lengths(config),
            "config": config,
            "best": self._best(tuple(each["step"] for each in checkpoints)),
            "checkpoints": checkpoints,
            "jobs": self._jobs(),
            **self._spent(),
        }

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """Open a file below the folder, no link on the way."""
        *parents, last = name.split("/")
        folder = os.open(self.path, _FOLDER)
        try:
            for parent in parents:
                inner = os.open(parent, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            descriptor = open_regular(last, follow_links=False, folder=folder)
        finally:
            os.close(folder)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _content(self, name: str, most: int, parse: Callable[[bytes], Any]) -> Any:
        """Return what a small file says, read again once it changed; None if it cannot be read."""
        try:
            with self._opened(name) as descriptor:
                facts = os.fstat(descriptor)
                stamp = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
                if (known := self._read.get(name)) is not None and known[0] == stamp:
                    return known[1]
                value = parse(os.read(descriptor, most)) if facts.st_size <= most else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        self._read[name] = stamp, value
        return value

    def _status(self) -> dict[str, Any]:
        try:
            # From another node a process cannot be seen: its heartbeat can.
            lives = runs_now(self.path, self._lives(self.path))
            status = read_status(self.path, {}, lives=lives)
        except HpctrainError as error:
            return {"state": "unknown", "explanation": str(error), "step": 0}
        kept = ("state", "explanation", "reason", "code", "step", "tries", "since", "checkpoint")
        return {name: getattr(status, name) for name in kept}

    def _best(self, steps: tuple[int, ...]) -> dict[str, Any] | None:
        """Return the best checkpoint; looked for only where there are others than before."""
        if steps != self._steps:
            from hpctrain.checkpoint.export import best_of  # numpy, which `status` needs not

            self._steps, self._found_best = steps, None
            with suppress(HpctrainError, OSError):
                best = best_of(self.path)
                self._found_best = None if best is None else asdict(best)
        return self._found_best

    def _spent(self) -> dict[str, Any]:
        """Return what came of the seconds of the run; added up only where there are new lines."""
        try:
            with self._opened(PHASES) as descriptor:
                size = os.fstat(descriptor).st_size
        except OSError:
            return {}
        if size != self._phases_size:
            self._phases_size, self._found_spent = size, {}
            found = goodput_of(self.path, runs=self._lives(self.path))
            if found is not None:
                parts = found.to_json()
                self._found_spent = {
                    "goodput": {"seconds": {key: parts[key] for key in (*PARTS, "unattributed")}},
                    "node_hours": found.node_seconds / 3600,
                }
        return self._found_spent

    def _checkpoints(self) -> list[dict[str, Any]]:
        found = []
        with suppress(OSError), os.scandir(self.path / CHECKPOINTS) as entries:
            for entry in entries:
                if (step := step_of(entry.name)) is not None:
                    with suppress(OSError):
                        saved = Path(entry.path, "meta.json").stat().st_mtime
                        found.append({"step": step, "time": saved})
        return sorted(found, key=lambda each: each["step"])

    def _jobs(self) -> list[dict[str, Any]]:
        try:
            names = [path.name for path in (self.path / JOBS).iterdir()]
        except OSError:
            return []
        numbers = sorted(int(match[1]) for match in map(_NUMBERED.fullmatch, names) if match)
        found = (
            self._content(f"{JOBS}/{number}.json", _RECORD_BYTES, _job)
            for number in numbers[-_MOST_JOBS:]
        )
        jobs = [job for job in found if job is not None]
        with suppress(OSError):
            # A killed job has not said when it ended: its last line of metrics is the last sign.
            if jobs and jobs[-1]["end"] is None:
                jobs[-1] = {**jobs[-1], "seen": (self.path / LOG).stat().st_mtime}
        return jobs


def _job(content: bytes) -> dict[str, Any]:
    """Return what a page shows of a job's record."""
    record = parse_json(content)
    steps = record.get("steps") or {}
    command = record.get("command") or []
    return {
        "number": int(record["number"]),
        "start": _seconds(record.get("start")),
        "end": _seconds(record.get("end")),
        "first_step": _whole(steps.get("first")),
        "step": _whole(steps.get("last")),
        "reason": _words(record.get("reason")),
        "code": _whole(record.get("exit_code")),
        "ranks": _whole(record.get("world_size")),
        "nodes": len(record.get("nodes") or []) or None,
        "job": _words(record.get("job")),
        "launcher": _words(record.get("launcher")),
        "command": " ".join(map(str, command)),
        "changes": [str(line) for line in record.get("changes") or []],
    }


def _whole(value: object) -> int | None:
    """Return a whole number of a record; None for what is none."""
    return value if type(value) is int and abs(value) < 2**63 else None


def _words(value: object) -> str | None:
    """Return text of a record; None for what is none."""
    return value if isinstance(value, str) else None


def _seconds(moment: object) -> float | None:
    """Return a time of a record in seconds since 1970."""
    if not isinstance(moment, str):
        return None
    with suppress(ValueError):
        return datetime.fromisoformat(moment).timestamp()
    return None


def _lengths(config: str) -> dict[str, int | None]:
    """Return how long a run is to be, by the text of its config."""
    from hpctrain.config.toml import parse

    try:
        training = parse(config, "config.toml").table.get("training", {})
    except (HpctrainError, AttributeError):
        training = {}
    return {key: training.get(key) or None for key in ("max_steps", "max_epochs")}


BEAT_SECONDS = 90.0
"""A lease that was renewed within this time is that of a job that runs."""


def read_object(path: Path) -> dict[str, Any]:
    """Return a small JSON object, empty where there is none that can be read."""
    try:
        document = parse_json(read_whole(path, SMALL))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def heartbeat(run: Path) -> float | None:
    """Return when a job renewed its lease on a run for the last time; None: none holds it."""
    try:
        return (run / "lease.json").stat().st_mtime
    except OSError:
        return None


def runs_now(run: Path, lives: bool | None = None, clock: Callable[[], float] = time.time) -> bool:
    """Tell whether a job runs on a folder.

    Args:
        run: the folder.
        lives: whether its process lives; None: that is not known from here, and its heartbeat is
            to say it.
        clock: seconds since 1970.
    """
    if lives is not None or read_object(run / OUTCOME).get("code") is not None:
        return bool(lives)
    beat = heartbeat(run)
    return beat is not None and clock() - beat < BEAT_SECONDS


def goodput_of(run: Path, *, runs: bool | None = None) -> Goodput | None:
    """Return what came of a run's seconds; None where its jobs have noted nothing.

    Args:
        run: its folder.
        runs: whether a job runs, see `runs_now`.
    """
    outcome = read_object(run / OUTCOME)
    beat = heartbeat(run)
    return goodput(
        read_phases(run),
        signs_of_life=lambda: [*signs_of_life(run), *([] if beat is None else [beat])],
        end=_end(outcome),
        now=time.time() if runs_now(run, runs) else None,
    )


def energy_of_run(run: Path, jobs: Sequence[JobTime]) -> dict[str, Any] | None:
    """Return the energy of a run and of each of its jobs, in kWh; None where none was measured.

    Args:
        run: its folder.
        jobs: of the run, by number.
    """
    whole, *parts = energy_between(run, [job.begin for job in jobs])
    if whole is None:
        return None
    used = 0.0 if any(job.end is None for job in jobs) else sum(job.node_seconds for job in jobs)
    # A job's last line is written as it ends, its record's time is in whole seconds.
    of_jobs = {
        str(job.number): None if found is None else found.to_json(None)["kwh"]
        for job, found in zip(jobs, parts, strict=True)
    }
    return {**whole.to_json(used or None), "jobs": of_jobs}


def _end(outcome: Mapping[str, Any]) -> tuple[int, str, float] | None:
    code = outcome.get("code")
    if not isinstance(code, int):
        return None
    with suppress(TypeError):
        return end_of_outcome(code, str(outcome.get("reason")), str(outcome.get("time")))
    return None
