"""The commands that use a trained model, on all ranks: evaluate, test, predict."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.cli.jobs import started
from hpctrain.cli.processes import declare_processes, take_processes
from hpctrain.cli.usage import PROGRAM, Parser, say
from hpctrain.errors import ExitCode
from hpctrain.launch.environment import Claim
from hpctrain.topology import raise_together
from hpctrain.utils.streams import reserved_stdout, write_out
from hpctrain.utils.text import metric, plural, printable

if TYPE_CHECKING:
    from hpctrain.training.inference.stage import Stage
    from hpctrain.training.inference.trained import Answer

SPLITS = ("validation", "test", "train")

_ABOUT = (
    "Of the run in the config: its best checkpoint where it keeps one (checkpoint.keep_best), else "
    "its last; or of another one, or a file of weights. Under any launcher, with any number of "
    "ranks: every sample counts once."
)


def evaluate(arguments: list[str], claim: Claim) -> int:
    """Print the metrics of a checkpoint on the samples of validation. Collective: all ranks."""
    return _metrics("evaluate", "validate", "validation", arguments, claim)


def test(arguments: list[str], claim: Claim) -> int:
    """Print the metrics of a checkpoint on the samples to test with. Collective: all ranks."""
    return _metrics("test", "test", "test", arguments, claim)


def predict(arguments: list[str], claim: Claim) -> int:
    """Write the predictions of a checkpoint for a split. Collective: all ranks."""
    parser = _parser("predict", "test")
    parser.add_argument("--output", type=Path, metavar="FOLDER|FILE.nc", required=True)
    if (parsed := _parsed("predict", parser, arguments, claim)) is None:
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
    parser = _parser(name, split)
    parser.add_argument("--json", action="store_true")
    if (parsed := _parsed(name, parser, arguments, claim)) is None:
        return ExitCode.DONE
    command = [parsed.config, *parsed.overrides]
    with reserved_stdout(parsed.json) as out:
        found = _answered(command, claim, stage, parsed.split, parsed.checkpoint)
        if claim.rank in (None, 0):
            show = _json if parsed.json else _text
            write_out(show(found, parsed.split), out)
    return ExitCode.DONE


def _parser(name: str, split: str) -> Parser:
    parser = Parser(name, prog=f"{PROGRAM} {name}", add_help=True, description=_ABOUT)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--checkpoint", metavar="best|last|PATH")
    parser.add_argument("--split", metavar="|".join((*SPLITS, "NAME")), default=split)
    declare_processes(parser)
    return parser


def _parsed(command: str, parser: Parser, arguments: list[str], claim: Claim) -> Namespace | None:
    """Return what a command is told; None: it is its help that was asked for."""
    if not {"-h", "--help"}.isdisjoint(arguments) and claim.rank not in (None, 0):
        return None
    try:
        parsed = parser.parse_intermixed_args(arguments)
    except SystemExit:  # argparse has told it
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
