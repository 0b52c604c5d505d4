"""A run put back to where a checkpoint has it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from hpctrain.checkpoint.format import AVERAGE, MODEL, TRAINING
from hpctrain.checkpoint.load import Loaded, Rows, fitting_names
from hpctrain.checkpoint.optimizer_state import SavedOptimizer
from hpctrain.checkpoint.state import restore_rng
from hpctrain.errors import CheckpointError, TrainingError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.extra_state import is_extra, model_tensors, restore_extra_states
from hpctrain.training.horizon import Place
from hpctrain.training.optimization.optimizers import prepare_momentum
from hpctrain.training.snapshot import BAD_STEPS, GENERATORS
from hpctrain.training.step.broadcast import broadcast_tensors
from hpctrain.training.step.plain_names import adopt_buffers, plain_state
from hpctrain.training.step.train_step import TrainStep
from hpctrain.training.step.weights import OPTIMIZER, own_state, parameter_of, put_weights
from hpctrain.utils.text import listed


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

    def without_tensors(self) -> Resumed:
        """Return the same without what is in model and optimizer by now: it is as large as they."""
        return replace(self, model={}, training={}, rows=None)

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


def restore(world: World, step: TrainStep, resumed: Resumed) -> None:
    """Put the state back into the parts of the run, once these are primed.

    The generators of the ranks are put back where there are as many ranks as then.

    Raises:
        CheckpointError: if the checkpoint is of another model or optimizer.
    """
    restore_parameters(step, resumed)
    training = resumed.training
    step.bad_steps.copy_(training[BAD_STEPS])
    if resumed.values["world_size"] == world.topology.world_size:
        rank = world.topology.rank
        mine = _below(training, f"{GENERATORS}{rank}/")
        restore_rng(mine, resumed.values["generators"][rank], world.device)


def restore_parameters(step: TrainStep, resumed: Resumed) -> None:
    """Put model and optimizer back, and what belongs to them.

    Raises:
        CheckpointError: if the checkpoint is of another model or optimizer.
    """
    resumed = _named_as_here(step, resumed)
    _load_model(step, resumed)
    restore_extra_states(
        step.model, resumed.values.get("extra_state", {}), resumed.training, step.device
    )
    state = own_state(step, resumed.training, resumed.rows, (*OPTIMIZER, AVERAGE))
    of_optimizer = {name: item for name, item in state.items() if name.startswith(OPTIMIZER)}
    step.optimizer_state.restore(
        step.held, SavedOptimizer(of_optimizer, resumed.values.get("optimizer"))
    )
    prepare_momentum(step.optimizer)  # where the checkpoint has none
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
    here, there = (
        {name: tuple(item.shape) for name, item in tensors.items() if not is_extra(name)}
        for tensors in (model_tensors(step.model), resumed.model)
    )
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
