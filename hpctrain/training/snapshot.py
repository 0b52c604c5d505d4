"""What of a run goes into a checkpoint: all of it that a later job cannot compute again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hpctrain.checkpoint.format import AVERAGE, EVALUATION, MODEL, TRAINING, Spread
from hpctrain.checkpoint.host_copies import pinned_bytes
from hpctrain.checkpoint.save import Snapshot
from hpctrain.checkpoint.state import rng_to_tensors
from hpctrain.errors import CheckpointError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.extra_state import capture_extra_states, model_tensors
from hpctrain.training.horizon import Place
from hpctrain.training.step.train_step import TrainStep
from hpctrain.training.step.weights import OPTIMIZER, parameter_of

if TYPE_CHECKING:  # torch takes its time to load what only sharded runs need
    from hpctrain.training.step.shards import Shards

GENERATORS, BAD_STEPS = "generators/", "bad_steps"


@dataclass(slots=True)
class _Captured:
    """What one rank has of the model and the training state, before it is shared out."""

    model: dict[str, Tensor]
    training: dict[str, Tensor]
    values: dict[str, Any]


def expected_bytes(step: TrainStep) -> int:
    """Return about how large a checkpoint will be: most optimizers keep two numbers a parameter."""
    model = _bytes(model_tensors(step.model).values())
    tensors = step.optimizer_state.capture(step.held).tensors.values()
    averages = () if step.average is None else step.average.state().values()
    ranks = 1 if step.shards is None else step.shards.world_size
    evaluation = 0 if step.evaluation is None else model
    return model + (ranks * _bytes(tensors) or 2 * model) + ranks * _bytes(averages) + evaluation


def host_bytes(step: TrainStep, *, is_rank_zero: bool) -> int:
    """Return how much host memory this rank's copies for saves will take, of tensors on a device.

    Rank 0 saves all; where the parameters are spread, every rank its rows.
    """
    if step.shards is None and not is_rank_zero:
        return 0
    held = [item for _, item in step.held.named_parameters()]
    return pinned_bytes([*held, *step.optimizer_state.capture(step.held).tensors.values()])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(item.numel() * item.element_size() for item in tensors)


def capture(
    world: World,
    step: TrainStep,
    place: Place,
    *,
    data: Mapping[str, Any],
    extra: Mapping[str, Any],
    config_toml: str,
    metrics: Mapping[str, float] | None,
) -> Snapshot | None:
    """Return what this rank is to save of the run, None for nothing. Collective: all ranks.

    Rank 0 saves all; where the parameters are spread, every rank its rows of what belongs to them.

    `data` is the place in the data; `extra` is found again in `Resumed.values`.

    Raises:
        CheckpointError: on every rank, naming what cannot be saved.
    """
    is_rank_zero, shards = world.topology.is_rank_zero, step.shards
    captured: _Captured | None = None
    with raise_together(world.communicator):
        if is_rank_zero or shards is not None:
            captured = _captured(step)
    tensors, values = rng_to_tensors(world.device)
    digest = "" if captured is None or shards is None else _digest_of_optimizer(captured)
    everyone = world.communicator.all_gather((tensors, values, digest))
    if captured is None:
        return None
    if shards is not None and len({of_rank for *_, of_rank in everyone}) > 1:
        raise CheckpointError(
            f"{type(step.optimizer).__name__} has learned other numbers on each rank, where these "
            "hold rows of the parameters, and a checkpoint holds one for all: use "
            'training.strategy = "ddp"',
            everywhere=True,
        )
    model, training = captured.model, captured.training
    spread = None
    if shards is not None:
        spread = _spread(shards, training)
        model, training = _own_part(step, captured, spread, is_rank_zero=is_rank_zero)
    # Only an update changes the optimizer's state; parameters and buffers are the model's own.
    lent = {key: training.pop(key) for key in list(training) if key.startswith(OPTIMIZER)}
    for rank, (of_rank, *_) in enumerate(everyone if is_rank_zero else ()):
        for name, tensor in of_rank.items():
            training[f"{GENERATORS}{rank}/{name}"] = tensor
    return Snapshot(
        step=place.step,
        model=model,
        training=training,
        lent=lent,
        lend=step.before_update,
        values={
            "place": place.to_json(),
            "data": dict(data),
            "world_size": world.topology.world_size,
            "device": world.device.type,
            "threads": torch.get_num_threads(),
            "scaler": step.scaler.state_dict(),
            "generators": [of_rank for _, of_rank, _ in everyone],
            **captured.values,
            **extra,
        },
        config_toml=config_toml,
        metrics=metrics,
        tied={} if shards is None else shards.tied,
        spread=spread,
    )


def _captured(step: TrainStep) -> _Captured:
    """Return what this rank has."""
    training: dict[str, Tensor] = {BAD_STEPS: step.bad_steps}
    saved = step.optimizer_state.capture(step.held)
    training |= saved.tensors
    if step.average is not None:
        training |= {AVERAGE + name: item for name, item in step.average.state().items()}
    if step.evaluation is not None:
        training |= {EVALUATION + name: item for name, item in step.evaluation.state().items()}
    extra = capture_extra_states(step.model, training)
    return _Captured(
        model=model_tensors(step.model),
        training=training,
        values={"optimizer": saved.values, "extra_state": extra},
    )


def _digest_of_optimizer(captured: _Captured) -> str:
    """Return a checksum of what the optimizer has learned that is the same for all rows."""
    counts = {
        name: tensor.item()
        for name, tensor in captured.training.items()
        if name.startswith(OPTIMIZER) and not tensor.ndim and tensor.device.type == "cpu"
    }
    told = json.dumps([captured.values["optimizer"], counts], sort_keys=True, default=str)
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def _spread(shards: Shards, training: Mapping[str, Tensor]) -> Spread:
    """Return which tensors every rank has rows of."""
    held = dict(shards.named_parameters())
    rows = {
        key: shards.shapes[name]
        for key, tensor in training.items()
        if (name := parameter_of(key)) in shards.shapes and tensor.shape == held[name].shape
    }
    return Spread(ranks=shards.world_size, shapes={MODEL: shards.shapes, TRAINING: rows})


def _own_part(
    step: TrainStep, captured: _Captured, spread: Spread, *, is_rank_zero: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return this rank's rows of model and training state, and on rank 0 all that is not rows."""
    rows = spread.shapes[TRAINING]
    model = {
        name: item.detach()
        for name, item in step.held.named_parameters()
        if (item.numel() if name in spread.shapes[MODEL] else is_rank_zero)
    }
    if is_rank_zero:
        model |= {name: item for name, item in step.model.named_buffers() if name in captured.model}
    training = {
        key: tensor
        for key, tensor in captured.training.items()
        if (tensor.numel() if key in rows else is_rank_zero)
    }
    return model, training
