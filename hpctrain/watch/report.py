"""A report: the page of some runs as one file with the data in it, and its plots as images."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpctrain.errors import OutputError
from hpctrain.observe.machine_log import FOLDER as MACHINE
from hpctrain.observe.metrics import JSONL_FILE
from hpctrain.observe.records import from_line
from hpctrain.utils.files import replace_file
from hpctrain.utils.permissions import explained
from hpctrain.version import __version__
from hpctrain.watch import page
from hpctrain.watch.run_files import LOG, PIECE_BYTES, RunFiles
from hpctrain.watch.thinning import MOST_POINTS, curves

NAME = "report.html"

MACHINE_BYTES = 400_000
"""Of lines of machine figures in a report; of more every second stays, or every third."""

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
            lines.setdefault(series["key"], []).append((label, series))
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for key, drawn in sorted(lines.items()):
            figure = Figure(figsize=(6.0, 4.0), dpi=150, layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.add_subplot(xlabel="step", ylabel=key)
            for label, series in drawn:
                values = [float("nan") if value is None else value for value in series["value"]]
                axes.plot(series["step"], values, label=label, linewidth=1.2)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
            path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', key)}.png"
            figure.savefig(path)
            written.append(path)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {explained(error, folder)}") from error
    return written


def _machines(run: RunFiles, most_bytes: int) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of machine figures by host, evenly thinned; those of slow ranks all stay."""
    files = [each for each in run.growing() if each.name.startswith(f"{MACHINE}/")]
    every = -(-sum(each.size for each in files) // most_bytes) or 1
    return {
        Path(each.name).stem: [
            record
            for i, record in enumerate(_records(run, each.name))
            if i % every == 0 or record["kind"] != "machine"
        ]
        for each in files
    }


def _records(run: RunFiles, name: str = JSONL_FILE) -> Iterator[dict[str, Any]]:
    """Yield the whole records of a file of a run; none where there are none."""
    rest, start = b"", 0
    while True:
        try:
            piece = run.piece(name, start)
        except OSError:
            return
        if not piece:
            return
        start += len(piece)
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if (record := from_line(line + b"\n")) is not None:
                yield record


def _end_of_log(run: RunFiles) -> list[str]:
    size = next((each.size for each in run.growing() if each.name == LOG), 0)
    try:
        content = run.piece(LOG, max(0, size - _LOG_BYTES), PIECE_BYTES)
    except OSError:
        return []
    lines = content.decode("utf-8", "replace").splitlines()
    return lines[1:] if size > _LOG_BYTES else lines
