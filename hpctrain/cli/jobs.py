"""The commands of all ranks together: a run, and its preflight."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.cli.processes import declare_processes, take_processes
from hpctrain.cli.usage import PROGRAM, USAGES, Parser, options_of, usage_error, usage_of
from hpctrain.config.importing import use_snapshot
from hpctrain.config.schema import Config
from hpctrain.errors import ConfigError, HpctrainError
from hpctrain.launch.environment import Claim
from hpctrain.launch.reporter import reporting
from hpctrain.topology import Communicator, Topology
from hpctrain.utils.streams import write_out
from hpctrain.utils.text import did_you_mean, nearest

if TYPE_CHECKING:
    from hpctrain.launch.failure import Guard


def run(arguments: list[str], claim: Claim) -> int:
    """Train. Collective: all ranks."""
    parsed = _parsed(Parser(""), arguments, claim, "")

    from hpctrain.batch.stop import SignalFlag
    from hpctrain.launch.process_group import gathering, loading

    # Signals are caught before MPI starts: a stop that comes during start-up is not lost.
    with (
        SignalFlag() as signals,
        started(parsed.config, parsed.overrides, claim) as job,
        gathering(job.topology, job.communicator, job.config.launch, job.guard) as meeting,
    ):
        with loading():
            from hpctrain.training.job import train  # brings torch, which has to follow MPI_Init

        return train(
            job.config,
            job.topology,
            job.communicator,
            meeting=meeting,
            signals=signals,
            guard=job.guard,
            command=[parsed.config, *parsed.overrides],
        )


def check(arguments: list[str], claim: Claim) -> int:
    """Try everything that a run needs, and train nothing. Collective: all ranks."""
    parser = Parser("check")
    parser.add_argument("--json", action="store_true")
    parsed = _parsed(parser, arguments, claim, "check")

    from hpctrain.preflight.report import start_failed_json
    from hpctrain.utils.streams import reserved_stdout

    with reserved_stdout(parsed.json) as out:
        try:
            with started(parsed.config, parsed.overrides, claim) as job:
                from hpctrain.preflight.job import check as check_all

                return check_all(
                    job.config,
                    job.topology,
                    job.communicator,
                    job.guard,
                    command=[parsed.config, *parsed.overrides],
                    out=out,
                    as_json=parsed.json,
                )
        except HpctrainError as error:
            # Before there is a report: machines get an object all the same.
            if parsed.json and claim.rank in (None, 0):
                write_out(f"{start_failed_json(parsed.config, error)}\n", out)
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every rank of a job has once it has begun."""

    config: Config
    topology: Topology
    communicator: Communicator
    guard: Guard


@contextmanager
def started(path: str, overrides: Sequence[str], claim: Claim) -> Iterator[Job]:
    """Check the config on rank 0, make the world, and hand the config to all ranks.

    Collective: all ranks.

    Raises:
        HpctrainError: if the config is wrong, or the ranks form no world; told already where all
            ranks hold it.
    """
    from hpctrain.launch.failure import guard
    from hpctrain.launch.process_group import control_plane

    # One rank reads the file; the others hear from it what is in it.
    config = _config_or_error(path, overrides) if claim.rank in (None, 0) else None
    if claim.launcher is None and isinstance(config, ConfigError):
        raise config
    with (
        control_plane(claim) as (topology, communicator),
        reporting(topology.is_rank_zero),
        guard(topology) as job_guard,
    ):
        config = communicator.broadcast(config)
        if isinstance(config, ConfigError):
            raise config
        assert config is not None
        yield Job(config=config, topology=topology, communicator=communicator, guard=job_guard)


def _parsed(
    parser: Parser, arguments: Sequence[str], claim: Claim, command: str
) -> argparse.Namespace:
    """Return the arguments of a job; where they ask for more processes, become what starts these.

    Args:
        parser: knows the command's own options.
        arguments: of the command line.
        claim: what the launcher says of this process.
        command: "check", or "" for the run itself.

    Raises:
        UsageError: if they do not fit.
    """
    _check_is_no_program(arguments)
    _check_is_option(arguments)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--code", type=Path)
    declare_processes(parser)
    # Overrides may stand before and after options.
    parsed = parser.parse_intermixed_args(arguments)
    _check_is_command(parsed.config)
    given = {"--json": vars(parsed).get("json"), f"--code={parsed.code}": parsed.code is not None}
    take_processes(
        parsed, command, claim, [option for option, is_given in given.items() if is_given]
    )
    if parsed.code is not None:
        use_snapshot(parsed.code)
    return parsed


def _check_is_no_program(arguments: Sequence[str]) -> None:
    """Tell how a program is run, where one stands in place of a config.

    Raises:
        UsageError: if it does.
    """
    path = next((word for word in arguments if not word.startswith("-")), "")
    if Path(path).suffix == ".py":
        raise usage_error(
            f"{path} is a Python program, not a config: {PROGRAM} run {' '.join(arguments)}",
            usage_of("run"),
        )


def _check_is_option(arguments: Sequence[str]) -> None:
    """Tell which option was meant, where there are options alone and one is not known.

    Raises:
        UsageError: if there is one.
    """
    if any(not word.startswith("-") for word in arguments):
        return
    known = [*options_of(""), "-h"]
    for word in arguments:
        option = word.partition("=")[0]
        if option not in known:
            raise usage_error(f"unrecognized arguments: {word}{did_you_mean(option, known)}")


def _check_is_command(word: str) -> None:
    """Tell which command was meant by what is neither one nor a config.

    Raises:
        UsageError: if one is near.
    """
    if Path(word).suffix or Path(word).exists():
        return
    near = nearest(word, [name for name in USAGES if name])
    if near is not None:
        raise usage_error(f"there is no command {word!r}; did you mean {near!r}?", usage_of(near))


def _config_or_error(path: str, overrides: Sequence[str]) -> Config | ConfigError:
    """Return the config, or what is wrong with it, as all ranks are about to hear it."""
    from hpctrain.config import load

    try:
        return load(path, overrides)
    except ConfigError as error:
        error.everywhere = True
        return error
