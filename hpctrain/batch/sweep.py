"""Sweeps: the points of a study, their numbers in a job array, and sweep.json. Without torch.

A point keeps its number for ever: sweep.json says which is which, and a later command line with
other points adds them behind those that are there.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.config.toml import parse, parse_value, split_values
from hpctrain.config.writing import to_value
from hpctrain.errors import ConfigError, UsageError
from hpctrain.utils.files import replace_file
from hpctrain.utils.json_files import SMALL, parse_json, read_whole
from hpctrain.utils.permissions import explained
from hpctrain.utils.run_folder import SWEEP
from hpctrain.utils.text import listed, ranges

_VERSION = 1
_MOST_POINTS = 10_000
"""More are a slip of the pen: a product of lists grows fast."""
_OURS = ("run.name", "run.directory")

Pairs = tuple[str, ...]
"""Overrides of a point: KEY=VALUE, each VALUE as TOML has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run of a sweep.

    Attributes:
        number: its place in the job array, from 0.
        overrides: what it has of its own, as on a command line.
        job: that was submitted for it the last time, as its scheduler names it.
    """

    number: int
    overrides: Pairs
    job: str | None = None

    @property
    def name(self) -> str:
        """Name of its run, and of the run's folder in that of the sweep."""
        return f"{self.number:03}"

    @property
    def values(self) -> dict[str, str]:
        """What it has of its own, by key."""
        return dict(_pair(text) for text in self.overrides)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The points of a study.

    Attributes:
        folder: of the sweep, with the folder of each point's run in it.
        command: the config and the overrides that all points have.
        points: in the order of their numbers.
    """

    folder: Path
    command: tuple[str, ...]
    points: tuple[Point, ...]

    def overrides_of(self, point: Point) -> list[str]:
        """Return all that a point's command line has after the config."""
        return [
            *self.command[1:],
            *point.overrides,
            f"run.directory={to_value(str(self.folder))}",
            f"run.name={to_value(point.name)}",
        ]

    def with_jobs(self, jobs: Mapping[int, str]) -> Sweep:
        """Return it with the jobs that were submitted, by the numbers of their points."""
        points = (
            dataclasses.replace(each, job=jobs.get(each.number, each.job)) for each in self.points
        )
        return dataclasses.replace(self, points=tuple(points))

    def run_of(self, point: Point) -> Path:
        return self.folder / point.name


def asked_points(axes: Sequence[str], file: Path | None) -> list[Pairs]:
    """Return the points that a command line asks for: each of the file with each combination.

    Args:
        axes: "KEY=VALUE,VALUE,...".
        file: a list of points, TOML or CSV; None: no such list.

    Raises:
        UsageError: if there are none, too many, or one of them twice.
        ConfigError: if the file is wrong.
    """
    lists: list[list[Pairs]] = [] if file is None else [_points_of_file(file)]
    keys: list[str] = []
    for text in axes:
        key, values = _axis(text)
        if key in keys:
            raise UsageError(f"--sweep {key}: given twice; name all its values at once")
        keys.append(key)
        lists.append([(f"{key}={value}",) for value in values])
    total = 1
    for points in lists:
        total *= len(points)
    if total > _MOST_POINTS:
        raise UsageError(f"a sweep of {total:,} points: at most {_MOST_POINTS:,}")
    combined: Iterable[tuple[Pairs, ...]] = itertools.product(*lists)
    found = [tuple(itertools.chain.from_iterable(parts)) for parts in combined]
    for point in found:
        _refuse_keys(point)
    return found


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, rest = text.partition("=")
    if not equals or "." not in key:
        raise UsageError(f"--sweep {text}: expected SECTION.KEY=VALUE,VALUE")
    try:
        values = [to_value(value) for value in split_values(rest)]
    except ValueError as error:
        raise UsageError(f"--sweep {text}: {error}") from error
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise UsageError(f"--sweep {text}: {twice[0]} is given twice")
    return key.strip(), values


def _refuse_keys(point: Pairs) -> None:
    """Refuse keys that a sweep sets itself, and one that a point has twice.

    Raises:
        UsageError: naming the first.
    """
    keys = [_pair(text)[0] for text in point]
    for number, key in enumerate(keys):
        if key in _OURS:
            raise UsageError(
                f"{key} cannot be swept: run.name is the sweep's, and each point has its number"
            )
        if key.startswith("job."):
            raise UsageError(f"{key} cannot be swept: all points are in one job array")
        if key in keys[:number]:
            raise UsageError(f"{key} is in the list of points, and in --sweep too")


def _pair(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key, value


def _points_of_file(file: Path) -> list[Pairs]:
    """Return the points of a file: TOML with a table [[points]] for each, or CSV.

    Raises:
        ConfigError: if it is wrong.
    """
    try:
        text = read_whole(file, 10**7).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--sweep-file {file}: cannot be read: {reason}") from error
    points = _of_toml(text, file) if file.suffix == ".toml" else _of_csv(text, file)
    if not points:
        raise ConfigError(f"--sweep-file {file}: holds no point")
    return points


def _of_toml(text: str, file: Path) -> list[Pairs]:
    table = parse(text, str(file)).table
    points = table.pop("points", None)
    if table or not isinstance(points, list) or not all(isinstance(one, dict) for one in points):
        more = f", not {listed([repr(key) for key in table])}" if table else ""
        raise ConfigError(f"--sweep-file {file}: expected a table [[points]] for each point{more}")
    return [tuple(f"{key}={to_value(value)}" for key, value in _flat(one)) for one in points]


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _of_csv(text: str, file: Path) -> list[Pairs]:
    rows = [row for row in csv.reader(io.StringIO(text), skipinitialspace=True) if any(row)]
    if not rows or not all("." in key for key in rows[0]):
        raise ConfigError(
            f"--sweep-file {file}: the first line names the keys, SECTION.KEY, between commas"
        )
    keys = [key.strip() for key in rows[0]]
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(keys):
            raise ConfigError(
                f"--sweep-file {file}, point {number}: {len(row)} values for {len(keys)} keys"
            )
    return [
        # An empty cell: as the config has it.
        tuple(
            f"{key}={to_value(_cell(cell.strip(), key, file))}"
            for key, cell in zip(keys, row, strict=True)
            if cell.strip()
        )
        for row in rows[1:]
    ]


def _cell(text: str, key: str, file: Path) -> Any:
    try:
        return parse_value(text)
    except ValueError as error:
        raise ConfigError(f"--sweep-file {file}: {key}={text}: {error}") from error


def with_new_points(folder: Path, command: Sequence[str], asked: Iterable[Pairs]) -> Sweep:
    """Return the sweep of a folder with what is asked for; points that it has keep their numbers.

    Raises:
        ConfigError: if the sweep that is there is one of another config, or damaged.
    """
    before = read_sweep(folder)
    if before is not None and before.command[:1] != tuple(command[:1]):
        raise ConfigError(
            f"{folder / SWEEP} is a sweep of {''.join(before.command[:1])}: give this one a name "
            "of its own, run.name=..."
        )
    points = list(before.points if before else ())
    known = {frozenset(point.overrides) for point in points}
    for overrides in asked:
        if frozenset(overrides) not in known:
            points.append(Point(number=len(points), overrides=overrides))
    return Sweep(folder=folder, command=tuple(command), points=tuple(points))


def numbers_of(sweep: Sweep, asked: Iterable[Pairs]) -> list[int]:
    """Return the numbers of the points that are asked for."""
    wanted = {frozenset(overrides) for overrides in asked}
    return [each.number for each in sweep.points if frozenset(each.overrides) in wanted]


def read_sweep(folder: Path) -> Sweep | None:
    """Return the sweep of a folder, None where there is none.

    Raises:
        ConfigError: if sweep.json is damaged.
    """
    path = folder / SWEEP
    try:
        document = parse_json(read_whole(path, 10 * SMALL))
        points = tuple(
            Point(
                number=number,
                overrides=tuple(map(str, each["overrides"])),
                job=None if each.get("job") is None else str(each["job"]),
            )
            for number, each in enumerate(document["points"])
        )
        command = tuple(map(str, document["command"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise ConfigError(f"{path} cannot be read: {explained(error, path)}") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; remove it to begin anew") from error
    return Sweep(folder=folder, command=command, points=points)


def write_sweep(sweep: Sweep) -> None:
    """Write sweep.json, whole or not at all.

    Raises:
        ConfigError: if that is not possible.
    """
    points = [{"run": each.name, **dataclasses.asdict(each)} for each in sweep.points]
    content = {"version": _VERSION, "command": sweep.command, "points": points}
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        replace_file(sweep.folder / SWEEP, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise ConfigError(f"cannot write {sweep.folder / SWEEP}: {error.strerror}") from error


def index_list(numbers: Iterable[int]) -> str:
    """Return indices as Slurm and LSF take them: "0-2,5"."""
    return ",".join(ranges(sorted(numbers), to="-"))
