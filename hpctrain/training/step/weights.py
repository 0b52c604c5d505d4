"""Saved tensors into the parts of a run, whether a rank holds all of a parameter or some rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hpctrain.checkpoint.format import AVERAGE, EVALUATION, MODEL, TRAINING, rows_of
from hpctrain.checkpoint.load import Rows
from hpctrain.checkpoint.optimizer_state import OWN, PARTS, SLOTS
from hpctrain.training.step.plain_names import PlainNames, load_plain_state
from hpctrain.training.step.train_step import TrainStep

OPTIMIZER = (SLOTS, PARTS, OWN)
"""Begin the names of the optimizer's tensors among those of the training state."""


def parameter_of(key: str) -> str | None:
    """Return the parameter that a tensor of the training state belongs to, None if to none."""
    for beginning in (SLOTS, PARTS):
        if key.startswith(beginning):
            return key.removeprefix(beginning).rpartition("/")[0]
    for beginning in (AVERAGE, EVALUATION):
        if key.startswith(beginning):
            return key.removeprefix(beginning)
    return None


def put_weights(step: TrainStep, tensors: Mapping[str, Tensor], rows: Rows | None = None) -> None:
    """Put tensors into the model; those that it has not are passed over.

    Args:
        step: whose model.
        tensors: whole ones, by name; of the right shapes.
        rows: of a checkpoint, where the rest is still on disk.

    Raises:
        CheckpointError: if that cannot be read.
    """
    shards = step.shards
    if shards is None:
        load_plain_state(step.model, dict(tensors))
        return
    # Of tied parameters the file may have another name, and the model has one tensor.
    stored = {} if rows is None else {name: rows.aliases.get(name, name) for name in shards.shapes}
    own = {
        name: rows_of(shape[0], shards.world_size, shards.rank)
        for name, shape in shards.shapes.items()
    }
    read: Mapping[str, Tensor] = {}
    if rows is not None:
        there = rows.shapes(MODEL)
        wanted = {stored[name]: bounds for name, bounds in own.items() if stored[name] in there}
        read = rows.read(MODEL, wanted)
    with torch.no_grad():
        for name, parameter in shards.named_parameters():
            if name in tensors and name not in own:
                parameter.copy_(tensors[name])
            elif name in tensors:
                first, stop = own[name]
                parameter.copy_(tensors[name][first:stop])
            elif stored.get(name) in read:
                parameter.copy_(read[stored[name]])
        for name, buffer in PlainNames(step.model).of(step.model.named_buffers()):
            if name in tensors:
                buffer.copy_(tensors[name])


def own_state(
    step: TrainStep, tensors: Mapping[str, Tensor], rows: Rows | None, beginnings: Sequence[str]
) -> dict[str, Tensor]:
    """Return what this rank needs of the training state: its rows of what belongs to parameters.

    Args:
        step: into which it is to be put.
        tensors: whole ones, by name.
        rows: of a checkpoint, where the rest is still on disk.
        beginnings: of the names that are wanted.

    Raises:
        CheckpointError: if that cannot be read.
    """
    chosen = {name: item for name, item in tensors.items() if name.startswith(tuple(beginnings))}
    shards = step.shards
    if shards is None:
        return chosen
    found = {}
    for key, tensor in chosen.items():
        shape = shards.shapes.get(parameter_of(key) or "")
        if shape is not None and tensor.shape == shape:
            first, stop = rows_of(shape[0], shards.world_size, shards.rank)
            tensor = tensor[first:stop]  # noqa: PLW2901
        found[key] = tensor
    if rows is not None:
        shapes = {
            key: shape
            for key, shape in rows.shapes(TRAINING).items()
            if key.startswith(tuple(beginnings))
        }
        wanted = {
            key: rows_of(shape[0], shards.world_size, shards.rank) for key, shape in shapes.items()
        }
        read = rows.read(TRAINING, wanted)
        mine = dict(shards.named_parameters())
        for key in shapes:
            # Of a tensor with fewer rows than ranks there may be none, which is a state too.
            name = parameter_of(key)
            empty = mine[name].detach() if name in mine else None
            if key in read:
                found[key] = read[key]
            elif empty is not None:
                found[key] = empty.clone()
    return found
