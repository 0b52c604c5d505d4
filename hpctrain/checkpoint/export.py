"""Weights of a checkpoint to use or to give away, without torch: which one, which set of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpctrain.checkpoint.best import Best, Preference
from hpctrain.checkpoint.format import (
    AVERAGE,
    CONFIG,
    EVALUATION,
    MODEL,
    TRAINING,
    VALUES,
    Spread,
    evaluations,
    is_run,
    join,
    newest_first,
    read_file,
    read_meta,
    resolved,
)
from hpctrain.checkpoint.safetensors_files import RawTensor, raw_tensors, write_raw
from hpctrain.config.fields import normalization_of
from hpctrain.config.toml import parse
from hpctrain.config.validate import validate
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.utils.files import replacement
from hpctrain.utils.json_files import parse_json
from hpctrain.utils.run_folder import CHECKPOINTS, folder_name

RECIPE = "hpctrain"
"""Name among the metadata of an export, under which stands how the model is made."""
RECIPE_VERSION = 1
TASK = "hpctrain_task."
"""Begins the names of a task's own parameters, which are trained with the model and none of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weights of a checkpoint.

    Attributes:
        source: the folder of the checkpoint.
        step: at which it was saved.
        which: "training", "average" of those, or "evaluation" where the optimizer has two sets.
        tensors: by name; tied ones under each of their names.
    """

    source: Path
    step: int
    which: str
    tensors: Mapping[str, RawTensor]

    @classmethod
    def read(cls, source: Path, *, average: bool | None = False) -> Weights:
        """Read those to evaluate with where the optimizer had two sets, else those of training.

        Args:
            source: the folder of a checkpoint.
            average: take the moving averages of the parameters; None: where there are some.

        Raises:
            CheckpointError: if the checkpoint is not whole, or has no averages.
        """
        meta = read_meta(source)
        tensors, which = whole_tensors(source, MODEL, meta), "training"
        second: dict[str, RawTensor] = {}
        if "evaluation" in meta.get("weights", ()) and not average:
            second, which = _second_weights(source, meta, EVALUATION), "evaluation"
        elif average is not False:
            second = _second_weights(source, meta, AVERAGE)
            which = "average" if second else which
            if average and not second:
                raise CheckpointError(f"{source} has no averages: training.ema_decay was not set")
        tensors |= second
        try:
            tensors |= {name: tensors[first] for name, first in meta["aliases"].items()}
        except KeyError as error:
            raise CheckpointError(f"{source} is damaged: it has no tensor {error}") from error
        return cls(source=source, step=meta["step"], which=which, tensors=tensors)

    def of_model(self) -> Mapping[str, RawTensor]:
        """Return the tensors without those of the task."""
        return {name: item for name, item in self.tensors.items() if not name.startswith(TASK)}


def export(path: Path, target: Path, *, average: bool = False, best: bool = False) -> str:
    """Write the weights of a checkpoint as one safetensors file, and say which they are.

    Tied tensors are in it under each of their names, so that a strict `load_state_dict` takes it.

    Args:
        path: a checkpoint, or a run, whose newest is meant.
        target: the file.
        average: take the moving averages of the parameters where there are some.
        best: take the best checkpoint of the run, not its newest.

    Returns:
        What to say.

    Raises:
        CheckpointError: if the checkpoint is not whole, has no averages, or the file cannot be
            written.
    """
    weights = Weights.read(choose(path, best=best)[0], average=average)
    tensors = weights.of_model()
    facts = {"format": "pt", "step": str(weights.step), "weights": weights.which}
    if (made := recipe(weights.source)) is not None:
        facts[RECIPE] = json.dumps(made)
    try:
        with replacement(target) as temporary:
            write_raw(temporary, tensors, facts)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    size = sum(len(item.data) for item in tensors.values())
    return (
        f"{target}: {len(tensors)} tensors, {size / 1e6:,.1f} MB, {weights.which} weights "
        f"of step {weights.step:,}"
    )


def recipe(source: Path) -> dict[str, Any] | None:
    """Return how the model of a checkpoint is made, and what is done to its inputs.

    None where its config is not one that this version understands.

    Raises:
        CheckpointError: if the checkpoint is not whole.
    """
    meta = read_meta(source)
    try:
        config, _ = validate(parse(read_file(source, CONFIG, meta).decode("utf-8"), CONFIG))
        values: Any = parse_json(read_file(source, VALUES, meta))
        numbers, fields = values.get("normalization", {}), values.get("fields", {})
        used = (*config.task.inputs, config.task.target) if config is not None else ()
        fields = {name: each for name, each in fields.items() if name in used}
        forms = values.get("forms", {})
        classes = {
            name: each["classes"]
            for name, each in forms.items()
            if name in used and each.get("classes")
        }
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{source} is damaged: {error}") from error
    except ConfigError:
        return None
    if config is None:
        return None
    normalize = {
        name: {key: each[key] for key in ("mean", "std")} for name, each in numbers.items()
    }
    for name, given in config.data.normalize.items():
        said = normalization_of(given)
        if name not in normalize and not isinstance(said, str):
            normalize[name] = {"mean": list(said.mean), "std": list(said.std)}
    return {
        "version": RECIPE_VERSION,
        "model": asdict(config.model),
        "task": asdict(config.task),
        "precision": config.training.precision,
        "transform": config.data.transform,
        "transform_arguments": config.data.transform_arguments,
        "sample_transform": config.data.sample_transform,
        "normalize": normalize,
        "fields": fields,
        "classes": classes,
        "fill": {
            name: table.fill for name, table in config.data.fields.items() if table.fill is not None
        },
    }


def best_of(run: Path) -> Best | None:
    """Return the best checkpoint of a run as its newest says, None if it keeps none."""
    return next(iter(best_ones(run)), None)


def best_ones(run: Path) -> list[Best]:
    """Return the best checkpoints of a run that its newest says it keeps, the best one first."""
    checkpoints = run / CHECKPOINTS
    for path in newest_first(checkpoints):
        try:
            preference = Preference.of(read_meta(path))
        except CheckpointError:
            continue
        return [] if preference is None else preference.ranked(evaluations(checkpoints))
    return []


def choose(path: Path, *, best: bool | None) -> tuple[Path, Best | None]:
    """Return the folder of a checkpoint, and what it is the best by.

    Args:
        path: a checkpoint, or a run.
        best: take the best of the run; False: its newest; None: the best where it keeps one.

    Raises:
        CheckpointError: if there is no such.
    """
    found = None
    if best is not False and is_run(path):
        found = best_of(path)
    elif best:
        raise CheckpointError(
            f"{path} is not the folder of a run: only a run has a best checkpoint"
        )
    if found is not None:
        return path / CHECKPOINTS / folder_name(found.step), found
    if best:
        raise CheckpointError(
            f"{path} has no best checkpoint: its newest was not saved under checkpoint.keep_best, "
            "or none has an evaluation"
        )
    return resolved(path), None


def _second_weights(source: Path, meta: Mapping[str, Any], beginning: str) -> dict[str, RawTensor]:
    """Return the weights of a checkpoint that are not those of training, by their names."""
    return {
        name.removeprefix(beginning): item
        for name, item in whole_tensors(source, TRAINING, meta).items()
        if name.startswith(beginning)
    }


def whole_tensors(folder: Path, file: str, meta: Mapping[str, Any]) -> dict[str, RawTensor]:
    """Return the whole tensors of a checkpoint, verified, whoever has written them.

    Raises:
        CheckpointError: if a file is missing, or is not what was written.
    """

    def read(name: str) -> dict[str, RawTensor]:
        return raw_tensors(read_file(folder, name, meta), folder / name)

    def concatenate(rows: Sequence[RawTensor], shape: tuple[int, ...]) -> RawTensor:
        return RawTensor(rows[0].dtype, shape, b"".join(item.data for item in rows))

    spread = Spread.of(meta)
    return read(file) if spread is None else join(spread, file, read, concatenate)
