"""Which command a command line asks for, and the exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hpctrain.cli.jobs import check, evaluate, predict, run, test
from hpctrain.cli.tools import bundle, ckpt, compare, data, report, runs, status, watch
from hpctrain.cli.usage import HELP, USAGES, help_of, say, usage_error
from hpctrain.errors import ExitCode, HpctrainError, LaunchError, UsageError
from hpctrain.launch.environment import Claim, launchers_in, this_process
from hpctrain.launch.reporter import report_once
from hpctrain.version import __version__


def _init(arguments: list[str]) -> int:
    from hpctrain.cli.beginning import init

    return init(arguments)


def _config(arguments: list[str]) -> int:
    from hpctrain.cli.beginning import config

    return config(arguments)


def _completion(arguments: list[str]) -> int:
    from hpctrain.cli.beginning import completion

    return completion(arguments)


def _job(arguments: list[str]) -> int:
    from hpctrain.cli.submitting import job  # what no other command needs

    return job(arguments)


def _prepare(arguments: list[str]) -> int:
    from hpctrain.cli.scripts import prepare

    return prepare(arguments)


def _run_script(arguments: list[str], claim: Claim) -> int:
    from hpctrain.cli.scripts import run_script

    return run_script(arguments, claim)


OPTIONS = {"-h": HELP, "--help": HELP, "--version": f"hpctrain {__version__}\n"}
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "init": _init,
    "config": _config,
    "completion": _completion,
    "status": status,
    "job": _job,
    "ckpt": ckpt,
    "bundle": bundle,
    "prepare": _prepare,
    "watch": watch,
    "report": report,
    "runs": runs,
    "compare": compare,
}
ON_ALL_RANKS: dict[str, Callable[[list[str], Claim], int]] = {
    "data": data,
    "run": _run_script,
    "check": check,
    "evaluate": evaluate,
    "test": test,
    "predict": predict,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(arguments, claim_for(arguments))
    except HpctrainError as error:
        if not error.reported:
            report_once(error)
        return error.exit_code


def claim_for(arguments: Sequence[str]) -> Claim:
    """Return who this process is for a command line.

    Raises:
        LaunchError: if the launch is broken, and training is what was asked for.
    """
    try:
        return this_process()
    except LaunchError:
        if _is_one_of_nodes(arguments):
            return Claim(launcher=None, rank=0, world_size=1)
        if _is_collective(arguments):
            raise
        # Work for one process; it only matters which one it is.
        from hpctrain.launch.reporter import may_report

        return Claim(launcher=None, rank=0 if may_report(os.environ) else 1, world_size=None)


def _is_one_of_nodes(arguments: Sequence[str]) -> bool:
    """Tell whether this command is given once on each of several nodes, and is no rank yet."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    is_told = not given.isdisjoint({"--num-nodes", "--node-rank"}) or (
        arguments[:1] == ["run"] and "NODE_RANK" in os.environ
    )
    return is_told and "RANK" not in os.environ and not launchers_in(os.environ)


def _is_collective(arguments: Sequence[str]) -> bool:
    """Tell whether a command line is work for all ranks together."""
    from hpctrain.convert.options import COLLECTIVE

    if arguments[:1] == ["data"]:
        return not COLLECTIVE.isdisjoint(arguments[1:2])
    return bool(arguments) and arguments[0] not in (*COMMANDS, *OPTIONS)


def _require_folder() -> None:
    """Check that relative paths lead somewhere.

    Raises:
        UsageError: if the working directory has been removed.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(
            f"the working directory is gone ({error.strerror}): change to one that is there"
        ) from error


def _asks_for_help(first: str, rest: Sequence[str]) -> bool:
    """Tell whether a command line asks for help; what follows a script is the script's own.

    `data` has a help for each of its tools.
    """
    if first in ("run", "prepare"):
        rest = rest[:1]
    return first != "data" and not {"-h", "--help"}.isdisjoint(rest)


def _answer(first: str, rest: Sequence[str]) -> str | None:
    """Return the help or the versions that are asked for, None: neither is."""
    if {first, *rest} == {"--version", "--all"}:
        from hpctrain.cli.beginning import all_versions

        return all_versions()
    if first in OPTIONS:
        return OPTIONS[first]
    if _asks_for_help(first, rest):
        return help_of(first) if first in USAGES else HELP
    return None


def dispatch(arguments: list[str], claim: Claim) -> int:
    """Find the command among the arguments and run it.

    Raises:
        UsageError: if there is none, or its own arguments do not fit.
    """
    if not arguments:
        raise usage_error("a config file or a command is needed")
    first, rest = arguments[0], arguments[1:]
    if claim.rank in (None, 0) and (text := _answer(first, rest)) is not None:
        return say(claim, text)
    if first in OPTIONS or _asks_for_help(first, rest):
        return ExitCode.DONE
    _require_folder()
    if first in COMMANDS:
        # These are work for one process, also where a launcher started several.
        return COMMANDS[first](rest) if claim.rank in (None, 0) else ExitCode.DONE
    if first in ON_ALL_RANKS:
        return ON_ALL_RANKS[first](rest, claim)
    return run(arguments, claim)
