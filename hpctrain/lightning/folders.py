"""Folder of a fit: a new `version_N`, or that of its batch job (requeue), and its `best.ckpt`.

As with Lightning a script that is started again begins anew, in `version_N`. A batch job that its
scheduler or its script starts again is the same job: it goes on where it stood. The fits of a
script are told apart by their number and the command, which version.json in each folder holds.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpctrain.checkpoint.export import best_of
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.utils.batch_job import batch_job, lineage
from hpctrain.utils.files import replace_file
from hpctrain.utils.json_files import read_checked
from hpctrain.utils.run_folder import CHECKPOINTS, folder_name, read_latest

NAME = "version.json"

_VERSION = re.compile(r"version_(\d{1,9})")
_UNFIT = re.compile(r"[^A-Za-z0-9._+=-]+")


@dataclass(frozen=True, slots=True)
class Fit:
    """A fit of a script, as version.json says it.

    Attributes:
        job: the chain of jobs, or the batch job, that it belongs to; None outside of any.
        start: which start of that job this is.
        number: of the fit in its process, from 1.
        command: of the process.
    """

    job: str | None
    start: int
    number: int
    command: tuple[str, ...]

    @classmethod
    def of_this_process(cls, number: int, env: Mapping[str, str]) -> Fit:
        """Return what this process does with its fit of that number."""
        token, attempt = lineage(env)
        if token is not None:
            return cls(f"chain {token}", attempt, number, tuple(sys.argv))
        job = batch_job(env)
        if job is None:
            return cls(None, 0, number, tuple(sys.argv))
        name = f"{job.scheduler} {job.cluster} {job.name}"
        return cls(name, job.restart, number, tuple(sys.argv))

    def goes_on_from(self, other: Fit) -> bool:
        """Tell whether this is a later start of the same fit."""
        return (
            self.job is not None
            and (self.job, self.number, self.command) == (other.job, other.number, other.command)
            and self.start > other.start
        )


def script_name() -> str:
    """Return the name of the runs of this script: that of its file."""
    name = _UNFIT.sub("-", Path(sys.argv[0] or "python").stem).strip("-._")
    return name[:100] or "python"


def choose_version(directory: Path, fit: Fit) -> str:
    """Return the name of the folder for a fit, which is there from now on. For rank 0.

    Raises:
        CheckpointError: if it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        versions = _versions(directory)
        for name in versions:
            if fit.goes_on_from(_read(directory / name)):
                _write(directory / name, fit)
                return name
        number = 1 + max((_number(name) for name in versions), default=-1)
        while True:  # another job may take a number at the same moment
            name = f"version_{number}"
            try:
                (directory / name).mkdir()
            except FileExistsError:
                number += 1
                continue
            _write(directory / name, fit)
            return name
    except OSError as error:
        raise CheckpointError(f"cannot make a folder in {directory}: {error}") from error


def newest_version(directory: Path) -> str:
    """Return the name of the newest version that is there.

    Raises:
        ConfigError: if there is none.
    """
    versions = _versions(directory) if directory.is_dir() else []
    if not versions:
        raise ConfigError(
            f'ckpt_path="last": no fit has left a checkpoint in {directory}; name a checkpoint, or '
            "leave ckpt_path out"
        )
    return versions[-1]


def _versions(directory: Path) -> list[str]:
    names = [item.name for item in directory.iterdir() if _VERSION.fullmatch(item.name)]
    return sorted(names, key=_number)


def _number(name: str) -> int:
    found = _VERSION.fullmatch(name)
    return -1 if found is None else int(found[1])


_UNKNOWN = Fit(None, 0, 0, ())


def _read(folder: Path) -> Fit:
    try:
        return read_checked(folder / NAME, Fit)
    except (OSError, ValueError):
        return _UNKNOWN  # somebody else's folder, or one that was just made


def _write(folder: Path, fit: Fit) -> None:
    replace_file(folder / NAME, (json.dumps(asdict(fit)) + "\n").encode())


BEST, LAST = "best.ckpt", "last.ckpt"


class Checkpoints:
    """Stands for the ModelCheckpoint that Lightning adds where none is given."""

    def __init__(self) -> None:
        self.monitor: str | None = None
        self.best_model_path = ""
        self.last_model_path = ""
        self.best_model_score: Any = None
        self.best_k_models: Mapping[str, Any] = {}
        self.dirpath: str | None = None


def export_for_scripts(run: Path, module: Any) -> tuple[str, float | None]:
    """Write the best weights of a run, or its last, as the file that a script loads afterwards.

    For rank 0.

    Returns:
        Its path, "" where the run has saved nothing, and the metric by which they are the best.

    Raises:
        CheckpointError: if the checkpoint is damaged, or the file cannot be written.
    """
    from hpctrain.checkpoint.lightning_file import export_lightning

    best = best_of(run)
    if best is None and read_latest(run) is None:
        return "", None
    source = run / CHECKPOINTS / folder_name(best.step) if best is not None else run
    target = run / (LAST if best is None else BEST)
    export_lightning(source, target, average=None, module=module)
    return str(target), None if best is None else best.value


def tell(objects: Iterable[Any], run: Path, path: str, score: float | None) -> None:
    """Let ModelCheckpoint objects know what a script asks them afterwards."""
    for each in objects:
        each.best_model_path = each.last_model_path = path
        each.dirpath = str(run)
        if score is not None:
            import torch

            each.best_model_score = each.current_score = torch.tensor(score)
            each.best_k_models = {path: each.best_model_score}
