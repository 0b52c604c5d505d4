"""What the command line takes: help, arguments, and what is said of those that do not fit."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from hpctrain.errors import ExitCode, UsageError
from hpctrain.launch.environment import Claim
from hpctrain.utils.streams import write_out

PROGRAM = "python -m hpctrain"

USAGE = """\
usage: python -m hpctrain CONFIG [--np N] [SECTION.KEY=VALUE ...]
       python -m hpctrain check CONFIG [SECTION.KEY=VALUE ...] [--json]
       python -m hpctrain evaluate|test|predict CONFIG [SECTION.KEY=VALUE ...] [OPTIONS]
       python -m hpctrain status RUN [--json | --exit-code] [--max-tries N]
       python -m hpctrain job CONFIG [SECTION.KEY=VALUE ...] --nodes N --time H:MM:SS OPTIONS
       python -m hpctrain data TOOL ...
       python -m hpctrain ckpt ls|verify|diff|export RUN [...]
       python -m hpctrain bundle RUN [FILE ...] [--output FILE]
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
                    --scheduler slurm|lsf|pbs, or --site perlmutter|frontier|summit|polaris|
                    aurora|lumi|juwels|della
                    --nodes N  --time H:MM:SS  --account NAME  --queue NAME
                    --ranks-per-node N  --cpus-per-rank N  --gpus-per-node N (0: none)
                    --environment FILE (.sif or .tar.gz)  --chain N: jobs one after another
                    --output FILE  --submit: submit it, and print the ids of the jobs
                    --snapshot: run from a copy of the code as it is now
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
                    FILE.ckpt: as Lightning's load_from_checkpoint reads them
  bundle RUN [FILE ...]
                    pack what tells how the run went for a support desk, below 5 MB, and list it:
                    config, job records, ends, stacks, the last of the log; no data, no weights,
                    no secrets that can be told by their look. FILE: more, such as a job's log

options:
  --np N            start N processes on this node, under the mpirun of the bound MPI library
  --code DIRECTORY  take your modules from a snapshot that `job --snapshot` has made
  -h, --help        show this message
  --version         show the version

exit codes:
  0 complete   75 stopped early and saved: submit again
  64 usage   65 data   69 launch   70 bug or diverged training   74 checkpoint I/O   78 config
"""


class Parser(argparse.ArgumentParser):
    """argparse in our voice: mistakes are UsageErrors, and options are never guessed."""

    def __init__(self, **options: Any) -> None:
        ours = {"prog": PROGRAM, "add_help": False, "allow_abbrev": False}
        super().__init__(**{**ours, **options})

    def error(self, message: str) -> NoReturn:
        raise usage_error(message, USAGE if self.prog == PROGRAM else self.format_usage())


def usage_error(message: str, usage: str = USAGE) -> UsageError:
    """Return the failure of a command line that does not fit."""
    # Every rank was given the same words.
    return UsageError(f"{message}\n{usage}", everywhere=True)


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


def say(claim: Claim, text: str) -> int:
    """Print a text once, whatever the number of ranks."""
    if claim.rank in (None, 0):
        write_out(text)
    return ExitCode.DONE
