"""Folder of a fit: a new `version_N`, or that of its batch job (requeue), and its `best.ckpt`.

As with Lightning a script that is started again begins anew, in `version_N`. A batch job that its
scheduler or its script starts again is the same job: it goes on where it stood. The fits of a
script are known by their number and the command, which version.json in each folder holds.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.checkpoint.export import best_ones
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Exports:
    """The files that a run has left for the script.

    Attributes:
        scores: paths, the best one first, each with its metric; that of the last weights at the
            end, without one.
        sources: the checkpoint that each was made of.
    """

    scores: Mapping[str, float | None] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)


def export_for_scripts(run: Path, module: Any, objects: Iterable[Any]) -> Exports:
    """Write the best weights of a run, and its last, as the files that a script loads afterwards.

    For rank 0.

    Args:
        run: its folder.
        module: of the script.
        objects: its ModelCheckpoints, which say whether the last are wanted beside the best, and
            whether more than one of the best is.

    Returns:
        The files; none where the run has saved nothing.

    Raises:
        CheckpointError: if a checkpoint is damaged, or a file cannot be written.
    """
    from hpctrain.checkpoint.format import resolved
    from hpctrain.checkpoint.lightning_file import export_lightning

    if read_latest(run) is None:
        return Exports()
    files: dict[str, float | None] = {}
    sources: dict[str, str] = {}
    tops = [getattr(each, "save_top_k", 1) for each in objects]
    wanted = None if -1 in tops else max([1, *tops])
    for number, best in enumerate(best_ones(run)[:wanted]):
        target = run / (BEST if not number else f"best-{number + 1}.ckpt")
        source = run / CHECKPOINTS / folder_name(best.step)
        export_lightning(source, target, average=None, module=module)
        files[str(target)], sources[str(target)] = best.value, str(source)
    if not files or any(getattr(each, "save_last", False) for each in objects):
        export_lightning(run, run / LAST, average=None, module=module)
        files[str(run / LAST)], sources[str(run / LAST)] = None, str(resolved(run))
    return Exports(scores=files, sources=sources)


def report_files(objects: Iterable[Any], run: Path, files: Mapping[str, float | None]) -> None:
    """Let ModelCheckpoint objects know the files, which a script asks them for afterwards."""
    import torch

    scores = {path: torch.tensor(score) for path, score in files.items() if score is not None}
    last = next((path for path, score in files.items() if score is None), "")
    for each in objects:
        each.best_model_path = next(iter(scores), last)
        each.last_model_path = last or each.best_model_path
        each.dirpath = str(run)
        if scores:
            each.best_model_score = each.current_score = next(iter(scores.values()))
            each.best_k_models = dict(scores)
            each.kth_best_model_path, each.kth_value = list(scores.items())[-1]


def stopping_state(run: Path) -> Mapping[str, Any]:
    """Return the state of early stopping at the end of a run; for rank 0.

    Raises:
        CheckpointError: if the newest checkpoint is damaged.
    """
    from hpctrain.checkpoint.format import resolved
    from hpctrain.checkpoint.load import load_values
    from hpctrain.training.early_stopping import STATE

    state: Mapping[str, Any] = {}
    if read_latest(run) is not None:
        state = load_values(resolved(run)).get(STATE, {})
    return state


def report_stopping(objects: Iterable[Any], state: Mapping[str, Any], epoch: int) -> None:
    """Let EarlyStopping objects know how their metric went, which a script asks them for.

    Args:
        objects: of Lightning's class.
        state: of early stopping, as the newest checkpoint of the run has it.
        epoch: the last one that was trained.
    """
    import torch

    for each in objects:
        if state.get("best") is not None:
            each.best_score = torch.tensor(state["best"])
        each.wait_count = state.get("waited", 0)
        if state.get("reason") is not None:
            each.stopped_epoch, each.stopping_reason_message = epoch, state["reason"]
