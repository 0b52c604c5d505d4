"""The config that a job like a run of a loop would have; it is saved with the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hpctrain.config import Config
from hpctrain.config.schema import (
    CheckpointSection,
    ComponentSection,
    LoggingSection,
    OptimizerSection,
    RunSection,
    TaskSection,
)
from hpctrain.config.schema_data import DataSection
from hpctrain.errors import ConfigError
from hpctrain.training.loops.loader import DEFAULT_SEED, Loader, use_of
from hpctrain.training.loops.step import LoopStep
from hpctrain.training.loops.world import World
from hpctrain.utils.json_files import checked


def sections(
    *, log_steps: int, progress: str, **checkpoint: Any
) -> tuple[CheckpointSection, LoggingSection]:
    """Return what is saved and reported, as a config would say it.

    Raises:
        ConfigError: if a number is out of its range, or a word is none.
    """
    try:
        return (
            checked(checkpoint, CheckpointSection),
            checked({"every_steps": log_steps, "progress": progress}, LoggingSection),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"world.run: {error}", everywhere=True) from error


def named_models(models: Any) -> dict[str, nn.Module]:
    """Return the models of a run by the names that their parameters have in a checkpoint."""
    if isinstance(models, nn.Module):
        return {"": models}
    if isinstance(models, Mapping):
        named = dict(models)
    elif isinstance(models, list | tuple):
        kinds = [type(model).__name__ for model in models]
        names = kinds if len(set(kinds)) == len(kinds) else [f"{k}{i}" for i, k in enumerate(kinds)]
        named = dict(zip(names, models, strict=True))
    else:
        named = {}
    if not named or not all(isinstance(model, nn.Module) for model in named.values()):
        raise ConfigError(
            "world.run takes a model, a list of them, or a dict by name, as world.setup has "
            "returned them"
        )
    if wrong := [name for name in named if not name.isidentifier()]:
        raise ConfigError(f"world.run: {wrong[0]!r} is no name for a model: letters, digits and _")
    return named


def config_of(
    world: World,
    folder: Path,
    models: Mapping[str, nn.Module],
    step: LoopStep,
    loader: Loader | None,
    *,
    epochs: int | None,
    steps: int | None,
    checkpoint: CheckpointSection,
    logging_section: LoggingSection,
    max_seconds: float | None,
) -> Config:
    """Return the config that a job like this run would have; it is saved with the run.

    Raises:
        ConfigError: if the run has no end, or no folder.
    """
    if loader is not None and not loader.training:
        raise ConfigError("world.run: the loader is for evaluation: give one to train with")
    if loader is None and steps is None:
        raise ConfigError("world.run without a loader has no epochs: give steps=")
    for name, value in (("epochs", epochs), ("steps", steps)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ConfigError(f"world.run: {name}={value!r}: expected a whole number from 1")
    if epochs is None and steps is None:
        raise ConfigError("world.run: how long? Give epochs= or steps=")
    if loader is None and epochs is not None:
        raise ConfigError("world.run without a loader has no epochs: give steps= alone")
    if not folder.name:
        raise ConfigError(f"world.run: {str(folder)!r} is no folder of a run")
    section = next(
        setup.section
        for setup in world.setups.all
        if any(model is one for model in setup.models for one in models.values())
    )
    groups = step.optimizer.param_groups
    lr = float(groups[0]["lr"])
    common: dict[str, Any] = {
        "training": replace(section, max_epochs=epochs, max_steps=steps),
        "run": RunSection(
            name=folder.name,
            directory=str(folder.parent),
            seed=DEFAULT_SEED if world.seed is None else world.seed,
            max_seconds=max_seconds,
        ),
        "model": ComponentSection(use=" and ".join(use_of(model) for model in models.values())),
        "optimizer": OptimizerSection(
            use=" and ".join(use_of(each.optimizer) for each in step.steppers),
            lr=lr if math.isfinite(lr) and lr > 0 else 1.0,
        ),
        "checkpoint": checkpoint,
        "logging": logging_section,
    }
    return _without_data(**common) if loader is None else loader.config(**common)


def _without_data(**sections: Any) -> Config:
    """Return the config of a run without data."""
    return Config(
        data=DataSection(train="none", global_batch_size=1),
        task=TaskSection(use="loop", inputs=("none",)),
        **sections,
    )
