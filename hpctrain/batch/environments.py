"""What a job runs: Python from modules, conda, a venv or an image; a snapshot of the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.batch.quoting import bind, path_word, require_line
from hpctrain.config.importing import MARKER
from hpctrain.config.schema import Config
from hpctrain.errors import UsageError
from hpctrain.utils.files import temporary_name
from hpctrain.utils.json_files import SMALL, parse_json, read_whole
from hpctrain.utils.text import first_lines, size

KINDS = ("environment", "conda", "venv", "container", "image")
_PACKED = (".tar", ".tar.gz", ".tgz")
_IMAGE = ".sif"
_GLOB = re.compile(r"[*?\[]")
_PASSED_ON = ("HPCTRAIN_*", "SLURM_*", "PMI_*", "PMIX_*", "NCCL_*", "OMP_*", "HDF5_*", "FI_*")
"""Variables that Podman, which hands on none by itself, is told to: those of job and launcher.

Its `--mpi` alone hands on SLURM_*, PALS_* and PMI_*, its `--gpu` NVIDIA_VISIBLE_DEVICES; patterns
are Podman's own. Source: github.com/NERSC/podman-hpc, etc/modules.d/mpich.yaml and gpu.yaml (read
2026-11-29); not seen on a cluster.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One of them; nothing: `.venv` of the directory that the job is submitted from, if any.

    Attributes:
        packed: an archive that each node unpacks.
        container: what runs `image`.
        binds: folders that the image sees, the outer and the inner path.
    """

    packed: str | None = None
    conda: str | None = None
    venv: str | None = None
    container: str | None = None
    image: str | None = None
    binds: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would be more than a word in a script.

        Raises:
            UsageError: naming the first.
        """
        for key in ("packed", "conda", "venv", "image"):
            if (text := getattr(self, key)) is not None:
                require_line(text, f"--{'environment' if key == 'packed' else key}")
        for ends in self.binds:
            bind(":".join(ends), "--bind")

    def words(self, *, gpus: str, modules: str, variables: Iterable[str]) -> str:
        """Return what stands before `python` to have it run in the image, as words of bash.

        Args:
            gpus: option of Apptainer that brings the GPUs in; empty: the job has none.
            modules: of Shifter.
            variables: names that the job sets itself.
        """
        image = shlex.quote(path_word(self.image or ""))
        pairs = [shlex.quote(":".join(ends)) for ends in self.binds]
        if self.container == "apptainer":
            options = [gpus, *(f"--bind {pair}" for pair in pairs)]
            words = ["apptainer exec", *filter(None, options), image]
        elif self.container == "pyxis":
            # Quoted in any case: unquoted, commas in an array look like a slip.
            mounts = shlex.quote(",".join(":".join(ends) for ends in self.binds) + " ")[:-2] + "'"
            image = shlex.quote(self.image or "")
            words = [f"--container-image={image}", f"--container-mounts={mounts}"]
            words.append('--container-workdir="$PWD"')
        elif self.container == "podman-hpc":
            names = dict.fromkeys((*_PASSED_ON, *variables))
            words = ["podman-hpc run --rm --mpi", *(["--gpu"] if gpus else [])]
            words += [f"--env {shlex.quote(name)}" for name in names]
            words += [f"--volume {pair}" for pair in pairs]
            words += ['--workdir "$PWD"', shlex.quote(self.image or "")]
        else:
            words = [f"shifter --image={shlex.quote(self.image or '')}"]
            words += [f"--module='{modules}'"] if modules and gpus else []
            words += [f"--volume={pair}" for pair in pairs]
        return " ".join(words)


def environment(
    config: Config, config_path: str, scheduler: str, wishes: Mapping[str, Any]
) -> Environment:
    """Return the environment that is asked for.

    Args:
        config: of the run; an image is to see the folders in it.
        config_path: of its file.
        scheduler: of the job.
        wishes: by option.

    Raises:
        UsageError: if it is not there, or more than one is asked for.
    """
    packed, container, image = (wishes[key] for key in ("environment", "container", "image"))
    if packed is not None and packed.endswith(_IMAGE):
        if container not in (None, "apptainer") or image is not None:
            raise UsageError(f"--environment {packed}: an image is named by --image, or here")
        _require_file(packed)
        packed, container, image = None, "apptainer", packed
    asked = {"--environment": packed, "--conda": wishes["conda"], "--venv": wishes["venv"]}
    asked |= {"--container": container}
    given = [option for option, value in asked.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: Python comes from one of them")
    if (container is None) != (image is None):
        raise UsageError(
            "--container apptainer|pyxis|podman-hpc|shifter and --image IMAGE go together"
        )
    if container is None and wishes["binds"]:
        raise UsageError("--bind: only an image is shown folders: --container and --image")
    if container == "pyxis" and scheduler != "slurm":
        raise UsageError("--container pyxis: a part of Slurm; take another one")
    if packed is not None:
        if not packed.endswith(_PACKED):
            raise UsageError(
                f"--environment {packed}: neither an image nor a packed environment by its name "
                f"({', '.join((_IMAGE, *_PACKED))})"
            )
        _require_file(packed)
    venv = wishes["venv"]
    if venv is not None and not Path(venv, "bin", "activate").is_file():
        raise UsageError(f"--venv {venv}: no virtual environment: there is no bin/activate in it")
    binds: tuple[tuple[str, str], ...] = ()
    if container is not None:
        own = [bind(text, "--bind") for text in wishes["binds"]]
        folders = [str(path) for path in _outermost(_folders(config, config_path))]
        inside = {inner for _, inner in own}
        binds = (*((path, path) for path in folders if path not in inside), *own)
        if container == "apptainer" and image.startswith(("/", ".")):
            _require_file(image)
    return Environment(
        packed=packed,
        conda=wishes["conda"],
        venv=venv,
        container=container,
        image=image,
        binds=binds,
    )


def _require_file(path: str) -> None:
    if not Path(path).is_file():
        raise UsageError(f"--environment {path}: no such file")


def _folders(config: Config, config_path: str) -> Iterator[Path]:
    """Yield the folders that a job of a config reads and writes, and where links lead to."""
    data = config.data
    named = [data.train, data.validation, data.test, data.weights, *data.evaluations.values()]
    named += [part for table in data.fields.values() for part in (table.train, table.validation)]
    named += [config.checkpoint.resume, config.checkpoint.initialize_from]
    here = Path.cwd()
    runs = Path(config.run.directory)
    for path in (here, runs if runs.exists() else runs.parent, Path(config_path).parent):
        yield from (path.absolute(), path.resolve())
    for text in filter(None, named):
        # Of a pattern what stands before its first sign; an import path names no folder.
        path = Path(_GLOB.split(text)[0])
        path = path if path.is_dir() else path.parent
        if path.is_dir() and ":" not in text:
            yield from (path.absolute(), path.resolve())


def _outermost(paths: Iterable[Path]) -> list[Path]:
    """Return the folders that are in none of the others."""
    whole = sorted(set(paths))
    return [path for path in whole if not any(other in path.parents for other in whole)]


_FOLDER = "code"
MOST_BYTES = 200 * 10**6

_DATA = {
    *(".h5", ".hdf5", ".he5", ".nc", ".npy", ".npz", ".zarr", ".parquet", ".tfrecord"),
    *(".pt", ".pth", ".ckpt", ".safetensors", ".sif", ".tar", ".gz", ".zip", ".mp4"),
}
"""Suffixes of what no module is: it stays where it is, and paths in the config lead to it."""
_NO_CODE = {"__pycache__", "node_modules", "site-packages"}


def take_snapshot(run_folder: Path, runs: Path) -> Path:
    """Copy the project that the current directory belongs to.

    In a git repository that is what git knows or would add; else the files below the current
    directory. Data, environments and runs are left out.

    Args:
        run_folder: the run's folder, in which the snapshot goes.
        runs: the folder of all runs.

    Returns:
        The root of the snapshot.

    Raises:
        UsageError: if it cannot be made, or is too large to be code.
    """
    here = Path.cwd().resolve()
    project = _git_root(here) or here
    apart = {run_folder.resolve(), runs.resolve()} - {project}
    files = {
        path: path.stat().st_size
        for path in (_of_git(project) if (project / ".git").exists() else _below(project))
        if path.is_file() and path.suffix not in _DATA and apart.isdisjoint(path.parents)
    }
    if (total := sum(files.values())) > MOST_BYTES:
        largest = sorted(files, key=lambda path: files[path], reverse=True)
        lines = [f"{path.relative_to(project)}: {size(files[path])}" for path in largest]
        raise UsageError(
            f"--snapshot: {project} has {size(total)} of files beside data, more than "
            f"{size(MOST_BYTES)} of code; name what is none in .gitignore:\n"
            + "\n".join(first_lines(lines, 5, indent="  "))
        )
    target = run_folder.resolve() / _FOLDER / time.strftime("%Y%m%d-%H%M%S")
    temporary = temporary_name(target)
    try:
        for path in files:
            copy = temporary / path.relative_to(project)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
        temporary.mkdir(parents=True, exist_ok=True)
        (temporary / MARKER).write_text(json.dumps({"project": str(project)}), encoding="utf-8")
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UsageError(f"--snapshot: cannot copy {project} to {target}: {error}") from error
    return target


def in_snapshot(path: Path, root: Path) -> Path:
    """Return where a file of the project is in a snapshot; the file itself if it is not there."""
    project = Path(parse_json(read_whole(root / MARKER, SMALL))["project"])
    whole = path.resolve()
    copied = root / whole.relative_to(project) if whole.is_relative_to(project) else whole
    return copied if copied.is_file() else path


def _git_root(here: Path) -> Path | None:
    return next((path for path in (here, *here.parents) if (path / ".git").exists()), None)


def _of_git(root: Path) -> Iterator[Path]:
    """Yield the files that git knows or would add, those of submodules too.

    Raises:
        UsageError: if git does not say.
    """
    command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"]
    try:
        result = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode(errors="replace").strip()
        raise UsageError(f"--snapshot: git does not list {root}: {said or error}") from error
    for name in dict.fromkeys(result.stdout.decode(errors="surrogateescape").split("\0")):
        path = root / name
        if name and path.is_dir() and (path / ".git").exists():
            yield from _of_git(path)
        elif name:
            yield path


def _below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that may be code."""
    for place, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if name not in _NO_CODE
            and not name.startswith(".")
            and not (Path(place) / name / "pyvenv.cfg").exists()
        ]
        yield from (Path(place) / name for name in files if not name.startswith("."))
