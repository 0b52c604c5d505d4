"""The tools for datasets: of one process, or of all ranks where the work can be shared."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing

from hpctrain.cli.help import PROGRAM
from hpctrain.cli.parsing import Parser
from hpctrain.cli.voice import say
from hpctrain.errors import DatasetError, ExitCode
from hpctrain.launch.launchers import Claim
from hpctrain.launch.voice import telling


def data(arguments: list[str], claim: Claim) -> int:
    """Work on datasets: collective for the tools that share the work, else on rank 0 alone."""
    from hpctrain.convert.options import COLLECTIVE, declare

    asks_help = not {"-h", "--help"}.isdisjoint(arguments)
    is_collective = bool(COLLECTIVE.intersection(arguments[:1])) and not asks_help
    if claim.rank not in (None, 0) and not is_collective:
        return ExitCode.DONE
    parser = Parser(prog=f"{PROGRAM} data", add_help=True)
    tools = declare(parser)
    try:
        if arguments[:1] and arguments[0] in tools:
            # Options may stand between the names of files.
            parsed = tools[arguments[0]].parse_intermixed_args(arguments[1:])
        else:
            parsed = parser.parse_args(arguments)
    except SystemExit:  # argparse has told its help
        return ExitCode.DONE

    from hpctrain.observe.progress import ToolProgress

    with closing(ToolProgress.of_job(f"{arguments[0]}:")) as progress:
        if is_collective:
            text = _data_on_all_ranks(parsed, claim, progress)
        else:
            from hpctrain.launch.single import SingleCommunicator

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
    from hpctrain.launch.world import control_plane, gathering

    with (
        control_plane(claim) as (topology, communicator),
        telling(topology.is_rank_zero),
        guard(topology) as keeper,
        gathering(topology, communicator, LaunchSection(), keeper),
    ):
        shown = progress if topology.is_rank_zero else _silent
        return str(parsed.work(parsed, communicator, shown))


def _silent(done: int, total: int) -> None:
    """Leave it to rank 0 to tell how far it is."""
