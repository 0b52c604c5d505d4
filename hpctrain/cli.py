"""The command line: what was asked for, who does it, and the exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hpctrain.config.schema import Config
from hpctrain.errors import ConfigError, ExitCode, HpctrainError, LaunchError, UsageError
from hpctrain.launch.launchers import Claim, may_speak, this_process
from hpctrain.topology import Communicator, Topology
from hpctrain.version import __version__

if TYPE_CHECKING:
    from hpctrain.launch.failure import Guard

_HEAD_START_SECONDS = 2.0
_PROGRAM = "python -m hpctrain"

USAGE = """\
usage: python -m hpctrain CONFIG [--np N] [SECTION.KEY=VALUE ...]
       python -m hpctrain check CONFIG [SECTION.KEY=VALUE ...] [--json]
       python -m hpctrain status RUN [--json | --exit-code] [--max-tries N]
       python -m hpctrain job CONFIG [SECTION.KEY=VALUE ...] --nodes N --time H:MM:SS OPTIONS
       python -m hpctrain data TOOL ...
       python -m hpctrain ckpt ls|verify|diff|export RUN [...]
"""

HELP = f"""\
{USAGE}
Train as the TOML file CONFIG says. Start it under the launcher of the cluster:

  mpirun -np 16 python -m hpctrain configs/run.toml
  srun python -m hpctrain configs/run.toml training.max_epochs=20 optimizer.lr=2e-3

Overrides are TOML values for single keys. Started again, a run continues from its newest
checkpoint. Alone, without a launcher, it is one process.

commands:
  check CONFIG      under the launcher, before a long job: try network, devices, model, data and
                    run folder, train nothing, say what is wrong and how to fix it; 0 or 69
  status RUN        how the run in this folder ended or where it stands. --json: for programs.
                    --exit-code: for job scripts, after the launcher has ended: 0 complete,
                    75 submit again, 1 neither (the file STOP is there, no step was gained
                    in the last job, or it was the N-th), else that of the failure
  job CONFIG        print a job script, and refuse what cannot run
                    --scheduler slurm|lsf|pbs, or --site perlmutter|frontier|summit|polaris|
                    aurora|lumi|juwels|della
                    --nodes N  --time H:MM:SS  --account NAME  --queue NAME
                    --ranks-per-node N  --cpus-per-rank N  --gpus-per-node N (0: none)
                    --environment FILE (.sif or .tar.gz)  --chain N: jobs one after another
                    --output FILE  --submit: submit it, and print the ids of the jobs
  data pack SOURCE... FOLDER
                    pack arrays, pictures, text or other HDF5 to shards; under mpirun on all ranks
  data pack digits FOLDER
                    pack scikit-learn's handwritten digits
  data TOOL ...     info, index, verify, stats, split, repack, bench; each knows --help
  ckpt ls RUN       the checkpoints of a run: step, size, metrics
  ckpt verify RUN   compare every byte of them, or of one checkpoint, with its checksums
  ckpt diff RUN [OTHER]
                    in what two checkpoints differ: config, tensors, numbers
  ckpt export RUN FILE [--average]
                    the weights as one safetensors file

options:
  --np N            start N processes on this node, under the mpirun of the bound MPI library
  -h, --help        show this message
  --version         show the version

exit codes:
  0 complete   75 stopped early and saved: submit again
  64 usage   65 data   69 launch   70 bug or diverged training   74 checkpoint I/O   78 config
"""


class _Parser(argparse.ArgumentParser):
    """argparse in our voice: mistakes are UsageErrors, and options are never guessed."""

    def __init__(self, **options: Any) -> None:
        ours = {"prog": _PROGRAM, "add_help": False, "allow_abbrev": False}
        super().__init__(**{**ours, **options})

    def error(self, message: str) -> NoReturn:
        raise _usage_error(message, USAGE if self.prog == _PROGRAM else self.format_usage())


def _usage_error(message: str, usage: str = USAGE) -> UsageError:
    # Every rank was given the same words.
    return UsageError(f"{message}\n{usage}", everywhere=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    claim = None
    # Before the ranks have met, the one that its launcher calls rank 0 speaks for all.
    speaks = may_speak(os.environ)
    try:
        claim = claim_for(arguments)
        speaks = claim.rank in (None, 0)
        return dispatch(arguments, claim)
    except HpctrainError as error:
        if not error.told:
            # What only this rank knows it has to say itself.
            if speaks or not error.everywhere:
                tell(error)
            else:
                # A launcher ends the job once the first rank leaves: rank 0 is to be heard before.
                time.sleep(_HEAD_START_SECONDS)
                if claim is None or not claim.needs_mpi:
                    point_to_rank_zero()
        return error.exit_code


def tell(error: HpctrainError) -> None:
    """Print a failure."""
    print(f"hpctrain: error: {error}", file=sys.stderr, flush=True)  # noqa: T201


def point_to_rank_zero() -> None:
    """Say where the reason is told, to who reads the output of this process alone."""
    here = " ".join(
        f"{key}={os.environ.get(key, '(not set)')}"
        for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )
    sys.stderr.write(
        "hpctrain: this process cannot start either: rank 0 tells why. If it does not, what is "
        f"wrong is here: {here}\n"
    )
    sys.stderr.flush()


@contextmanager
def telling(is_rank_zero: bool) -> Iterator[None]:
    """Have rank 0 tell a failure that all ranks share, before any of them leaves."""
    try:
        yield
    except HpctrainError as error:
        if error.everywhere:
            if is_rank_zero:
                tell(error)
            error.told = True
        raise


def claim_for(arguments: Sequence[str]) -> Claim:
    """Return who this process is for a command line.

    Raises:
        LaunchError: if the launch is broken, and training is what was asked for.
    """
    try:
        return this_process()
    except LaunchError:
        if _is_collective(arguments):
            raise
        # Work for one process; it only matters which one it is.
        return Claim(launcher=None, rank=0 if may_speak(os.environ) else 1, world_size=None)


def _is_collective(arguments: Sequence[str]) -> bool:
    """Tell whether a command line is work for all ranks together."""
    from hpctrain.data.tools.declaring import COLLECTIVE

    if arguments[:1] == ["data"]:
        return not COLLECTIVE.isdisjoint(arguments[1:2])
    return bool(arguments) and arguments[0] not in (*COMMANDS, *OPTIONS)


def dispatch(arguments: list[str], claim: Claim) -> int:
    """Find the command among the arguments and run it.

    Raises:
        UsageError: if there is none, or its own arguments do not fit.
    """
    if not arguments:
        raise _usage_error("a config file or a command is needed")
    first, rest = arguments[0], arguments[1:]
    if first in OPTIONS:
        return say(claim, OPTIONS[first])
    if first == "data":
        return data(rest, claim)
    if first in COMMANDS:
        # These are work for one process, also where a launcher started several.
        return COMMANDS[first](rest) if claim.rank in (None, 0) else ExitCode.DONE
    if first == "check":
        return check(rest, claim)
    return run(arguments, claim)


def say(claim: Claim, text: str) -> int:
    """Print a text once, whatever the number of ranks."""
    if claim.rank in (None, 0):
        sys.stdout.write(text)
    return ExitCode.DONE


def run(arguments: list[str], claim: Claim) -> int:
    """Train. Collective: all ranks."""
    parser = _Parser()
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--np", type=int)
    # Overrides may stand before and after --np.
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.np is not None:
        start_here(parsed.np, [parsed.config, *parsed.overrides], claim)

    from hpctrain.batch.signals import SignalFlag
    from hpctrain.launch.world import gathering

    # Signals are caught before MPI starts: a stop that comes during start-up is not lost.
    with (
        SignalFlag() as signals,
        started(parsed.config, parsed.overrides, claim) as job,
        gathering(job.topology, job.communicator, job.config.launch, job.guard) as meeting,
    ):
        from hpctrain.training.job import train  # brings torch, which has to follow MPI_Init

        return train(
            job.config,
            job.topology,
            job.communicator,
            meeting=meeting,
            signals=signals,
            guard=job.guard,
            command=arguments,
        )


def check(arguments: list[str], claim: Claim) -> int:
    """Try everything that a run needs, and train nothing. Collective: all ranks."""
    parser = _Parser()
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse_intermixed_args(arguments)

    from hpctrain.observe.streams import reserved_stdout
    from hpctrain.preflight.report import start_failed_json

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
                print(start_failed_json(parsed.config, error), file=out, flush=True)
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
    from hpctrain.launch.world import control_plane

    # One rank reads the file; the others hear from it what is in it.
    config = load_config(path, overrides) if claim.rank in (None, 0) else None
    if claim.launcher is None and isinstance(config, ConfigError):
        raise config
    with (
        control_plane(claim) as (topology, communicator),
        telling(topology.is_rank_zero),
        guard(topology) as keeper,
    ):
        config = communicator.broadcast(config)
        if isinstance(config, ConfigError):
            raise config
        assert config is not None
        yield Job(config=config, topology=topology, communicator=communicator, guard=keeper)


def start_here(num_processes: int, arguments: Sequence[str], claim: Claim) -> NoReturn:
    """Become an mpirun that runs the same command on this node.

    Raises:
        UsageError: under a launcher, or for no processes.
        LaunchError: if there is no MPI to do it with.
    """
    if num_processes < 1:
        raise _usage_error(f"--np {num_processes}: at least one process is needed")
    if claim.launcher is not None:
        raise _usage_error(
            f"--np {num_processes} starts an mpirun of its own, but {claim.launcher.label} has "
            "started this process already: leave out one of the two"
        )
    from hpctrain.launch.starting import start

    start(num_processes, [sys.executable, "-m", "hpctrain", *arguments])


def load_config(path: str, overrides: Sequence[str]) -> Config | ConfigError:
    """Return the config, or what is wrong with it, as all ranks are about to hear it."""
    from hpctrain.config import load

    try:
        return load(path, overrides)
    except ConfigError as error:
        error.everywhere = True
        return error


def status(arguments: list[str]) -> int:
    """Tell how a run ended, or where it stands."""
    parser = _Parser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--exit-code", action="store_true")
    parser.add_argument("--max-tries", type=int)
    parsed = parser.parse_args(arguments)

    from hpctrain.batch.status import read_status, to_json, to_text

    # A person may ask from any job, a script asks about its own.
    environ = os.environ if parsed.exit_code else {}
    found = read_status(parsed.run, environ, parsed.max_tries)
    sys.stdout.write(to_json(found) if parsed.json else to_text(parsed.run, found))
    return found.exit_code if parsed.exit_code else ExitCode.DONE


def job(arguments: list[str]) -> int:
    """Print or submit a job script."""
    from hpctrain.batch import script

    parser = _Parser()
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--scheduler", choices=script.SCHEDULERS)
    for option in ("site", "account", "queue", "environment"):
        parser.add_argument(f"--{option}")
    parser.add_argument("--time", required=True)
    parser.add_argument("--nodes", required=True, type=_count)
    for option in ("ranks-per-node", "cpus-per-rank", "chain"):
        parser.add_argument(f"--{option}", type=_count)
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--submit", action="store_true")
    parsed = parser.parse_intermixed_args(arguments)

    from hpctrain.batch.outcome import read_outcome
    from hpctrain.batch.submit import submit
    from hpctrain.config import load
    from hpctrain.data.partition import default_lanes

    config = load(parsed.config, parsed.overrides)
    wanted = script.plan(config, vars(parsed))
    before = read_outcome(Path(wanted.run_folder))
    script.check(
        wanted,
        lanes=config.data.lanes or default_lanes(config.data.global_batch_size),
        save_seconds=0.0 if before is None else before.save_seconds,
    )
    text = script.render(wanted)
    if parsed.output is None and not parsed.submit:
        sys.stdout.write(text)
        return ExitCode.DONE
    path = Path(wanted.script)
    script.write(path, text)
    if parsed.submit:
        sys.stdout.writelines(f"{item}\n" for item in submit(path, wanted.scheduler, wanted.chain))
    return ExitCode.DONE


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def data(arguments: list[str], claim: Claim) -> int:
    """Work on datasets: collective for the tools that share the work, else on rank 0 alone."""
    from hpctrain.data.tools.declaring import COLLECTIVE, declare

    asks_help = not {"-h", "--help"}.isdisjoint(arguments)
    is_collective = bool(COLLECTIVE.intersection(arguments[:1])) and not asks_help
    if claim.rank not in (None, 0) and not is_collective:
        return ExitCode.DONE
    parser = _Parser(prog=f"{_PROGRAM} data", add_help=True)
    tools = declare(parser)
    try:
        if arguments[:1] and arguments[0] in tools:
            # Options may stand between the names of files.
            parsed = tools[arguments[0]].parse_intermixed_args(arguments[1:])
        else:
            parsed = parser.parse_args(arguments)
    except SystemExit:  # argparse has told its help
        return ExitCode.DONE

    from hpctrain.observe.tool_progress import ToolProgress

    with closing(ToolProgress.of_job(f"{arguments[0]}:")) as progress:
        if is_collective:
            text = _data_on_all_ranks(parsed, claim, progress)
        else:
            from hpctrain.launch.single import SingleCommunicator

            text = parsed.work(parsed, SingleCommunicator(), progress)
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


def ckpt(arguments: list[str]) -> int:
    """Look at checkpoints; RUN is the folder of a run or of one of its checkpoints."""
    parser = _Parser()
    parser.add_argument("tool", choices=["ls", "verify", "diff", "export"])
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--average", action="store_true")
    parsed = parser.parse_args(arguments)
    tool, other = parsed.tool, parsed.other
    if (other is None) != (tool in ("ls", "verify")) and tool != "diff":
        parser.error("ckpt export needs a FILE" if other is None else f"ckpt {tool} takes one RUN")
    if parsed.average and tool != "export":
        parser.error("--average belongs to ckpt export")

    from hpctrain.checkpoint import tools

    if tool == "ls":
        text = tools.listed(parsed.run)
    elif tool == "verify":
        text = tools.verified(parsed.run)
    elif tool == "diff":
        text = tools.compared(parsed.run, other)
    else:
        text = tools.export(parsed.run, other, average=parsed.average)
    sys.stdout.write(text + "\n")
    return ExitCode.DONE


OPTIONS = {"-h": HELP, "--help": HELP, "--version": f"hpctrain {__version__}\n"}
COMMANDS: dict[str, Callable[[list[str]], int]] = {"status": status, "job": job, "ckpt": ckpt}
