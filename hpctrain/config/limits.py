"""How much of the data a run takes: whole epochs, or so many batches of them, for trials."""

from __future__ import annotations

import dataclasses

from hpctrain.config.schema import Config, EarlyStoppingSection, TrainingSection
from hpctrain.config.schema_data import DataSection

FAST_DEV_RUN = "fast-dev-run"
"""What the name of such a run ends with: it never meets the run that it is a trial of."""


def limited(batches: int, limit: float | None) -> int:
    """Return how many batches are served: `limit` of them, a whole number or a part; None: all.

    A part of few batches is at least one.
    """
    if limit is None:
        return batches
    if isinstance(limit, int):
        return min(batches, limit)
    return max(1, int(batches * limit))


def train_limit(section: TrainingSection) -> float | None:
    """Return how many batches of an epoch to train with, or which part; None: all."""
    return section.overfit_batches or section.limit_train_batches


def validation_limit(section: TrainingSection) -> float | None:
    """Return how many batches to evaluate with, or which part; None: all."""
    return section.overfit_batches or section.limit_validation_batches


def is_shuffled(data: DataSection, training: TrainingSection) -> bool:
    """Tell whether every epoch has an order of its own."""
    return data.shuffle and not training.overfit_batches


def fast_dev_run(config: Config) -> Config:
    """Return the config of a trial of a few steps and evaluation batches, if it asks for one."""
    steps = int(config.training.fast_dev_run)
    if not steps:
        return config
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name=f"{config.run.name}-{FAST_DEV_RUN}"),
        training=dataclasses.replace(
            config.training,
            max_epochs=None,
            max_samples=None,
            max_steps=steps,
            limit_train_batches=None,
            limit_validation_batches=steps,
        ),
        early_stopping=EarlyStoppingSection(),
        checkpoint=dataclasses.replace(config.checkpoint, resume="never"),
        logging=dataclasses.replace(config.logging, every_steps=1),
    )
