"""The whole state of a run to a checkpoint and back, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hpctrain.checkpoint.format import Snapshot
from hpctrain.checkpoint.layout import MODEL, TRAINING
from hpctrain.checkpoint.names import fitting_names
from hpctrain.checkpoint.parts import Spread
from hpctrain.checkpoint.reading import Loaded, Rows
from hpctrain.checkpoint.state import (
    load_optimizer,
    optimizer_to_tensors,
    restore_rng,
    rng_to_tensors,
)
from hpctrain.checkpoint.tools import AVERAGE
from hpctrain.errors import CheckpointError, TrainingError
from hpctrain.launch.world import World
from hpctrain.topology import raise_together
from hpctrain.training.horizon import Place
from hpctrain.training.step.broadcast import broadcast_tensors
from hpctrain.training.step.plain_names import PlainNames, adopt_buffers, plain_state
from hpctrain.training.step.train_step import TrainStep
from hpctrain.training.step.weights import OPTIMIZER, own_state, parameter_of, put_weights
from hpctrain.utils.text import listed

_GENERATORS, _BAD_STEPS = "generators/", "bad_steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What every rank knows of the checkpoint that the run goes on from.

    Attributes:
        path: of the checkpoint, as the user can type it.
        values: the training state that is not tensors.
        config_toml: the config that it was saved under.
        rows: what is still on disk, for each rank to read its own; None: nothing.
    """

    path: str
    model: Mapping[str, Tensor]
    training: Mapping[str, Tensor]
    values: Mapping[str, Any]
    config_toml: str
    rows: Rows | None = None

    @property
    def place(self) -> Place:
        place = self.values["place"]
        return Place(**{field.name: place[field.name] for field in fields(Place)})


def share(world: World, loaded: Loaded | None) -> Resumed | None:
    """Hand what rank 0 has loaded to every rank. Collective: all ranks."""
    facts = world.communicator.broadcast(
        None
        if loaded is None
        else (str(loaded.path), loaded.values, loaded.config_toml, loaded.rows)
    )
    if facts is None:
        return None
    path, values, config_toml, rows = facts
    return Resumed(
        path=path,
        model=broadcast_tensors(world, None if loaded is None else loaded.model),
        training=broadcast_tensors(world, None if loaded is None else loaded.training),
        values=values,
        config_toml=config_toml,
        rows=rows,
    )


def expected_bytes(step: TrainStep) -> int:
    """Return about how large a checkpoint will be: most optimizers keep two numbers a parameter."""
    model = _bytes(step.model.state_dict().values())
    tensors = optimizer_to_tensors(step.optimizer, step.held).values()
    averages = () if step.average is None else step.average.state().values()
    ranks = 1 if step.shards is None else step.shards.world_size
    return model + (ranks * _bytes(tensors) or 2 * model) + ranks * _bytes(averages)


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
    """
    tensors, values = rng_to_tensors()
    generators = world.communicator.all_gather((tensors, values))
    is_rank_zero, shards = world.topology.is_rank_zero, step.shards
    if not is_rank_zero and shards is None:
        return None
    training: dict[str, Tensor] = {_BAD_STEPS: step.bad_steps}
    for key, tensor in optimizer_to_tensors(step.optimizer, step.held).items():
        training[OPTIMIZER + key] = tensor
    if step.average is not None:
        training |= {AVERAGE + name: item for name, item in step.average.state().items()}
    spread: Spread | None = None
    model: Mapping[str, Tensor]
    if shards is None:
        model = plain_state(step.model)
    else:
        held = dict(shards.named_parameters())
        rows = {
            key: shards.shapes[name]
            for key, tensor in training.items()
            if (name := parameter_of(key)) in shards.shapes and tensor.shape == held[name].shape
        }
        spread = Spread(ranks=shards.world_size, shapes={MODEL: shards.shapes, TRAINING: rows})
        model = {
            name: item.detach()
            for name, item in held.items()
            if (item.numel() if name in shards.shapes else is_rank_zero)
        }
        if is_rank_zero:
            kept = plain_state(step.model).keys()
            buffers = PlainNames(step.model).of(step.model.named_buffers(remove_duplicate=False))
            model |= {name: item for name, item in buffers if name in kept}
        training = {
            key: tensor
            for key, tensor in training.items()
            if (tensor.numel() if key in rows else is_rank_zero)
        }
    # Only an update changes the optimizer's state; parameters and buffers are the model's own.
    lent = {key: training.pop(key) for key in list(training) if key.startswith(OPTIMIZER)}
    for rank, (of_rank, _) in enumerate(generators if is_rank_zero else ()):
        for name, tensor in of_rank.items():
            training[f"{_GENERATORS}{rank}/{name}"] = tensor
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
            "generators": [of_rank for _, of_rank in generators],
            **extra,
        },
        config_toml=config_toml,
        metrics=metrics,
        tied={} if shards is None else shards.tied,
        spread=spread,
    )


def restore(world: World, step: TrainStep, resumed: Resumed) -> None:
    """Put the state back into the parts of the run, once these are primed.

    The generators of the ranks are put back where there are as many ranks as then.

    Raises:
        CheckpointError: if the checkpoint is of another model or optimizer.
    """
    restore_parameters(step, resumed)
    training = resumed.training
    step.bad_steps.copy_(training[_BAD_STEPS])
    if resumed.values["world_size"] == world.topology.world_size:
        rank = world.topology.rank
        mine = _below(training, f"{_GENERATORS}{rank}/")
        restore_rng(mine, resumed.values["generators"][rank])


def restore_parameters(step: TrainStep, resumed: Resumed) -> None:
    """Put model and optimizer back, and what belongs to them.

    Raises:
        CheckpointError: if the checkpoint is of another model or optimizer.
    """
    resumed = _named_as_here(step, resumed)
    _load_model(step, resumed)
    state = own_state(step, resumed.training, resumed.rows, (OPTIMIZER, AVERAGE))
    load_optimizer(step.optimizer, step.held, _below(state, OPTIMIZER))
    if step.average is not None:
        step.average.load(_below(state, AVERAGE))
    if resumed.values["scaler"]:
        step.scaler.load_state_dict(dict(resumed.values["scaler"]))


def roll_back(world: World, step: TrainStep, load: Callable[[], Loaded | None]) -> int:
    """Put parameters and optimizer back to a checkpoint; the run goes on from where it is.

    Collective: all ranks.

    Args:
        world: the ranks.
        step: whose parameters.
        load: returns the checkpoint on rank 0. Collective: all ranks.

    Returns:
        The step of the checkpoint.

    Raises:
        TrainingError: on every rank, if there is no checkpoint yet.
    """
    resumed = share(world, load())
    if resumed is None:
        raise TrainingError(
            "there is no checkpoint yet to go back to after steps without a finite gradient: lower "
            "optimizer.lr, or save earlier by checkpoint.every_steps",
            everywhere=True,
        )
    with raise_together(world.communicator):
        restore_parameters(step, resumed)
        step.bad_steps[:2] = 0  # in a row; all of them stay counted
    return resumed.place.step


def _named_as_here(step: TrainStep, resumed: Resumed) -> Resumed:
    """Return what is resumed under the names of the model, whatever wrappers it was saved with."""
    there = {*resumed.model, *(resumed.rows.shapes(MODEL) if resumed.rows is not None else ())}
    names = fitting_names(plain_state(step.model), there)
    if not names:
        return resumed
    rows = resumed.rows
    if rows is not None:
        keys = [*rows.shapes(MODEL), *rows.shapes(TRAINING)]
        rows = replace(
            rows,
            stored={new: key for key in keys if (new := _renamed(key, names)) != key},
            aliases={names.get(k, k): names.get(v, v) for k, v in rows.aliases.items()},
        )
    return replace(
        resumed,
        model={names.get(name, name): item for name, item in resumed.model.items()},
        training={_renamed(key, names): item for key, item in resumed.training.items()},
        rows=rows,
    )


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """Return the key of a tensor of model or training state with another name in it."""
    name = parameter_of(key) or key
    if name not in names:
        return key
    beginning, _, end = key.partition(name)
    return beginning + names[name] + end


def _load_model(step: TrainStep, resumed: Resumed) -> None:
    here = {name: tuple(item.shape) for name, item in plain_state(step.model).items()}
    there = {name: tuple(item.shape) for name, item in resumed.model.items()}
    if resumed.rows is not None:
        there |= resumed.rows.shapes(MODEL)
    for name in adopt_buffers(step.model, step.disturbance.buffers, resumed.model):
        here[name] = there[name]
    missing = sorted(here.keys() - there.keys())
    surplus = sorted(there.keys() - here.keys())
    changed = sorted(name for name in here.keys() & there.keys() if here[name] != there[name])
    if missing or surplus or changed:
        what = [
            f"{label}: {listed(names, 4)}"
            for label, names in (
                ("not in it", missing),
                ("in it only", surplus),
                ("of another shape", changed),
            )
            if names
        ]
        raise CheckpointError(
            f"{resumed.path} is of another model ({'; '.join(what)}): bring the old [model] back, "
            "or start a new run with another run.name"
        )
    put_weights(step, resumed.model, resumed.rows)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
