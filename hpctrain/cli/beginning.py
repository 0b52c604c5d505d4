"""The first minute: `init`, `config`, `--version --all`, and completion in the shell."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib import metadata
from pathlib import Path

from hpctrain.cli.usage import PROGRAM, USAGES, Parser, options_of
from hpctrain.errors import ExitCode, LaunchError, UsageError
from hpctrain.utils.streams import write_out

_SUBMITS = {
    "slurm": ("sbatch", "sbatch"),
    "lsf": ("bsub", "bsub <"),
    "pbs": ("qsub", "qsub"),
    "flux": ("flux", "flux batch"),
}
"""By scheduler: the command that is there, and how it takes a script."""

_MODEL = '''\
"""The model that run.toml names: any torch module. Its arguments are the keys of [model]."""

from torch import Tensor, nn


class Net(nn.Module):
    """Two convolutions and a linear classifier, for images of (channels, height, width)."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.classifier = nn.Linear(8 * width, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image).flatten(1))
'''


def init(arguments: list[str]) -> int:
    """Write a config, a model and a job script to start from."""
    parser = Parser("init")
    parser.add_argument("folder", nargs="?", default=".", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    name = re.sub(r"[^A-Za-z0-9_-]", "-", folder.resolve().name).strip("-") or "run"
    scheduler = next((each for each, (c, _) in _SUBMITS.items() if shutil.which(c)), "slurm")
    files = {
        "run.toml": _config_text(name),
        "model.py": _MODEL,
        "job.sh": _script(name, scheduler),
    }
    if there := [file for file in files if (folder / file).exists()]:
        raise UsageError(
            f"{folder / there[0]} is there already, and nothing is overwritten: name another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            with (folder / file).open("x", encoding="utf-8") as opened:
                opened.write(text)
        (folder / "job.sh").chmod(0o755)
    except OSError as error:
        raise UsageError(f"cannot write {error.filename}: {error.strerror}") from error
    enter = [] if folder == Path() else [f"cd {shlex.quote(str(folder))}"]
    lines = [
        *enter,
        f"{PROGRAM} data pack digits data/digits   # or your own: docs/data.md",
        f"{PROGRAM} run.toml --np 2",
        f"{_SUBMITS[scheduler][1]} job.sh                               # edit its account first",
    ]
    write_out(f"{', '.join(files)} are in {folder}. Next:\n\n" + "".join(f"  {x}\n" for x in lines))
    return ExitCode.DONE


def example(name: str) -> Path:
    """Return an example config: of the installed package, or of the checkout that this is."""
    package = Path(__file__).parents[1]
    installed = package / "examples" / "configs" / name
    return installed if installed.exists() else package.parent / "configs" / name


def _config_text(name: str) -> str:
    """Return the documented example as a config of one's own.

    Raises:
        UsageError: if it is not there.
    """
    path = example("run.toml")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the example {path} cannot be read: {error.strerror}") from error
    for before, after in (
        ("# The example to copy from: a convolutional network", "# A run: a convolutional network"),
        ("configs/run.toml", "run.toml"),
        ('name = "digits"   ', f'name = "{name}"   '),
        ('use = "convnet"             # "convnet"', 'use = "model:Net"           # "convnet"'),
    ):
        assert before in text
        text = text.replace(before, after)
    return text


def _script(name: str, scheduler: str) -> str:
    from hpctrain.batch.job_script import Job, render

    return render(
        Job(
            command=("run.toml",),
            name=name,
            run_folder=f"runs/{name}",
            script="job.sh",
            scheduler=scheduler,
            nodes=1,
            seconds=3600,
            ranks_per_node=4,
            cpus_per_rank=8,
            gpus_per_node=4,
        )
    )


def config(arguments: list[str]) -> int:
    """Print a config as it is resolved, and where each value comes from."""
    parser = Parser("config")
    parser.take_config()
    parsed = parser.parse_intermixed_args(arguments)

    from hpctrain.config import load
    from hpctrain.config.toml import apply_overrides, read
    from hpctrain.config.writing import to_explained_toml

    resolved = load(parsed.config, parsed.overrides)
    source = read(parsed.config)
    apply_overrides(source, parsed.overrides)
    head = f"# {parsed.config}, resolved: line N is of that file"
    write_out(f"{head}\n{to_explained_toml(resolved, source)}")
    return ExitCode.DONE


def all_versions() -> str:
    """Return the versions of all that runs here. Loads MPI, and does not initialise it."""
    from hpctrain.launch.mpi import bound_library

    try:
        library: str | None = bound_library()[0]
        file = bound_library()[1]
    except (LaunchError, ImportError, RuntimeError, OSError) as error:
        library, file = None, str(error).splitlines()[0]
    import torch  # brings its own

    from hpctrain.preflight.rank_facts import versions

    found = versions(library, torch.version.cuda is not None or torch.version.hip is not None)
    found |= {"libmpi": file} if library else {"MPI": f"none: {file}"}
    found |= {"GPUs": str(torch.cuda.device_count())}
    for package in _OPTIONAL:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "-"
    return "".join(f"{name:<18} {version}\n" for name, version in found.items())


_OPTIONAL = ("hdf5plugin", "isal", "zarr", "netCDF4", "pyarrow", "lightning", "torchmetrics")
"""Packages of others that hpctrain uses where they are."""


_TOOLS = {
    "data": ("pack", "info", "index", "verify", "stats", "split", "repack", "bench"),
    "ckpt": ("ls", "verify", "diff", "export"),
    "completion": ("bash", "zsh", "fish"),
}
"""What a command takes as its first word, beside options and files."""

_BASH = """\
# Completes hpctrain in bash. Source it, or put it where bash-completion looks:
#   hpctrain completion bash >~/.local/share/bash-completion/completions/hpctrain
_hpctrain() {
  local word=${COMP_WORDS[COMP_CWORD]} command=${COMP_WORDS[1]-} words=
  if ((COMP_CWORD == 1)); then
    words="@COMMANDS@ @OPTIONS@"
  else
    case $command in
@CASES@
      *) words="@OPTIONS@" ;;
    esac
  fi
  COMPREPLY=()
  [[ -z $word && COMP_CWORD -gt 1 ]] || mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
  [[ $word == -* ]] || mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -f -- "$word")
}
complete -o filenames -F _hpctrain hpctrain
"""

_ZSH = """\
#compdef hpctrain
# Completes hpctrain in zsh. Put it as _hpctrain in a folder of $fpath.
_hpctrain() {
  local -a words
  if ((CURRENT == 2)); then
    words=(@COMMANDS@ @OPTIONS@)
  else
    case ${${(z)BUFFER}[2]} in
@CASES@
      *) words=(@OPTIONS@) ;;
    esac
  fi
  compadd -- $words
  _files
}
_hpctrain "$@"
"""


def completion(arguments: list[str]) -> int:
    """Print a script of completion."""
    parser = Parser("completion")
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])
    shell = parser.parse_args(arguments).shell
    write_out({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]())
    return ExitCode.DONE


def words_of(command: str) -> list[str]:
    """Return what may follow a command, beside files."""
    return [*_TOOLS.get(command, ()), *options_of(command)]


def _filled(template: str, case: str) -> str:
    commands = [command for command in USAGES if command]
    cases = "\n".join(
        case.replace("@NAME@", command).replace("@WORDS@", " ".join(words_of(command)))
        for command in commands
    )
    options = " ".join(options_of(""))
    text = template.replace("@COMMANDS@", " ".join(commands)).replace("@CASES@", cases)
    return text.replace("@OPTIONS@", options)


def _bash() -> str:
    return _filled(_BASH, '      @NAME@) words="@WORDS@" ;;')


def _zsh() -> str:
    return _filled(_ZSH, "      @NAME@) words=(@WORDS@) ;;")


def _fish() -> str:
    commands = [command for command in USAGES if command]
    lines = [
        "# Completes hpctrain in fish. Put it into ~/.config/fish/completions/hpctrain.fish.",
        f"complete -c hpctrain -n __fish_use_subcommand -a '{' '.join(commands)}'",
    ]
    for command in commands:
        seen = f"__fish_seen_subcommand_from {command}"
        for word in words_of(command):
            asked = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            lines.append(f"complete -c hpctrain -n '{seen}' {asked}")
    return "\n".join(lines) + "\n"
