"""`trainer.validate`, `test` and `predict` of a script: a module without a run and its folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from hpctrain.config import Config
from hpctrain.config.limits import limited
from hpctrain.data.loading.batch import map_tensors
from hpctrain.data.loading.map_style.dataset import Intake
from hpctrain.data.loading.map_style.loaders import MapEvaluationLoader
from hpctrain.data.order.batches import EvaluationShare, RankShare
from hpctrain.errors import ConfigError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.build import finish_model
from hpctrain.training.components import Brought
from hpctrain.training.data.user_data import (
    all_taken,
    own_hook,
    served,
    set_up,
)
from hpctrain.training.evaluation import Turn, evaluate, gather_at_rank_zero
from hpctrain.training.inference.stage import (
    STEPS,
    Stage,
    begin,
    bind,
    for_forward_passes,
    missing_step,
    on_host,
    predicted,
    predicting,
)
from hpctrain.training.inference.weights import choose_checkpoint
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.undisturbed import evaluating, seed_generators
from hpctrain.training.model.wrappers import load_checked
from hpctrain.training.modules.callbacks import with_those_of_module
from hpctrain.training.modules.data_trainer import introduce
from hpctrain.training.modules.hooks import check_loaders
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.prepare_data import prepare_data
from hpctrain.training.task.runner import TaskRunner

ANY = ""
"""The best weights of a run where it keeps some, else its last."""

_LOADERS = {
    "validate": ("validation", "val_dataloader"),
    "test": ("test", "test_dataloader"),
    "predict": ("predict", "predict_dataloader"),
}
"""What a stage takes of what was brought: name, and hook of a data module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """A module on its device, and the samples of this rank."""

    model: nn.Module
    task: ModuleTask
    number_format: NumberFormat
    loaders: Sequence[MapEvaluationLoader]


def module_metrics(
    config: Config,
    world: World,
    brought: Brought,
    stage: Literal["validate", "test"],
    *,
    weights: str | None = None,
    limit: float | None = None,
) -> list[dict[str, float]]:
    """Return what a module logs over each loader, every sample once. Collective: all ranks.

    Args:
        config: of the job; of its run where the weights of one are wanted.
        world: the ranks.
        brought: the module, and a loader or a data module.
        stage: whose step and hooks are called.
        weights: "best", "last", a path, or ANY of the run; None: the module as it is.
        limit: so many batches, or such a part of them; None: all.

    Raises:
        HpctrainError: on every rank.
    """
    with _ready(config, world, brought, stage, weights, limit) as ready:
        evaluate(
            TaskRunner(ready.model, ready.task, ready.number_format),
            [Turn.of(each) for each in ready.loaders],
            world,
            stage=stage,
        )
        return [ready.task.logs.full(stage, each) for each in ready.task.of_loaders]


def module_predictions(
    config: Config,
    world: World,
    brought: Brought,
    *,
    weights: str | None = None,
    limit: float | None = None,
) -> list[Any] | None:
    """Return what `predict_step` gives for every batch, in the dataset's order, on rank 0.

    The batches are those of the loader, at any number of ranks; None on the other ranks. Of
    several loaders it is a list for each.

    Collective: all ranks.

    Args:
        config: of the job; of its run where the weights of one are wanted.
        world: the ranks.
        brought: the module, and a loader or a data module.
        weights: "best", "last", a path, or ANY of the run; None: the module as it is.
        limit: so many batches, or such a part of them; None: all.

    Raises:
        HpctrainError: on every rank.
    """
    with _ready(config, world, brought, "predict", weights, limit) as ready:
        mine = _predicted(ready, world)
    everyone = gather_at_rank_zero(mine, world)
    if everyone is None:
        return None
    found = [
        [batch for part in of_ranks for batch in part] for of_ranks in zip(*everyone, strict=True)
    ]
    return found[0] if len(found) == 1 else found


def _predicted(ready: _Ready, world: World) -> list[list[Any]]:
    """Return what this rank predicts, a list for each loader."""
    task = ready.task
    found: list[list[Any]] = [[] for _ in ready.loaders]
    with (
        torch.no_grad(),
        evaluating(ready.model.modules()),
        ready.number_format.arithmetic(),
        predicting(task, loaders=len(ready.loaders)),
    ):
        for number, loader in enumerate(ready.loaders):
            task.begin_loader(number)
            # The number of a batch is that in its loader, whichever rank predicts it.
            first = loader.first_batch
            for index, share in enumerate(loader, first):
                world.pulse.tick()
                fields = ready.number_format.cast(share.fields, task.inputs)
                rows = loader.rows_of(index - first).tolist()
                output = predicted(task, ready.model, fields, index, rows)
                found[number].append(map_tensors(on_host, output))
                task.trainer.predict_loop.keep(number, found[number][-1])
    return found


@contextmanager
def _ready(
    config: Config,
    world: World,
    brought: Brought,
    stage: Stage,
    weights: str | None,
    limit: float | None,
) -> Iterator[_Ready]:
    """Make a module and its data ready. Collective: all ranks."""
    model = brought.model
    assert model is not None
    seed_generators(config.run.seed)
    config = for_forward_passes(config)
    task = ModuleTask()
    with raise_together(world.communicator):
        _require_step(model, stage)
        bind(task, model, config, world, stage)
        task.hooks.set_callbacks(with_those_of_module(brought.callbacks, model))
        introduce(brought.datamodule, task.trainer, is_bound=True)
    owners = [owner for owner in (brought.datamodule, model) if owner is not None]
    prepare_data(owners, world, seconds=config.launch.prepare_timeout_seconds)
    loaders = _loaders(config, world, brought, stage, task, limit)
    try:
        if weights is not None:
            chosen = choose_checkpoint(config, world, None if weights == ANY else weights)
            with raise_together(world.communicator):
                load_checked(model, chosen.tensors, chosen.source)
        with raise_together(world.communicator):
            made, number_format, _ = finish_model(model, config, world)
        begin(task, made, world)
        yield _Ready(model=made, task=task, number_format=number_format, loaders=loaders)
        task.end(stage)
    finally:
        for loader in loaders:
            loader.close()


def _require_step(model: nn.Module, stage: Stage) -> None:
    if (step := missing_step(model, stage)) is not None:
        raise ConfigError(f"{type(model).__name__} has no {step}, which trainer.{stage} would call")


def _loaders(
    config: Config,
    world: World,
    brought: Brought,
    stage: Stage,
    task: ModuleTask,
    limit: float | None,
) -> list[MapEvaluationLoader]:
    """Return what serves each rank whole batches of the user's loaders. Collective: all ranks."""
    name, hook = _LOADERS[stage]
    with raise_together(world.communicator):
        task.know(brought)
        if brought.datamodule is not None:
            set_up(brought.datamodule, stage)
        task.set_up(stage)
        given = getattr(brought, name)
        make = own_hook(brought.datamodule or brought.model, hook)
        if given is None and make is not None:
            given = make()
        if given is None:
            raise ConfigError(f"trainer.{stage}: no loader was given, and there is no {hook}")
        intakes = all_taken(given, name, config)
        task.trainer.know_loaders({name: given})
        check_loaders(task.module, STEPS[stage], len(intakes))
    return [_loader(each, config, world, limit) for each in intakes]


def _loader(
    intake: Intake, config: Config, world: World, limit: float | None
) -> MapEvaluationLoader:
    """Return what serves each rank whole batches of a loader. Collective: all ranks."""
    size = intake.batch_size or 1
    ready = served(intake, config, world)
    batches = limited(-(-ready.dataset.samples // size), limit)
    ranks = RankShare(world.topology.rank, world.topology.world_size)
    first, stop = ranks.bounds(batches)
    samples = min(batches * size, ready.dataset.samples)
    share = EvaluationShare(
        batch_size=size,
        ranks=ranks,
        seed=config.run.seed,
        samples=samples,
        rows=np.arange(first * size, min(stop * size, samples), dtype=np.int64),
    )
    return MapEvaluationLoader(ready.dataset, share, ready.reader)
