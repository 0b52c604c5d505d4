"""Stages without training: how a module validates, tests and predicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from hpctrain.config import Config
from hpctrain.launch.process_group import World
from hpctrain.training.modules.overrides import is_own
from hpctrain.training.modules.stand_in import TrainerStandIn, note_device, trainer_of
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


def bind(task: ModuleTask, model: nn.Module, config: Config, world: World, stage: Stage) -> None:
    """Give a module its trainer and its hooks, for a stage without an end of its own.

    One that was trained in this process still knows its step and its epoch.

    Raises:
        ConfigError: if it does what cannot be done here.
    """
    before = trainer_of(model)
    task.bind(model, config, world, StopAt.of(config.training, 1, 1))
    task.trainer.state.begin(stage)
    if isinstance(before, TrainerStandIn):
        trainer = task.trainer
        trainer.global_step, trainer.current_epoch = before.global_step, before.current_epoch


def begin(task: ModuleTask, model: nn.Module, world: World) -> None:
    """Begin a stage, once the model is on its device."""
    note_device(model, world.device)
    task.hooks.trial = False


def on_host(tensor: Tensor) -> Tensor:
    """Return a tensor of its own, without a graph."""
    return tensor.detach().cpu()


@contextmanager
def predicting(task: ModuleTask, *, loaders: int = 1) -> Iterator[None]:
    """Have a module predict in the body, with the hooks at the beginning and at the end."""
    hooks = task.hooks
    task.begin_predictions(loaders)
    for name in ("model_eval", "start", "epoch_start"):
        hooks.call(f"on_predict_{name}")
    yield
    task.logs.loader = None
    for name in ("epoch_end", "end"):
        hooks.call(f"on_predict_{name}")


def predicted(
    task: ModuleTask, model: nn.Module, fields: Any, index: int, rows: Sequence[int]
) -> Any:
    """Return what `predict_step` gives for a batch, between its hooks.

    Args:
        task: of the module.
        model: the module.
        fields: of the batch, cast.
        index: of the batch.
        rows: of the dataset, that the batch is made of.
    """
    hooks, loader = task.hooks, task.loader_arguments
    batch = task.batch(fields)
    task.trainer.predict_loop.begin_batch(rows, task.logs.loader or 0)
    hooks.call("on_predict_batch_start", batch, index, *loader)
    output = predict_step(task, model, batch, index)
    hooks.call("on_predict_batch_end", output, batch, index, *loader)
    return output


def predict_step(task: ModuleTask, model: nn.Module, batch: Any, index: int) -> Any:
    """Return what `predict_step` gives for a batch, without hooks."""
    predict: Any = model.predict_step
    numbers = (index,) if task.takes_index["predict_step"] else ()
    return predict(batch, *numbers, *task.loader_arguments)
