"""The tools: status, watch, report, runs, compare, checkpoints, bundles and datasets.

They are of one process, on any login node, but for those for datasets that share their work among
all ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.cli.usage import PROGRAM, Parser, count, examples_of, say
from hpctrain.errors import DatasetError, ExitCode, HpctrainError, OutputError
from hpctrain.launch.environment import Claim
from hpctrain.launch.reporter import reporting
from hpctrain.utils.streams import write_out
from hpctrain.utils.text import plural, printable, printable_lines, size

if TYPE_CHECKING:
    from hpctrain.watch.run_files import RunFiles

_ENDING_SECONDS = 10.0
"""A script asks once its launcher has ended, which a killed launcher does before its ranks."""


def status(arguments: list[str]) -> int:
    """Tell how a run ended, or where it stands."""
    parser = Parser("status")
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--exit-code", action="store_true")
    parser.add_argument("--max-tries", type=count)
    parsed = parser.parse_args(arguments)

    from hpctrain.batch.exit_status import read_status, to_json, to_text
    from hpctrain.observe.job_record import job_times, node_hours
    from hpctrain.observe.machine.log import energy_line
    from hpctrain.observe.records import newest_records
    from hpctrain.watch.run_files import energy_of_run, goodput_of

    # A person may ask from any job, a script asks about its own.
    environ = os.environ if parsed.exit_code else {}
    lives = _lives(parsed.run, _ENDING_SECONDS if parsed.exit_code else 0.0)
    spent = goodput_of(parsed.run, runs=lives)
    jobs = job_times(parsed.run)
    found = read_status(
        parsed.run,
        environ,
        parsed.max_tries,
        lives=lives,
        metrics=newest_records(parsed.run / "metrics.jsonl"),
        goodput=None if spent is None else spent.to_json(),
        used=node_hours(jobs),
        energy=energy_of_run(parsed.run, jobs),
    )
    try:
        shown = to_text(
            parsed.run,
            found,
            for_script=parsed.exit_code,
            goodput=None if spent is None else spent.line(),
            energy=energy_line(found.energy) if jobs else None,
        )
        text = printable_lines(shown)
        write_out(to_json(found) if parsed.json else text)
    except OutputError:
        if not parsed.exit_code:  # a script branches on the code, and its log may be full
            raise
    return found.exit_code if parsed.exit_code else ExitCode.DONE


def _lives(run: Path, wait_seconds: float) -> bool | None:
    """Tell whether a run's process lives; one that may be about to end is given the time to."""
    from hpctrain.checkpoint.lease import holder_lives

    end = time.monotonic() + wait_seconds
    while (lives := holder_lives(run)) and time.monotonic() < end:
        time.sleep(0.2)
    return lives


def bundle(arguments: list[str]) -> int:
    """Pack what shows how a run went, for a support desk."""
    parser = Parser("bundle")
    parser.add_argument("run", type=Path)
    parser.add_argument("more", type=Path, nargs="*")
    parser.add_argument("--output", type=Path)
    parsed = parser.parse_args(arguments)

    from hpctrain.batch.exit_status import read_status, to_text
    from hpctrain.observe.bundle import bundle as pack

    run = parsed.run
    try:
        status = to_text(run, read_status(run, {}, lives=_lives(run, 0.0)), for_script=True)
    except HpctrainError as error:
        status = f"{error}\n"
    name = printable(run.resolve().name) or "run"
    target = parsed.output or Path(f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    lines = pack(run, target, status=status, more=tuple(parsed.more))
    held = size(target.stat().st_size)
    write_out(
        "\n".join([*lines, f"{printable(str(target))}: {held}; look into it before you send it"])
        + "\n"
    )
    return ExitCode.DONE


def ckpt(arguments: list[str]) -> int:
    """Look at checkpoints; RUN is the folder of a run or of one of its checkpoints."""
    parser = Parser("ckpt")
    parser.add_argument("tool", choices=["ls", "verify", "diff", "export"])
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--average", action="store_true")
    parser.add_argument("--best", action="store_true")
    parsed = parser.parse_args(arguments)
    tool, other = parsed.tool, parsed.other
    if (other is None) != (tool in ("ls", "verify")) and tool != "diff":
        parser.error("ckpt export needs a FILE" if other is None else f"ckpt {tool} takes one RUN")
    if (parsed.average or parsed.best) and tool != "export":
        parser.error("--average and --best belong to ckpt export")

    from hpctrain.checkpoint import export, inspect

    if tool == "ls":
        text = inspect.listed(parsed.run)
    elif tool == "verify":
        text = inspect.verified(parsed.run)
    elif tool == "diff":
        text = inspect.compared(parsed.run, other)
    elif other.suffix == ".ckpt":
        from hpctrain.checkpoint.lightning_file import export_lightning

        text = export_lightning(parsed.run, other, average=parsed.average, best=parsed.best)
    elif other.suffix == ".pt2":
        from hpctrain.training.inference.exported_program import export_program

        text = export_program(parsed.run, other, average=parsed.average, best=parsed.best)
    else:
        text = export.export(parsed.run, other, average=parsed.average, best=parsed.best)
    write_out(printable_lines(text) + "\n")
    return ExitCode.DONE


def data(arguments: list[str], claim: Claim) -> int:
    """Work on datasets: collective for the tools that share the work, else on rank 0 alone."""
    from hpctrain.convert.options import COLLECTIVE, declare

    asks_help = not {"-h", "--help"}.isdisjoint(arguments)
    is_collective = bool(COLLECTIVE.intersection(arguments[:1])) and not asks_help
    if claim.rank not in (None, 0) and not is_collective:
        return ExitCode.DONE
    parser = Parser(
        prog=f"{PROGRAM} data",
        add_help=True,
        epilog=f"examples:\n{examples_of('data')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tools = declare(parser)
    try:
        if arguments[:1] and arguments[0] in tools:
            # Options may stand between the names of files.
            parsed = tools[arguments[0]].parse_intermixed_args(arguments[1:])
        else:
            parsed = parser.parse_args(arguments)
    except SystemExit:  # argparse has printed its help
        return ExitCode.DONE

    from hpctrain.observe.progress import ToolProgress

    with closing(ToolProgress.of_job(f"{arguments[0]}:")) as progress:
        if is_collective:
            text = _data_on_all_ranks(parsed, claim, progress)
        else:
            from hpctrain.launch.communicators import SingleCommunicator

            try:
                text = parsed.work(parsed, SingleCommunicator(), progress)
            except MemoryError as error:
                raise DatasetError(
                    f"out of memory: {error}: the rows of these data are larger than this machine "
                    "can hold, or --jobs is more than it can hold them for"
                ) from error
    return say(claim, f"{text}\n")


def _data_on_all_ranks(
    parsed: argparse.Namespace, claim: Claim, progress: Callable[[int, int], None]
) -> str:
    """Do the work of a tool that ranks share. Collective: all ranks."""
    from hpctrain.config.schema import LaunchSection
    from hpctrain.launch.failure import guard
    from hpctrain.launch.process_group import control_plane, gathering

    with (
        control_plane(claim) as (topology, communicator),
        reporting(topology.is_rank_zero),
        guard(topology) as job_guard,
        gathering(topology, communicator, LaunchSection(), job_guard),
    ):
        shown = progress if topology.is_rank_zero else _silent
        return str(parsed.work(parsed, communicator, shown))


def _silent(done: int, total: int) -> None:
    """Leave it to rank 0 to tell how far it is."""


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
