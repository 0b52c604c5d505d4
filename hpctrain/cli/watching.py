"""Looking at runs: a live page, and a report. For one process, from any login node."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.cli.usage import Parser, count
from hpctrain.errors import ExitCode
from hpctrain.utils.streams import write_out
from hpctrain.utils.text import plural, printable, printable_lines, size

if TYPE_CHECKING:
    from hpctrain.watch.run_files import RunFiles


def watch(arguments: list[str]) -> int:
    """Show runs while they train: in the terminal, or to a browser."""
    parser = Parser("watch")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--serve", action="store_true")
    listening = parser.add_mutually_exclusive_group()
    listening.add_argument("--port", type=count)
    listening.add_argument("--unix-socket", type=Path)
    parsed = parser.parse_intermixed_args(arguments)

    if not parsed.serve and (parsed.port is not None or parsed.unix_socket is not None):
        parser.error("--port and --unix-socket are of the page: give --serve too")
    runs = _opened(parsed.runs)
    if not parsed.serve:
        from hpctrain.watch.terminal import show

        show(runs, sys.stdout)
        return ExitCode.DONE
    from hpctrain.watch.server import serve

    def say(line: str) -> None:
        write_out(f"{printable(line)}\n")

    serve(runs, say, port=parsed.port, unix_socket=parsed.unix_socket)
    return ExitCode.DONE


def report(arguments: list[str]) -> int:
    """Write the page of runs to a file."""
    parser = Parser("report")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--png", type=Path)
    parsed = parser.parse_intermixed_args(arguments)

    from hpctrain.watch.report import NAME, write_images, write_report

    runs = _opened(parsed.runs)
    target = parsed.output or Path(NAME)
    lines = [f"{target}: {size(write_report(runs, target))}"]
    if parsed.png is not None:
        images = write_images(runs, parsed.png)
        lines.append(f"{parsed.png}: {plural(len(images), 'image')}")
    write_out("".join(f"{printable(line)}\n" for line in lines))
    return ExitCode.DONE


def runs(arguments: list[str]) -> int:
    """List the runs of a folder."""
    parser = Parser("runs")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sort")
    parser.add_argument("--reverse", action="store_true")
    parsed = parser.parse_args(arguments)

    from hpctrain.checkpoint.lease import holder_lives
    from hpctrain.watch.runs import find_runs, ordered, run_row, sweep_rows, table_of

    rows = sweep_rows(parsed.folder, holder_lives) or [
        run_row(run, holder_lives, str(run.relative_to(parsed.folder)))
        for run in find_runs(parsed.folder)
    ]
    rows = ordered(rows, parsed.sort, reverse=parsed.reverse)
    if parsed.json:
        write_out(f"{json.dumps([asdict(row) for row in rows], indent=1)}\n")
    else:
        write_out(f"{printable_lines(table_of(rows))}\n")
    return ExitCode.DONE


def compare(arguments: list[str]) -> int:
    """Show two runs side by side."""
    parser = Parser("compare")
    parser.add_argument("one", type=Path, metavar="RUN")
    parser.add_argument("other", type=Path, metavar="RUN")
    parsed = parser.parse_args(arguments)

    from hpctrain.checkpoint.lease import holder_lives
    from hpctrain.watch.runs import compared

    write_out(f"{printable_lines(compared(parsed.one, parsed.other, holder_lives))}\n")
    return ExitCode.DONE


def _opened(folders: list[Path]) -> list[RunFiles]:
    from hpctrain.checkpoint.lease import holder_lives
    from hpctrain.watch.run_files import RunFiles

    return [RunFiles(folder, holder_lives) for folder in folders]
