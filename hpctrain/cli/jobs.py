"""The commands of all ranks together: a run, its preflight, and evaluate, test and predict."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.cli.processes import declare_processes, take_processes
from hpctrain.cli.usage import PROGRAM, USAGES, Parser, options_of, say, usage_error, usage_of
from hpctrain.config.importing import use_snapshot
from hpctrain.config.schema import Config
from hpctrain.errors import ConfigError, ExitCode, HpctrainError
from hpctrain.launch.environment import Claim
from hpctrain.launch.reporter import reporting
from hpctrain.topology import Communicator, Topology, raise_together
from hpctrain.utils.streams import reserved_stdout, write_out
from hpctrain.utils.text import did_you_mean, metric, nearest, plural, printable

if TYPE_CHECKING:
    from hpctrain.launch.failure import Guard
    from hpctrain.training.inference.stage import Stage
    from hpctrain.training.inference.trained import Answer

SPLITS = ("validation", "test", "train")

_ABOUT_INFERENCE = (
    "Of the run in the config: its best checkpoint where it keeps one (checkpoint.keep_best), else "
    "its last; or of another one, or a file of weights. Under any launcher, with any number of "
    "ranks: every sample counts once."
)


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
        HpctrainError: if the config is wrong, or the ranks form no world; reported already where
            all ranks hold it.
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
    parser.take_config()
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


def evaluate(arguments: list[str], claim: Claim) -> int:
    """Print the metrics of a checkpoint on the samples of validation. Collective: all ranks."""
    return _metrics("evaluate", "validate", "validation", arguments, claim)


def test(arguments: list[str], claim: Claim) -> int:
    """Print the metrics of a checkpoint on the samples to test with. Collective: all ranks."""
    return _metrics("test", "test", "test", arguments, claim)


def predict(arguments: list[str], claim: Claim) -> int:
    """Write the predictions of a checkpoint for a split. Collective: all ranks."""
    parser = _inference_parser("predict", "test")
    parser.add_argument("--output", type=Path, metavar="FOLDER|FILE.nc", required=True)
    if (parsed := _inference_arguments("predict", parser, arguments, claim)) is None:
        return ExitCode.DONE
    command = [parsed.config, *parsed.overrides]
    found = _answered(
        command, claim, "predict", parsed.split, parsed.checkpoint, output=parsed.output
    )
    if found.missing:
        say(
            claim,
            f"{parsed.output}: stopped with {plural(found.missing, 'shard')} of predictions left; "
            "the same command goes on with them\n",
        )
        return ExitCode.STOPPED
    samples = plural(found.samples, "sample")
    return say(
        claim, f"{parsed.output}: predictions for {samples} of {parsed.split}, {_of(found)}\n"
    )


def _metrics(name: str, stage: Stage, split: str, arguments: list[str], claim: Claim) -> int:
    parser = _inference_parser(name, split)
    parser.add_argument("--json", action="store_true")
    if (parsed := _inference_arguments(name, parser, arguments, claim)) is None:
        return ExitCode.DONE
    command = [parsed.config, *parsed.overrides]
    with reserved_stdout(parsed.json) as out:
        found = _answered(command, claim, stage, parsed.split, parsed.checkpoint)
        if claim.rank in (None, 0):
            show = _json if parsed.json else _text
            write_out(show(found, parsed.split), out)
    return ExitCode.DONE


def _inference_parser(name: str, split: str) -> Parser:
    parser = Parser(name, prog=f"{PROGRAM} {name}", add_help=True, description=_ABOUT_INFERENCE)
    parser.take_config()
    parser.add_argument("--checkpoint", metavar="best|last|PATH")
    parser.add_argument("--split", metavar="|".join((*SPLITS, "NAME")), default=split)
    declare_processes(parser)
    return parser


def _inference_arguments(
    command: str, parser: Parser, arguments: list[str], claim: Claim
) -> argparse.Namespace | None:
    """Return what a command is given; None: it is its help that was asked for."""
    if not {"-h", "--help"}.isdisjoint(arguments) and claim.rank not in (None, 0):
        return None
    try:
        parsed = parser.parse_intermixed_args(arguments)
    except SystemExit:  # argparse has printed it
        return None
    given = vars(parsed)
    options = [
        f"--{key}={given[key]}" for key in ("checkpoint", "split", "output") if given.get(key)
    ]
    options += ["--json"] if given.get("json") else []
    take_processes(parsed, command, claim, options)
    return parsed


def _answered(
    command: Sequence[str],
    claim: Claim,
    stage: Stage,
    split: str,
    checkpoint: str | None,
    *,
    output: Path | None = None,
) -> Answer:
    """Return what comes of a command, on every rank. Collective: all ranks."""
    from hpctrain.batch.stop import SignalFlag
    from hpctrain.convert import netcdf
    from hpctrain.launch.process_group import gathering, loading, process_group

    file = output if output is not None and output.suffix == netcdf.SUFFIX else None
    # Ranks write shards, of which one makes the file in the end.
    folder = output if file is None else file.with_name(f"{file.name}.parts")
    if file is not None:
        netcdf.require_libraries()
    with ExitStack() as stack:
        # Metrics are soon there; of predictions whole shards stay, so that a stop is no loss.
        signals = None if output is None else stack.enter_context(SignalFlag())
        job = stack.enter_context(started(command[0], command[1:], claim))
        launch = job.config.launch
        meeting = stack.enter_context(gathering(job.topology, job.communicator, launch, job.guard))
        with loading():
            from hpctrain.observe import log
            from hpctrain.training.inference.trained import answer

        stack.enter_context(log.start(None, is_reporter=job.topology.is_rank_zero))
        world = stack.enter_context(
            process_group(job.topology, job.communicator, launch, meeting, job.guard)
        )
        found = answer(
            job.config,
            world,
            command,
            stage=stage,
            split=split,
            checkpoint=checkpoint,
            output=folder,
            stopping=lambda: signals is not None and bool(signals.value),
        )
        if file is not None and not found.missing:
            # The others wait for the one that writes.
            with world.pulse.long_phase(), raise_together(world.communicator):
                if world.topology.is_rank_zero:
                    assert folder is not None
                    netcdf.gather(folder, file, job.config, found.datasets[0])
        return found


def _of(found: Answer) -> str:
    """Return which weights these are."""
    step = "" if found.chosen.step is None else f" at step {found.chosen.step:,}"
    which = f"{found.chosen.weights} weights of {printable(found.chosen.why)}"
    return f"{which}{step} ({printable(found.chosen.source)})"


def _text(found: Answer, split: str) -> str:
    numbers = "\n".join(f"  {name} {metric(value)}" for name, value in found.metrics.items())
    return f"{split}: {plural(found.samples, 'sample')}, {_of(found)}\n{numbers}\n"


def _json(found: Answer, split: str) -> str:
    report = {
        "split": split,
        "samples": found.samples,
        "checkpoint": found.chosen.source,
        "step": found.chosen.step,
        "weights": found.chosen.weights,
        "metrics": dict(found.metrics),
    }
    return f"{json.dumps(report)}\n"
