"""What the command line takes: help, arguments, and what is said of those that do not fit."""

from __future__ import annotations

import argparse
import math
import re
from typing import Any, NoReturn

from hpctrain.errors import ExitCode, UsageError
from hpctrain.launch.environment import Claim
from hpctrain.utils.streams import write_out
from hpctrain.utils.text import did_you_mean

PROGRAM = "python -m hpctrain"

USAGES = {
    "": "CONFIG [--np N] [SECTION.KEY=VALUE ...]",
    "init": "init [FOLDER]",
    "config": "config CONFIG [SECTION.KEY=VALUE ...]",
    "run": "run [OPTIONS] SCRIPT [OPTIONS] [--] [ARGUMENTS ...]",
    "prepare": "prepare CONFIG|SCRIPT [SECTION.KEY=VALUE ... | ARGUMENTS ...]",
    "check": "check CONFIG [--np N] [SECTION.KEY=VALUE ...] [--json]",
    "evaluate": "evaluate CONFIG [SECTION.KEY=VALUE ...] [OPTIONS]",
    "test": "test CONFIG [SECTION.KEY=VALUE ...] [OPTIONS]",
    "predict": "predict CONFIG [SECTION.KEY=VALUE ...] --output FOLDER|FILE.nc [OPTIONS]",
    "status": "status RUN [--json | --exit-code] [--max-tries N]",
    "job": "job CONFIG [SECTION.KEY=VALUE ...] --nodes N --time H:MM:SS OPTIONS | --sites",
    "data": "data TOOL ...",
    "ckpt": "ckpt ls|verify|diff|export RUN [...]",
    "bundle": "bundle RUN [FILE ...] [--output FILE]",
    "watch": "watch RUN [RUN ...] [--serve [--port N | --unix-socket PATH]]",
    "report": "report RUN [RUN ...] [--output FILE.html] [--png FOLDER]",
    "runs": "runs [FOLDER] [--sort NAME] [--reverse] [--json]",
    "compare": "compare RUN RUN",
    "completion": "completion bash|zsh|fish",
}
"""What each command takes; "" is a run of a config."""

_LINES = "\n       ".join(f"{PROGRAM} {usage}" for usage in USAGES.values())

HELP = f"""\
usage: {_LINES}

Train as the TOML file CONFIG says. Start it under the launcher of the cluster:

  mpirun -np 16 python -m hpctrain configs/run.toml
  srun python -m hpctrain configs/run.toml training.max_epochs=20 optimizer.lr=2e-3

Overrides are TOML values for single keys. Started again, a run continues from its newest
checkpoint. Alone, without a launcher, it is one process.

commands:
  init [FOLDER]     write a config, a model and a job script to start from; overwrite nothing
  config CONFIG     print the resolved config as TOML that loads again: every default, and where
                    each value comes from
  run SCRIPT        run your own program: its hpctrain.connect() or hpctrain.lightning.Trainer
                    finds all processes, and the end of one ends all. Options as below, before or
                    after SCRIPT; what follows -- is the script's. -m MODULE in place of SCRIPT.
                    Under mpirun or srun it runs in each of the ranks that are there already
  prepare CONFIG|SCRIPT
                    fetch the data, on a node with internet: prepare_data of the model and its
                    data, in one process, without MPI or GPU
  check CONFIG      under the launcher, before a long job: try network, devices, model, data and
                    run folder, train nothing, say what is wrong and how to fix it; 0 or 69
  evaluate CONFIG   the metrics of a trained model, of data.validation; test: of data.test
                    --checkpoint best|last|PATH (a checkpoint, a run, or a file of weights)
                    --split validation|test|train  --json
  predict CONFIG --output FOLDER|FILE.nc
                    its predictions for every sample of data.test, as a dataset in the order of
                    the samples, or as netCDF-4 on the coordinates of the source; goes on where a
                    job before was killed. --checkpoint, --split
  status RUN        how the run in this folder ended or where it stands. --json: for programs.
                    --exit-code: for job scripts, after the launcher has ended: 0 complete,
                    75 submit again, 1 neither (the file STOP is there, no step was gained
                    in the last job, or it was the N-th), else that of the failure
  job CONFIG        print a job script, and refuse what cannot run
                    --scheduler slurm|lsf|pbs|flux, --site NAME or --site-file FILE; --sites
                    lists those that are known, --lint-site FILE says what a file lacks
                    --nodes N  --time H:MM:SS  --account NAME  --queue NAME  --qos NAME
                    --ranks-per-node N  --cpus-per-rank N  --gpus-per-node N (0: none)
                    --memory 64G  --constraint WHAT  --mail ADDRESS  --directive=OPTION
                    --module NAME  --setup LINE  --env NAME=VALUE; these four again and again
                    --environment FILE (.sif or .tar.gz), --conda NAME, --venv FOLDER, or
                    --container apptainer|pyxis|podman-hpc|shifter --image X --bind A:B
                    --chain N: jobs one after another  --max-jobs N  --max-node-hours H
                    --output FILE  --submit: submit it, and print the ids of the jobs
                    --snapshot: run from a copy of the code as it is now
                    --sweep KEY=VALUE,VALUE again and again, --sweep-file FILE: a job array over all
                    combinations, each a run of its own; again: what is incomplete. --throttle N
                    at once; --pack N side by side in a job
  data pack SOURCE... FOLDER
                    pack arrays, images, text or other HDF5 to shards; under mpirun on all ranks
  data pack digits FOLDER
                    pack scikit-learn's handwritten digits
  data TOOL ...     info, index, verify, stats, split, repack, bench; each knows --help
  ckpt ls RUN       the checkpoints of a run: step, size, metrics, which is the best
  ckpt verify RUN   compare every byte of them, or of one checkpoint, with its checksums
  ckpt diff RUN [OTHER]
                    in what two checkpoints differ: config, tensors, numbers
  ckpt export RUN FILE [--average] [--best]
                    the weights as one safetensors file: of the newest checkpoint, or the best;
                    FILE.ckpt: as Lightning's load_from_checkpoint reads them; FILE.pt2: a program
                    of torch.export, which needs neither its source nor hpctrain
  watch RUN [RUN ...]
                    runs in this terminal: state, progress, curves, nodes, log; once into a pipe
  watch RUN [RUN ...] --serve
                    a live page of the runs for your browser: curves, jobs, time, config, log. On
                    loopback, for you alone; it prints how to reach it from your own machine.
                    --port N  --unix-socket PATH
  report RUN [RUN ...]
                    the same page as one file, report.html or that of --output, with the data in it;
                    --png FOLDER: its curves as images, by matplotlib
  runs [FOLDER]     the runs of a folder, runs/ where none is named: state, step, newest and best
                    metric, age, job, host, size. --json: for programs. --sort NAME: a metric, best
                    first, a key of a sweep, or a column; --reverse
  compare RUN RUN   two runs side by side: config, records of their jobs, seconds, curves
  bundle RUN [FILE ...]
                    pack what shows how the run went for a support desk, below 5 MB, and list it:
                    config, job records, ends, stacks, the last of the log; no data, no weights,
                    no secrets that can be known by their look. FILE: more, such as a job's log

  completion bash|zsh|fish
                    print what completes `hpctrain` in a shell

options of a run, of check and of run SCRIPT:
  --np N            start N processes on this node, under the mpirun of the bound MPI library
  --devices N|auto|0,1
                    the same, for each node: as many processes, one for every GPU, or for those
  --num-nodes N --node-rank R --main-address A [--main-port P]
                    one such command on each of N nodes that have no launcher; for a script also
                    from WORLD_SIZE (which counts nodes only here), NODE_RANK, MASTER_ADDR and
                    MASTER_PORT
  --accelerator cpu|gpu|auto  --precision 32|16|bf16|64|bf16-true|...  --strategy ddp|fsdp|...
                    keys of the config; for a script, where it says nothing itself

options:
  --code DIRECTORY  take your modules from a snapshot that `job --snapshot` has made
  -h, --help        show this message; COMMAND --help: that of a command, with examples
  --version         show the version; --version --all: of Python, torch, MPI, HDF5, CUDA and others

exit codes:
  0 complete   75 stopped early and saved: submit again
  64 usage   65 data   69 launch   70 bug or diverged training   74 checkpoint I/O   78 config
"""


EXAMPLES: dict[str, tuple[str, ...]] = {
    "init": ("init", "init my_project"),
    "config": ("config run.toml", "config run.toml optimizer.lr=2e-3 >resolved.toml"),
    "run": (
        "run train.py --np 4",
        "run train.py --devices 4 --precision bf16 -- --my-own-option 3",
        "run -m my_package.train --devices auto",
    ),
    "prepare": ("prepare run.toml", "prepare train.py --epochs 3"),
    "check": ("check run.toml --np 4", "check run.toml --json"),
    "evaluate": ("evaluate run.toml", "evaluate run.toml --checkpoint best --split test --json"),
    "test": ("test run.toml --checkpoint best",),
    "predict": ("predict run.toml --output predictions", "predict run.toml --output out.nc"),
    "status": ("status runs/digits", "status runs/digits --json"),
    "job": (
        "job run.toml --site perlmutter --nodes 4 --time 2:00:00 --account me --output job.sh",
        "job run.toml --scheduler slurm --nodes 1 --time 1:00:00 --sweep run.seed=1,2,3 --submit",
        "job --sites",
    ),
    "data": (
        "data pack digits data/digits",
        "data pack images/ data/images",
        "data info data/digits/train",
    ),
    "ckpt": ("ckpt ls runs/digits", "ckpt export runs/digits model.safetensors --best"),
    "bundle": ("bundle runs/digits digits-4711.log",),
    "watch": ("watch runs/digits --serve", "watch runs/digits runs/other --serve --port 8080"),
    "report": ("report runs/digits", "report runs/one runs/two --output both.html"),
    "runs": ("runs", "runs runs/digits --sort accuracy", "runs --json"),
    "compare": ("compare runs/one runs/two",),
    "completion": ("completion bash >~/.local/share/bash-completion/completions/hpctrain",),
}
"""Command lines as people write them, by command."""

_TAKE_OPTIONS_OF_A_RUN = ("check", "run")


def help_of(command: str) -> str:
    """Return the help of one command: its part of the whole, and examples."""
    return f"{usage_of(command)}\n\n{_about(command)}\nexamples:\n{examples_of(command)}"


def examples_of(command: str) -> str:
    """Return command lines as people write them, each on a line."""
    return "".join(f"  {PROGRAM} {line}\n" for line in EXAMPLES[command])


def options_of(command: str) -> list[str]:
    """Return the options that the help of a command names; "": those of a run."""
    about = _about(command) if command else HELP[HELP.index("\noptions of a run,") :]
    text = f"{USAGES[command]} {about}"
    return sorted({*re.findall(r"(?<![\w-])--[a-z][a-z-]+", text), "--help"})


def _about(command: str) -> str:
    """Return the lines of the whole help that are about one command."""
    lines = HELP[HELP.index("\ncommands:") : HELP.index("\noptions of a run")].splitlines(True)
    found = []
    is_about = False
    for line in lines:
        if line[2:3] != " " and line.startswith("  "):
            # What `test` takes is described with `evaluate`.
            is_about = line.split()[0] == command or f"; {command}:" in line
        if is_about:
            found.append(line)
    if command in _TAKE_OPTIONS_OF_A_RUN:
        begin = HELP.index("\noptions of a run,")
        found.append(HELP[begin : HELP.index("\n\n", begin) + 1])
    return "".join(found)


class Parser(argparse.ArgumentParser):
    """argparse in our voice: mistakes are UsageErrors, and options are never guessed."""

    def __init__(self, command: str | None = None, **options: Any) -> None:
        """Take nothing yet.

        Args:
            command: one of USAGES; None: a tool that prints its own usage.
            options: of argparse.
        """
        ours = {"prog": PROGRAM, "add_help": False, "allow_abbrev": False}
        super().__init__(**{**ours, **options})
        self._command = command

    def take_config(self, *, may_lack: bool = False) -> None:
        """Take a config as `config`, and what overrides it as `overrides`.

        Args:
            may_lack: whether the command has something to do without one.
        """
        count: dict[str, Any] = {"nargs": "?"} if may_lack else {}
        self.add_argument("config", metavar="CONFIG", **count)
        self.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")

    def error(self, message: str) -> NoReturn:
        if message.startswith(_REQUIRED):
            # What may be given again and again may be left out; argparse takes it for missing.
            some = {_shown(action) for action in self._actions if action.nargs == "*"}
            names = message.removeprefix(_REQUIRED).split(", ")
            message = _REQUIRED + ", ".join(name for name in names if name not in some)
        message += self._meant(message)
        if self._command is None:
            raise usage_error(message, " ".join(self.format_usage().split()))
        raise usage_error(message, usage_of(self._command))

    def _meant(self, message: str) -> str:
        """Return what may have been meant by a word that is not known."""
        if chosen := _CHOICES.search(message):
            return did_you_mean(chosen[1], re.findall(r"[\w-]+", chosen[2]), quote="'")
        words = message.removeprefix(_UNKNOWN)
        if words == message or self._command is None:
            return ""
        option = words.split()[0].partition("=")[0]
        is_ours = f"--{option.lstrip('-')}" in self._option_string_actions
        takes_config = "config" in {action.dest for action in self._actions}
        if takes_config and option in _OF_LAUNCHERS and not is_ours:
            return "; options of mpirun and srun stand before python"
        near = did_you_mean(option, self._option_string_actions)
        if near or not takes_config:
            return near
        return "; keys of the config are set without dashes: SECTION.KEY=VALUE"


_UNKNOWN = "unrecognized arguments: "
_REQUIRED = "the following arguments are required: "
_OF_LAUNCHERS = frozenset(
    """
    -n -N -np --n -ppn --ppn -c --ntasks --ntasks-per-node --nodes --oversubscribe --map-by
    --rank-by --bind-to --cpu-bind --gpu-bind --gpus-per-task --gpus-per-node --cpus-per-task
    --host -host --hosts --hostfile -hostfile --machinefile -machinefile --mca -mca -x -env -genv
    --allow-run-as-root --report-bindings --mpi --use-hwthread-cpus --tag-output
    """.split()  # noqa: SIM905
)
"""Of mpirun, mpiexec and srun, which are given after the program by mistake."""
_CHOICES = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")


def _shown(action: argparse.Action) -> str:
    """Return how argparse calls an argument in what it says of it."""
    return action.metavar if isinstance(action.metavar, str) else action.dest


def usage_of(command: str) -> str:
    """Return the line that says what a command takes."""
    return f"usage: {PROGRAM} {USAGES[command]}"


def usage_error(message: str, usage: str = usage_of("")) -> UsageError:
    """Return the failure of a command line that does not fit: fact, usage, and where more is."""
    words = usage.removeprefix(f"usage: {PROGRAM} ").split()
    command = f" {words[0]}" if words and words[0] in USAGES else ""
    more = f"{PROGRAM}{command} --help has more, with examples"
    if not command:
        more = f"{PROGRAM} --help lists all commands and options"
    # Every rank was given the same words.
    return UsageError(f"{message}\n{usage}\n{more}", everywhere=True)


def number(text: str) -> int:
    """Return a number from 0 on; a type for arguments."""
    found = int(text)
    if found < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return found


def count(text: str) -> int:
    """Return a number from 1 on; a type for arguments."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def hours(text: str) -> float:
    """Return a number of hours above 0; a type for arguments."""
    found = float(text)
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return found


def say(claim: Claim, text: str) -> int:
    """Print a text once, whatever the number of ranks."""
    if claim.rank in (None, 0):
        write_out(text)
    return ExitCode.DONE
