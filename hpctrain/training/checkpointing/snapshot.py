"""Snapshot of a run: what of it goes into a checkpoint, and from there back into its parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from hpctrain.checkpoint.format import (
    AVERAGE,
    EVALUATION,
    MODEL,
    TRAINING,
    Spread,
    rows_of,
)
from hpctrain.checkpoint.load import Rows
from hpctrain.checkpoint.optimizer_state import OWN, PARTS, SLOTS
from hpctrain.checkpoint.save import Snapshot, pinned_bytes
from hpctrain.checkpoint.state import Json, UnsavableError, decode, encode, rng_to_tensors
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.model.registered_state import tensor_facts, tensor_placement
from hpctrain.training.model.wrappers import PlainNames, load_plain_state, plain_state
from hpctrain.training.position import Position
from hpctrain.training.step import TrainStep

if TYPE_CHECKING:  # torch takes its time to load what only sharded runs need
    from hpctrain.training.parallel.fsdp import ShardedModel

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
    ranks = 1 if step.sharded is None else step.sharded.world_size
    evaluation = 0 if step.evaluation is None else model
    return model + (ranks * _bytes(tensors) or 2 * model) + ranks * _bytes(averages) + evaluation


def host_bytes(step: TrainStep, *, is_rank_zero: bool) -> int:
    """Return how much host memory this rank's copies for saves will take, of tensors on a device.

    Rank 0 saves all; where the parameters are spread, every rank its rows.
    """
    if step.sharded is None and not is_rank_zero:
        return 0
    held = [item for _, item in step.held.named_parameters()]
    return pinned_bytes([*held, *step.optimizer_state.capture(step.held).tensors.values()])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(item.numel() * item.element_size() for item in tensors)


def capture(
    world: World,
    step: TrainStep,
    place: Position,
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
    is_rank_zero, sharded = world.topology.is_rank_zero, step.sharded
    captured: _Captured | None = None
    with raise_together(world.communicator):
        if is_rank_zero or sharded is not None:
            captured = _captured(step)
        else:
            step.registered.ask()
    tensors, values = rng_to_tensors(world.device)
    logged = step.capture_logged(tensors)
    digest = "" if captured is None or sharded is None else _digest_of_optimizer(captured)
    everyone = world.communicator.all_gather((tensors, values, digest, logged))
    if captured is None:
        return None
    if sharded is not None and len({of_rank for _, _, of_rank, _ in everyone}) > 1:
        raise CheckpointError(
            f"{type(step.optimizer).__name__} has learned other numbers on each rank, where these "
            "hold rows of the parameters, and a checkpoint holds one for all: use "
            'training.strategy = "ddp"',
            everywhere=True,
        )
    model, training = captured.model, captured.training
    spread = None
    if sharded is not None:
        spread = _spread(sharded, training)
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
            "generators": [of_rank for _, of_rank, *_ in everyone],
            "logged": [of_rank for *_, of_rank in everyone],
            **captured.values,
            **extra,
        },
        config_toml=config_toml,
        metrics=metrics,
        tied={} if sharded is None else sharded.tied,
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
        values={
            "optimizer": saved.values,
            "extra_state": extra,
            "registered": step.registered.capture(training),
        },
    )


def _digest_of_optimizer(captured: _Captured) -> str:
    """Return a checksum of what the optimizer has learned that is the same for all rows."""
    counts = {
        name: tensor.item()
        for name, tensor in captured.training.items()
        if name.startswith(OPTIMIZER) and not tensor.ndim and tensor.device.type == "cpu"
    }
    text = json.dumps([captured.values["optimizer"], counts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _spread(sharded: ShardedModel, training: Mapping[str, Tensor]) -> Spread:
    """Return which tensors every rank has rows of."""
    held = dict(sharded.named_parameters())
    rows = {
        key: sharded.shapes[name]
        for key, tensor in training.items()
        if (name := parameter_of(key)) in sharded.shapes and tensor.shape == held[name].shape
    }
    return Spread(ranks=sharded.world_size, shapes={MODEL: sharded.shapes, TRAINING: rows})


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
    sharded = step.sharded
    if sharded is None:
        load_plain_state(step.model, dict(tensors))
        return
    # Of tied parameters the file may have another name, and the model has one tensor.
    stored = {} if rows is None else {name: rows.aliases.get(name, name) for name in sharded.shapes}
    own = {
        name: rows_of(shape[0], sharded.world_size, sharded.rank)
        for name, shape in sharded.shapes.items()
    }
    read: Mapping[str, Tensor] = {}
    if rows is not None:
        there = rows.shapes(MODEL)
        wanted = {stored[name]: bounds for name, bounds in own.items() if stored[name] in there}
        read = rows.read(MODEL, wanted)
    with torch.no_grad():
        for name, parameter in sharded.named_parameters():
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
    sharded = step.sharded
    if sharded is None:
        return chosen
    found = {}
    for key, tensor in chosen.items():
        shape = sharded.shapes.get(parameter_of(key) or "")
        if shape is not None and tensor.shape == shape:
            first, stop = rows_of(shape[0], sharded.world_size, sharded.rank)
            tensor = tensor[first:stop]  # noqa: PLW2901
        found[key] = tensor
    if rows is not None:
        shapes = {
            key: shape
            for key, shape in rows.shapes(TRAINING).items()
            if key.startswith(tuple(beginnings))
        }
        wanted = {
            key: rows_of(shape[0], sharded.world_size, sharded.rank)
            for key, shape in shapes.items()
        }
        read = rows.read(TRAINING, wanted)
        mine = dict(sharded.named_parameters())
        for key in shapes:
            # Of a tensor with fewer rows than ranks there may be none, which is a state too.
            name = parameter_of(key)
            empty = mine[name].detach() if name in mine else None
            if key in read:
                found[key] = read[key]
            elif empty is not None:
                found[key] = empty.clone()
    return found


EXTRA = "extra_state/"
"""Begins the names of tensors of extra states among those of the training state."""

_KEY = "_extra_state"  # what torch calls it in a state_dict


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, and what else of the state_dict is a tensor.

    Raises:
        UnsavableError: if a hook of the model's own puts something else there.
    """
    tensors = {}
    state: Mapping[str, object] = plain_state(model)
    for name, item in state.items():
        if isinstance(item, Tensor):
            tensors[name] = item
        elif not is_extra(name):
            raise UnsavableError(
                f"{name} in the state_dict of {type(model).__name__} is a {type(item).__name__}: "
                "parameters and buffers are tensors, and get_extra_state is for all else"
            )
    return tensors


def refuse_unmade(model: nn.Module) -> None:
    """Refuse parameters and buffers that have no numbers yet.

    Raises:
        ConfigError: naming the first of them.
    """
    for name, item in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(item, UninitializedParameter | UninitializedBuffer):
            raise ConfigError(
                f"model.use: {name} has no shape before the first use of its lazy module: it "
                "can be neither sent to other ranks nor saved: give the module its sizes, or run a "
                "batch through the model where it is built"
            )
        if item.device.type == "meta":
            raise ConfigError(
                f"model.use: {name} is on the device meta and has no numbers: build the model on "
                "the host"
            )


def is_extra(name: str) -> bool:
    """Tell whether a name in a state_dict is that of an extra state."""
    return name.rpartition(".")[2] == _KEY


def capture_extra_states(model: nn.Module, tensors: MutableMapping[str, Tensor]) -> dict[str, Json]:
    """Return the extra state of every module that has one, as JSON, by names of a state_dict.

    Args:
        model: whose modules.
        tensors: takes the tensors of the states.

    Raises:
        UnsavableError: if a state is more than tensors, numbers, texts and containers of these, or
            its module could not take it back.
    """
    found = {}
    for name, module in _with_extra_state(model):
        if type(module).set_extra_state is nn.Module.set_extra_state:
            raise UnsavableError(
                f"{name}: {type(module).__name__} has get_extra_state, and no set_extra_state to "
                "take it back"
            )
        found[name] = encode(module.get_extra_state(), EXTRA + name, tensors, tensor_facts)
    return found


def restore_extra_states(
    model: nn.Module,
    saved: Mapping[str, Json],
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Give every module its extra state back.

    Raises:
        CheckpointError: if a module that had one has none any more.
    """
    place = tensor_placement(device)
    modules = dict(_with_extra_state(model))
    for name, value in saved.items():
        if name not in modules:
            raise CheckpointError(f"the checkpoint has {name}, and the model has no such module")
        modules[name].set_extra_state(decode(value, tensors, place))


def _with_extra_state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    plain = PlainNames(model)
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield plain(f"{name}.{_KEY}".removeprefix(".")), module
