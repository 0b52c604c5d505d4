"""What brings Python to the ranks of a job: modules, conda, a venv, a packed one, or an image."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.batch.quoting import bind, path_word, require_line
from hpctrain.config.schema import Config
from hpctrain.errors import UsageError

KINDS = ("environment", "conda", "venv", "container", "image")
_PACKED = (".tar", ".tar.gz", ".tgz")
_IMAGE = ".sif"
_GLOB = re.compile(r"[*?\[]")
_PASSED_ON = ("HPCTRAIN_*", "SLURM_*", "PMI_*", "PMIX_*", "NCCL_*", "OMP_*", "HDF5_*", "FI_*")
"""Variables that Podman, which hands on none by itself, is told to: those of job and launcher."""


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
