"""A report: the page of some runs as one file with the data in it, and its plots as images.

Long curves become short ones that look the same.
"""

from __future__ import annotations

import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise, zip_longest
from pathlib import Path
from typing import Any, TypeGuard

from hpctrain.errors import OutputError
from hpctrain.observe.machine.log import FOLDER as MACHINE
from hpctrain.observe.metrics import JSONL_FILE
from hpctrain.observe.records import NONFINITE, WALL_TIME, flat, from_line
from hpctrain.utils.files import replace_file
from hpctrain.utils.permissions import explained
from hpctrain.utils.text import printable
from hpctrain.version import __version__
from hpctrain.watch import page
from hpctrain.watch.run_files import LOG, PIECE_BYTES, GrowingFile, RunFiles

NAME = "report.html"

MOST_POINTS = 50_000
"""Of all curves of a report together: some 1 MB of it."""

PHASES = "seconds."
"""Beginning of the keys that say how long a phase took since the line before."""

_STRETCHES = 240

_FEWEST, _MOST = 60, 4000
MOST_SERIES = MOST_POINTS // _FEWEST
"""Curves of a report; it says how many more there are."""
_OF_THE_LINE = frozenset({"kind", "split", "step", "epoch", "samples_seen", WALL_TIME})
_DIGITS = 7

MACHINE_BYTES = 600_000
"""Of machine figures in a report; of more, those of some minutes become one line."""

_COLUMNS = 240
"""Of a host, at most: as many as the page's map of ranks has."""
_HOST_BYTES = 2**21
"""Of a host that are looked at: of more, every second line, or every third."""
_END_BYTES = 2**14
_END_OF_TIME = 1e11

_LOG_BYTES = 200_000
"""Of a log, its end."""


def write_report(runs: Sequence[RunFiles], target: Path) -> int:
    """Write the page of some runs to a file.

    Args:
        runs: that it shows.
        target: the file; one that is there is replaced.

    Returns:
        Its size in bytes.

    Raises:
        OutputError: if it cannot be written.
    """
    content = page.reported(gathered(runs)).encode()
    try:
        replace_file(target, content)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {explained(error, target)}") from error
    return len(content)


def gathered(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Return what a report of some runs holds, as JSON."""
    return {
        "version": __version__,
        "time": time.time(),
        "runs": [
            {
                "name": run.name,
                "facts": run.facts(),
                "curves": curves(_records(run), MOST_POINTS // len(runs)),
                "log": _end_of_log(run),
                "machines": _machines(run, MACHINE_BYTES // len(runs)),
            }
            for run in runs
        ],
    }


def write_images(runs: Sequence[RunFiles], folder: Path) -> list[Path]:
    """Write a PNG for every number of the metrics, with a line for each run and split.

    Returns:
        The files.

    Raises:
        OutputError: without matplotlib, or where the files cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise OutputError(
            "--png draws with matplotlib, which is not installed: pip install 'hpctrain[plots]'"
        ) from error
    lines: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for run in runs:
        for series in curves(_records(run))["series"]:
            label = f"{run.name} {series['split']}" if len(runs) > 1 else series["split"]
            lines.setdefault(series["key"], []).append((_plain(label), series))
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for key, drawn in sorted(lines.items()):
            figure = Figure(figsize=(6.0, 4.0), dpi=150, layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.add_subplot(xlabel="step", ylabel=_plain(key))
            for label, series in drawn:
                values = [float("nan") if value is None else value for value in series["value"]]
                axes.plot(series["step"], values, label=label, linewidth=1.2)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
            path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', key)}.png"
            with warnings.catch_warnings():  # such as of a letter that its font has not
                warnings.simplefilter("ignore", UserWarning)
                figure.savefig(path)
            written.append(path)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {explained(error, folder)}") from error
    return written


def _plain(name: str) -> str:
    """Return a name as matplotlib draws it letter by letter: between two $ it reads formulas.

    Of labels that begin with an underscore it has none in a legend.
    """
    plain = printable(name).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def _machines(run: RunFiles, most_bytes: int) -> dict[str, list[dict[str, Any]]]:
    """Return the machine figures of every host; the lines of slow ranks all stay.

    Where they do not fit, those of a stretch of time are one, the same stretches for all hosts, so
    that none is left without: means, and of each rank the longest time.
    """
    files = [each for each in run.growing() if each.name.startswith(f"{MACHINE}/")]
    begun = {each.name: _first_figures(run, each.name) for each in files}
    begun = {name: lines for name, lines in begun.items() if lines}
    if not begun:
        return {Path(each.name).stem: [] for each in files}
    line_bytes = sum(len(page.as_json(of_line([lines[0]]))) for lines in begun.values())
    most_lines = min(_COLUMNS, max(2, most_bytes // line_bytes))
    first = min(line[WALL_TIME] for lines in begun.values() for line in lines)
    last = max((_last_time(run, each) for each in files), default=first)
    spacing = statistics.median(
        [b[WALL_TIME] - a[WALL_TIME] for lines in begun.values() for a, b in pairwise(lines)] or [0]
    )
    width = max((last - first) / most_lines, 1.5 * spacing, 1.0)
    fits = last - first < most_lines * spacing
    return {
        Path(each.name).stem: _stretches(run, each, None if fits else width, first)
        for each in files
    }


def _stretches(
    run: RunFiles, file: GrowingFile, width: float | None, first: float
) -> list[dict[str, Any]]:
    """Return the figures of a host, a line for each stretch of so many seconds; None: every one."""
    found: dict[int, list[dict[str, Any]]] = {}
    told = []
    every = -(-file.size // _HOST_BYTES) or 1
    for i, (_, line) in enumerate(run.lines(file.name)):
        # What does not stay is not parsed either: of a run of months next to all.
        if i % every and b"straggler" not in line:
            continue
        if (record := from_line(line)) is None:
            continue
        if record["kind"] != "machine":
            told.append(record)
        elif (moment := _moment(record)) is not None:
            stretch = i if width is None else int(max(0.0, moment - first) / width)
            found.setdefault(stretch, []).append(record)
    lines = []
    for stretch, records in sorted(found.items()):
        merged = of_line(records)
        if width is not None:
            merged[WALL_TIME] = round(first + (stretch + 0.5) * width, 1)
        lines.append(merged)
    return [*lines, *told]


def of_line(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the page draws of lines of machine figures, as one line."""
    devices, memory = _parts(records, "devices"), _parts(records, "memory")
    own: dict[Any, float] = {}
    for ranks in _parts(records, "ranks"):
        named, steps, others = (ranks.get(key) for key in ("rank", "step", "others"))
        if isinstance(named, list) and isinstance(steps, list):
            waited = others if isinstance(others, list) else []
            for rank, step, other in zip_longest(named, steps, waited):
                if _is_number(rank) and _is_number(step):
                    mine = step - (other if _is_number(other) else 0.0)
                    own[rank] = max(own.get(rank, mine), mine)
    mean = statistics.fmean
    figures: dict[str, Any] = {
        "cpu": {"busy": _mean([_known(each.get("busy"), mean) for each in _parts(records, "cpu")])},
        "memory": {
            key: _mean([_known(each.get(key), mean) for each in memory]) for key in ("used", "job")
        },
        "disk": {"all": _mean([_known(each, sum) for each in _parts(records, "disk")])},
        "network": {"all": [_mean([_known(each, sum) for each in _parts(records, "network")])]},
        "devices": {
            key: [_mean([_known(each.get(key), act) for each in devices])]
            for key, act in (("busy", mean), ("memory", sum), ("watts", sum), ("celsius", max))
        },
        "ranks": {"rank": list(own), "step": [_short(each) for each in own.values()]},
    }
    line: dict[str, Any] = {"kind": "machine", "step": records[-1]["step"]}
    for key, values in figures.items():
        known = {name: each for name, each in values.items() if each not in (None, [None], [])}
        if known:
            line[key] = known
    return {**line, WALL_TIME: records[-1].get(WALL_TIME)}


def _parts(records: Iterable[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    return [part for each in records if isinstance(part := each.get(key), Mapping)]


def _known(value: object, act: Callable[[list[float]], float]) -> float | None:
    """Return what a function makes of the numbers in a value; None where there are none."""
    if isinstance(value, Mapping):
        value = list(value.values())
    found: list[float] = []
    for each in value if isinstance(value, list) else [value]:
        found += [one for one in (each if isinstance(each, list) else [each]) if _is_number(one)]
    try:
        return float(act(found)) if found else None
    except OverflowError:  # not of ours
        return None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _short(sum(known) / len(known)) if known else None


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _first_figures(run: RunFiles, name: str) -> list[dict[str, Any]]:
    """Return the first lines of machine figures of a host, a few of them."""
    records = (from_line(line) for _, line in islice(run.lines(name), 20))
    return [
        record
        for record in records
        if record is not None and record["kind"] == "machine" and _moment(record) is not None
    ]


def _last_time(run: RunFiles, file: GrowingFile) -> float:
    """Return when a host wrote for the last time, in seconds since 1970; 0: nobody knows."""
    try:
        content = run.piece(file.name, max(0, file.size - _END_BYTES), _END_BYTES)
    except OSError:
        return 0.0
    records = map(from_line, content.splitlines(keepends=True))
    moments = (_moment(record) for record in records if record is not None)
    return max((moment for moment in moments if moment is not None), default=0.0)


def _moment(record: Mapping[str, Any]) -> float | None:
    """Return when a line was written; None where that is not a time of this world."""
    moment = record.get(WALL_TIME)
    return float(moment) if _is_number(moment) and 0 < moment < _END_OF_TIME else None


def _records(run: RunFiles, name: str = JSONL_FILE) -> Iterator[dict[str, Any]]:
    """Yield the whole records of a file of a run; none where there are none."""
    for _, line in run.lines(name):
        if (record := from_line(line)) is not None:
            yield record


def _end_of_log(run: RunFiles) -> list[str]:
    size = next((each.size for each in run.growing() if each.name == LOG), 0)
    try:
        content = run.piece(LOG, max(0, size - _LOG_BYTES), PIECE_BYTES)
    except OSError:
        return []
    lines = content.decode("utf-8", "replace").splitlines()
    return lines[1:] if size > _LOG_BYTES else lines


def thinned(values: Sequence[float | None], most: int) -> list[int]:
    """Return the indices of the values to keep: of every stretch its lowest, highest and last.

    A spike, a NaN's gap and the ends stay, which every n-th value would lose.

    Args:
        values: of a curve; None where it has a gap.
        most: how many to keep, at most, 4 at least.
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    kept = {0, count - 1}
    stretches = (most - 2) // 3
    for stretch in range(stretches):
        first, stop = stretch * count // stretches, (stretch + 1) * count // stretches
        known = [i for i in range(first, stop) if values[i] is not None]
        if known:
            kept.add(min(known, key=values.__getitem__))  # type: ignore[arg-type]
            kept.add(max(known, key=values.__getitem__))  # type: ignore[arg-type]
        if len(known) < stop - first:
            kept.add(next(i for i in range(first, stop) if values[i] is None))
        elif not {stop - 1} & kept:
            kept.add(stop - 1)
    return sorted(kept)


def curves(records: Iterable[Mapping[str, Any]], most: int = MOST_POINTS) -> dict[str, Any]:
    """Return all numbers of metrics.jsonl as thinned curves.

    Args:
        records: of metrics.jsonl, in its order.
        most: points to keep, of all curves together, or so.

    Returns:
        {"axis": {"step", "samples", "epoch", "time": lists of the same length}, "series":
        [{"split", "key", "step", "value"}], "left_out": how many more there are}:
        numbers of seven digits, None for gaps. Seconds of phases are added up over stretches of
        lines, so that their sums stay what they were.
    """
    axis: list[tuple[int, Any, Any, Any]] = []
    series: dict[tuple[str, str], tuple[list[int], list[float | None]]] = {}
    left_out: set[int] = set()
    for record in records:
        step = record["step"]
        if not axis or step > axis[-1][0]:
            axis.append(
                (step, record.get("samples_seen"), record.get("epoch"), record.get(WALL_TIME))
            )
        split = str(record.get("split", "train"))
        plain = {key: value for key, value in record.items() if key != NONFINITE}
        for key, value in flat(plain).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if key in _OF_THE_LINE or not (is_number or value is None):
                continue
            name = split, key.removeprefix("logged.")
            if name not in series and len(series) >= MOST_SERIES:
                left_out.add(hash(name))
                continue
            steps, values = series.setdefault(name, ([], []))
            if steps and steps[-1] == step:
                values[-1] = value
            else:
                steps.append(step)
                values.append(value)
    each = min(_MOST, max(_FEWEST, most // max(len(series), 1)))
    return {
        "left_out": len(left_out),
        "axis": _columns(axis, each),
        "series": [
            _series(split, key, steps, values, each)
            for (split, key), (steps, values) in series.items()
        ],
    }


def _columns(axis: Sequence[tuple[int, Any, Any, Any]], most: int) -> dict[str, list[Any]]:
    """Return the axis as columns; a line between two of its rows stands for those left out."""
    rows = axis
    if len(axis) > most:
        rows = [axis[i * (len(axis) - 1) // (most - 1)] for i in range(most)]
    names = ("step", "samples", "epoch", "time")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _series(
    split: str, key: str, steps: Sequence[int], values: Sequence[float | None], most: int
) -> dict[str, Any]:
    if key.startswith(PHASES):
        steps, values = _added_up(steps, values)
    else:
        kept = thinned(values, most)
        steps, values = [steps[i] for i in kept], [values[i] for i in kept]
    return {"split": split, "key": key, "step": steps, "value": [_rounded(each) for each in values]}


def _added_up(
    steps: Sequence[int], values: Sequence[float | None]
) -> tuple[list[int], list[float | None]]:
    """Return the sums of a curve over stretches, each at its last step."""
    length = -(-len(steps) // _STRETCHES) or 1
    firsts = range(0, len(steps), length)
    ends = [steps[min(first + length, len(steps)) - 1] for first in firsts]
    return ends, [sum(filter(None, values[first : first + length])) for first in firsts]


def _rounded(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.{_DIGITS}g}")
