"""A checkpoint as a file of Lightning's: the user's export, for its `load_from_checkpoint`.

No run of ours goes on from such a file; Lightning makes them with pickle, and so they are.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hpctrain.checkpoint.export import Weights, choose
from hpctrain.checkpoint.format import CONFIG, read_file, read_meta
from hpctrain.checkpoint.load import load_values
from hpctrain.checkpoint.tensors import tensors_from_raw
from hpctrain.errors import CheckpointError
from hpctrain.utils.files import replacement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUFFIX = ".ckpt"

VERSION = "2.0.0"
"""Of the format: Lightning brings files of an older version up to its own when it reads them."""


def export_lightning(
    path: Path,
    target: Path,
    *,
    average: bool | None = False,
    best: bool = False,
    module: Any = None,
) -> str:
    """Write the weights of a checkpoint as a file for Lightning, and say which they are.

    Args:
        path: a checkpoint, or a run, whose newest is meant.
        target: the file.
        average: take the moving averages of the parameters; None: where there are some.
        best: take the best checkpoint of the run, not its newest.
        module: whose hyperparameters are written as they are; None: those that its config holds.

    Returns:
        What to say.

    Raises:
        CheckpointError: if the checkpoint is not whole, or the file cannot be written.
    """
    weights = Weights.read(choose(path, best=best)[0], average=average)
    state = tensors_from_raw(weights.of_model())
    place = load_values(weights.source).get("data", {})
    content = {
        "epoch": place.get("epoch", 0),
        "global_step": weights.step,
        "pytorch-lightning_version": VERSION,
        "state_dict": state,
        **(
            {"hyper_parameters": _arguments(weights.source)}
            if module is None
            else hyperparameters(module)
        ),
    }
    write_file(content, target)
    size = sum(item.nbytes for item in state.values())
    return (
        f"{target}: {len(state)} tensors, {size / 1e6:,.1f} MB, {weights.which} weights of step "
        f"{weights.step:,}, for load_from_checkpoint"
    )


def hyperparameters(module: Any) -> dict[str, Any]:
    """Return what a file says of a module's arguments, as `save_hyperparameters` kept them."""
    hparams = getattr(module, "hparams", None)
    if not hparams:
        return {"hyper_parameters": {}}
    name = getattr(module, "_hparams_name", None) or "kwargs"
    return {"hparams_name": name, "hyper_parameters": dict(hparams)}


def write_file(content: Mapping[str, Any], target: Path) -> None:
    """Write a file of Lightning's, whole or not at all.

    Raises:
        CheckpointError: if it cannot be written.
    """
    try:
        with replacement(target) as temporary:
            torch.save(dict(content), temporary)
    # torch has RuntimeError for a folder that is not there, pickle what it likes.
    except (OSError, RuntimeError, pickle.PicklingError, AttributeError, TypeError) as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error


def _arguments(source: Path) -> dict[str, Any]:
    """Return the arguments of the model, as the config of the run has them."""
    text = read_file(source, CONFIG, read_meta(source))
    try:
        section = tomllib.loads(text.decode("utf-8")).get("model", {})
    except ValueError as error:
        raise CheckpointError(f"{source / CONFIG} is damaged: {error}") from error
    plain = {name: value for name, value in section.items() if name not in ("use", "arguments")}
    return {**plain, **section.get("arguments", {})}
