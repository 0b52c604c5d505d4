"""A module in a stage in which nothing is trained: validate, test or predict."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import nn

from hpctrain.config import Config
from hpctrain.launch.process_group import World
from hpctrain.training.modules.overrides import is_own
from hpctrain.training.modules.stand_in import tell_device
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.position import StopAt

Stage = Literal["validate", "test", "predict"]

STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
"""The method of a module that a stage calls."""


def for_forward_passes(config: Config) -> Config:
    """Return the config under which a model is whole on every rank, and runs as it is."""
    plain = dataclasses.replace(
        config.training,
        strategy="ddp",
        compile=False,
        sync_batchnorm=False,
        activation_checkpointing=(),
    )
    return dataclasses.replace(config, training=plain)


def missing_step(model: nn.Module, stage: Stage) -> str | None:
    """Return the method that a stage would call and a module has not; None: it has it."""
    step = STEPS[stage]
    # Lightning's own predict_step calls the module; its others do nothing.
    has_step = callable(getattr(model, step, None))
    return None if has_step and (stage == "predict" or is_own(model, step)) else step


def bind(task: ModuleTask, model: nn.Module, config: Config, world: World) -> None:
    """Give a module its trainer and its hooks, for a stage without an end of its own.

    Raises:
        ConfigError: if it does what cannot be done here.
    """
    task.bind(model, config, world, StopAt.of(config.training, 1, 1))


def begin(task: ModuleTask, model: nn.Module, world: World) -> None:
    """Begin a stage, once the model is on its device."""
    tell_device(model, world.device)
    task.hooks.trial = False


def predicted(task: ModuleTask, model: nn.Module, batch: Any, index: int) -> Any:
    """Return what `predict_step` gives for a batch."""
    step: Any = model.predict_step
    return step(batch, index) if task.takes_index["predict_step"] else step(batch)
