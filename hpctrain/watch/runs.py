"""The runs of a folder as a table, and two runs side by side. Reads only, without torch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.batch.exit_status import NAME, State, read_status
from hpctrain.batch.sweep import read_sweep
from hpctrain.checkpoint.export import best_of
from hpctrain.checkpoint.inspect import config_changes
from hpctrain.errors import ConfigError, HpctrainError
from hpctrain.observe.job_record import FOLDER as JOBS
from hpctrain.observe.metrics import JSONL_FILE
from hpctrain.observe.records import WALL_TIME, flat, newest_records, read_records
from hpctrain.utils import text
from hpctrain.utils.json_files import SMALL, read_whole
from hpctrain.utils.permissions import explained
from hpctrain.watch.run_files import goodput_of, read_object, runs_now

Lives = Callable[[Path], bool | None]
"""Whether the process that holds a run's folder lives; None: that is not known from here."""

_HEAD = ("run", "state", "step", "last", "best", "age", "job", "host", "size")

_TAIL_BYTES = 2**13
"""Of metrics.jsonl: the newest numbers stand there, and a thousand runs are looked at."""

_CURVE_ROWS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """A run in a line.

    Attributes:
        state: what it needs now, see `hpctrain.batch.exit_status`.
        last: newest metric: of the evaluation, or the loss of training.
        best: value of the best checkpoint that is kept.
        changed: seconds since 1970 of the newest sign of it.
        host: of its last job, the first of several.
        size: bytes of its folder.
        metrics: all of the newest evaluation.
        point: what it has of its own in its sweep, by key.
    """

    run: str
    state: str
    step: int
    last: Mapping[str, float]
    best: Mapping[str, float]
    changed: float
    job: str | None
    host: str | None
    nodes: int
    size: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    point: Mapping[str, str] = field(default_factory=dict)

    def value(self, name: str) -> float | str | None:
        """Return what runs are sorted by: a metric, its best first of all; a key, or a column."""
        if name in ("step", "size", "run", "state"):
            found: float | str = getattr(self, name)
            return found
        for metrics in (self.best, self.metrics, self.last):
            if name in metrics:
                return metrics[name]
        text = self.point.get(name)
        try:
            return text if text is None else float(text)
        except ValueError:
            return text

    def cells(self, now: float) -> tuple[str, ...]:
        """Return what a table shows of it."""
        more = f" +{self.nodes - 1:,}" if self.nodes > 1 else ""
        return (
            self.run,
            self.state,
            f"{self.step:,}",
            _named(self.last),
            _named(self.best),
            _age(now - self.changed) if self.changed else "-",
            self.job or "-",
            f"{self.host}{more}" if self.host else "-",
            text.size(self.size),
        )


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of runs in a folder, also those one level further down.

    Raises:
        ConfigError: if there is no such folder.
    """
    try:
        return _runs_in(folder, 2)
    except OSError as error:
        why = explained(error, folder)
        raise ConfigError(f"{folder}: {why}: name the folder of your runs") from error


def _runs_in(folder: Path, levels: int) -> list[Path]:
    found: list[Path] = []
    with os.scandir(folder) as entries:
        inner = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    for path in map(Path, inner):
        if os.path.lexists(path / NAME):
            found.append(path)
        elif levels > 1:
            with suppress(OSError):  # somebody's own
                found += _runs_in(path, levels - 1)
    return found


def run_row(
    run: Path, lives: Lives, name: str | None = None, point: Mapping[str, str] | None = None
) -> RunRow:
    """Return a run in a line; what is damaged says so.

    Args:
        run: its folder.
        lives: returns whether its process lives.
        name: that it is shown by; None: that of its folder.
        point: what it has of its own, where it is one of a sweep; it may not have begun.
    """
    step, job, state = 0, None, ""
    is_begun = point is None or os.path.lexists(run / NAME)
    try:
        status = read_status(run, {}, lives=runs_now(run, lives(run))) if is_begun else None
        if status is None:
            state = "not begun"
        else:
            step, job, state = status.step, status.job, status.state
        if status is not None and status.state == State.RUNNING.value:
            step = max(step, _newest_step(run))
    except HpctrainError as error:
        what = "closed" if isinstance(error.__cause__, PermissionError) else "damaged"
        state = _shown(f"{what}: {error}".splitlines()[0])
    metrics = _evaluated(run)
    best: dict[str, float] = {}
    with suppress(HpctrainError, OSError):
        if (found := best_of(run)) is not None:
            best = {found.metric: found.value}
    host, nodes = _place(run)
    size, changed = _size(run)
    return RunRow(
        run=name or run.name,
        state=state,
        step=step,
        last=_last(metrics),
        best=best,
        changed=changed,
        job=job,
        host=host,
        nodes=nodes,
        size=size,
        metrics=metrics,
        point=point or {},
    )


def sweep_rows(folder: Path, lives: Lives) -> list[RunRow]:
    """Return the points of a folder's sweep; none where it holds no sweep.

    Raises:
        ConfigError: if sweep.json is damaged.
    """
    sweep = read_sweep(folder)
    if sweep is None:
        return []
    return [run_row(sweep.run_of(one), lives, point=one.values) for one in sweep.points]


def ordered(rows: Sequence[RunRow], by: str | None, *, reverse: bool = False) -> list[RunRow]:
    """Return runs in order: the newest first, or the best by a metric; those without one last.

    Args:
        rows: runs.
        by: a metric, a swept key, or a column: step, size, run, state.
        reverse: the other way round.

    Raises:
        ConfigError: if no run has this.
    """
    if by is None:
        return sorted(rows, key=lambda row: -row.changed, reverse=reverse)
    values = [(row.value(by), row) for row in rows]
    known = [(value, row) for value, row in values if value is not None]
    if not known and any(row.metrics for row in rows):
        names = sorted({name for row in rows for name in (*row.best, *row.metrics, *row.point)})
        raise ConfigError(
            f"--sort {by}: no run has this{text.did_you_mean(by, names)}; there is "
            f"{text.listed([*names, 'step', 'size', 'run', 'state'], 20)}"
        )
    is_metric = any(by in metrics for row in rows for metrics in (row.best, row.metrics, row.last))
    falls = is_metric and not any(word in by.lower() for word in _LOWER_IS_BETTER)
    # Numbers before words; of equal ones the order stays.
    found = sorted(
        known, key=lambda item: (isinstance(item[0], str), item[0]), reverse=falls != reverse
    )
    return [row for _, row in found] + [row for value, row in values if value is None]


_LOWER_IS_BETTER = ("loss", "perplexity", "error", "rmse", "mse", "mae", "bits", "nll", "wer")
"""In names of metrics; of all others the highest stands first."""


def table_of(rows: Sequence[RunRow], now: float | None = None) -> str:
    """Return runs as a table, with what points of a sweep have of their own."""
    now = time.time() if now is None else now
    keys = list(dict.fromkeys(key for row in rows for key in row.point))
    head = (*_HEAD[:2], *keys, *_HEAD[2:])
    lines = []
    for row in rows:
        run, state, *more = row.cells(now)
        lines.append((run, state, *(row.point.get(key, "-") for key in keys), *more))
    return "\n".join(text.table([head, *lines]))


def compared(one: Path, other: Path, lives: Lives) -> str:
    """Return two runs side by side: where they stand, what differs, and their curves.

    Raises:
        ConfigError: if one of them is no run.
    """
    for run in (one, other):
        try:
            (run / NAME).lstat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"{run} holds no run: there is no {NAME} in it") from error
        except OSError as error:
            raise ConfigError(f"{run} cannot be read: {explained(error, run)}") from error
    names = _names(one, other)
    rows = [run_row(run, lives, name) for run, name in zip((one, other), names, strict=True)]
    now = time.time()
    parts = [
        [_HEAD, *(row.cells(now) for row in rows)],
        [("config", *names), *_config_rows(one, other)],
        [("last job", *names), *_job_rows(one, other)],
        [("goodput", *names), *_goodput_rows(one, other)],
        *_curves(one, other, names),
    ]
    return "\n\n".join("\n".join(text.table(part)) for part in parts if len(part) > 1)


def _config_rows(one: Path, other: Path) -> list[tuple[str, ...]]:
    contents = []
    for run in (one, other):
        try:
            contents.append(read_whole(run / "config.toml", SMALL).decode("utf-8"))
        except (OSError, ValueError):
            return []
    try:
        changes = config_changes(*contents)
    except (HpctrainError, ValueError):
        return []
    return [(key, _shown(then), _shown(now)) for key, (then, now) in changes.items()]


def _job_rows(one: Path, other: Path) -> list[tuple[str, ...]]:
    """Return in what the records of the last jobs of two runs differ."""
    records = [_job_facts(_last_job(run)) for run in (one, other)]
    keys = dict.fromkeys([*records[0], *records[1]])
    return [
        (key, *(record.get(key, "-") for record in records))
        for key in keys
        if records[0].get(key) != records[1].get(key)
    ]


def _job_facts(record: Mapping[str, Any]) -> dict[str, str]:
    found = {
        key: _shown(record[key])
        for key in ("start", "end", "reason", "launcher", "world_size", "job", "image", "driver")
        if record.get(key) is not None
    }
    found["nodes"] = text.listed([str(node.get("host")) for node in _nodes(record)])
    git = record.get("git")
    if isinstance(git, Mapping):
        found["commit"] = f"{git.get('commit')}{', changed since' if git.get('dirty') else ''}"
    for group in ("versions", "packages", "variables"):
        items = record.get(group)
        if isinstance(items, Mapping):
            found |= {f"{group}.{name}": _shown(value) for name, value in items.items()}
    return found


def _goodput_rows(one: Path, other: Path) -> list[tuple[str, ...]]:
    found = [goodput_of(run) for run in (one, other)]
    known = [each.to_json() for each in found if each is not None]
    if len(known) < 2:
        return []
    return [
        (name, *(_amount(name, each[name]) for each in known))
        for name in known[0]
        if any(each[name] for each in known)
    ]


def _amount(name: str, value: float) -> str:
    return f"{value:g}" if name == "jobs" else text.duration(value)


def _curves(one: Path, other: Path, names: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """Return a table for each number that both runs have, at steps of both."""
    curves = [_numbers(run) for run in (one, other)]
    tables = []
    for name in curves[0].keys() & curves[1].keys():
        first, second = curves[0][name], curves[1][name]
        last = max(*first, *second)
        steps = sorted({round(last * (i + 1) / _CURVE_ROWS) for i in range(_CURVE_ROWS)})
        rows = [(f"{step:,}", _at(first, step), _at(second, step)) for step in steps]
        tables.append([(f"{name} at step", *names), *rows])
    return sorted(tables, key=lambda rows: rows[0])


def _numbers(run: Path) -> dict[str, dict[int, float]]:
    """Return the losses and metrics of a run by name and step."""
    found: dict[str, dict[int, float]] = {}
    with suppress(OSError):
        for record in read_records(run / JSONL_FILE):
            for name, value in _metrics_of(record).items():
                group = record.get("split", record["kind"])
                found.setdefault(f"{group} {name}", {})[record["step"]] = value
    return found


def _at(curve: Mapping[int, float], step: int) -> str:
    """Return the newest value up to a step; "-": there was none yet, or the curve has ended."""
    known = [each for each in curve if each <= step]
    ended = step > max(curve) + (max(curve) / _CURVE_ROWS)
    return "-" if not known or ended else text.metric(curve[max(known)])


_OF_THE_PLACE = ("step", "epoch", "samples_seen", "samples_per_second", "skipped_steps", WALL_TIME)


def _metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in flat(record).items()
        if name not in _OF_THE_PLACE
        and not name.startswith("seconds.")
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


def _evaluated(run: Path) -> dict[str, float]:
    """Return the metrics of the newest evaluation, or the newest numbers of training."""
    records = newest_records(run / JSONL_FILE, _TAIL_BYTES)
    names = [name for name in records if name not in ("train", "epoch")] or list(records)
    return next(filter(None, (_metrics_of(records[name]) for name in names)), {})


def _last(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the one number of these that a table has room for."""
    key = "loss" if "loss" in metrics else next(iter(metrics), None)
    return {} if key is None else {key: metrics[key]}


def _newest_step(run: Path) -> int:
    records = newest_records(run / JSONL_FILE, _TAIL_BYTES).values()
    return max((record["step"] for record in records), default=0)


def _last_job(run: Path) -> dict[str, Any]:
    try:
        numbers = [int(path.stem) for path in (run / JOBS).iterdir() if path.stem.isdecimal()]
    except OSError:
        return {}
    return read_object(run / JOBS / f"{max(numbers, default=0)}.json")


def _nodes(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    nodes = record.get("nodes")
    return [node for node in nodes if isinstance(node, dict)] if isinstance(nodes, list) else []


def _place(run: Path) -> tuple[str | None, int]:
    nodes = _nodes(_last_job(run))
    return (str(nodes[0].get("host")), len(nodes)) if nodes else (None, 0)


def _size(run: Path) -> tuple[int, float]:
    """Return the bytes of a folder, and when something in it has changed for the last time."""
    size, changed, folders = 0, 0.0, [str(run)]
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                        continue
                    facts = entry.stat(follow_symlinks=False)
                    size, changed = size + facts.st_size, max(changed, facts.st_mtime)
    return size, changed


def _names(one: Path, other: Path) -> tuple[str, str]:
    """Return what two runs are called: the names of their folders, unless these are the same."""
    first, second = one.resolve().name, other.resolve().name
    return (first, second) if first != second else (str(one), str(other))


def _named(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {text.metric(value)}" for name, value in metrics.items()) or "-"


def _age(seconds: float) -> str:
    """Return an age in its largest unit."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def _shown(value: object) -> str:
    found = "-" if value is None else str(value)
    return found if len(found) <= _LONGEST else found[: _LONGEST - 3] + "..."


_LONGEST = 60
