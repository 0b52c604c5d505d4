"""What the config wants done to batches on the device: `[data.normalize]` and `data.transform`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hpctrain.config import Config
from hpctrain.config.components import resolve_transform
from hpctrain.config.normalizing import Normalization, normalization_of
from hpctrain.config.transforms import build_transform
from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.finding.view import View
from hpctrain.data.loading.finishing import Finishing, Scale, Transform
from hpctrain.data.tools.statistics import STATS_NAME, read_stats
from hpctrain.errors import ConfigError

logger = logging.getLogger("hpctrain")


def find_normalizations(config: Config, train: Dataset) -> dict[str, Normalization]:
    """Return the numbers of every field to normalise. Reads a file: for one rank to do.

    Raises:
        DatasetError: if there are no statistics of the training data where they are wanted.
        ConfigError: if they cannot be those of samples.
    """
    said = {name: normalization_of(given) for name, given in config.data.normalize.items()}
    return {
        name: _measured(name, _stats(name, train, each), each) if isinstance(each, str) else each
        for name, each in said.items()
    }


def _stats(name: str, train: Dataset, word: str) -> Mapping[str, Any]:
    """Return the statistics of a field as it is stored, all rows of it."""
    if isinstance(train, View):
        column = train.columns[name]
        part = train.parts[column.part]
        if word == "channel_stats" and (column.steps is not None or part.axis):
            raise ConfigError(
                f'data.normalize.{name} = "channel_stats": the first axis of a sample is no axis '
                f"of the rows that `data stats` has seen, by data.fields.{name}: give mean and std "
                'as lists, or take "stats"'
            )
        name, train = column.name, part.dataset
    path = Path(train.shards[0].path).parent / STATS_NAME
    found: Mapping[str, Any] = read_stats(path, train, [name])[name]
    return found


def _measured(name: str, facts: Mapping[str, Any], word: str) -> Normalization:
    of_channels = word == "channel_stats"
    mean, std = (facts["channels"][key] if of_channels else [facts[key]] for key in ("mean", "std"))
    constant = sum(each == 0 for each in std)
    if constant:
        logger.warning(
            'data.normalize: field "%s" has the same value everywhere%s; it becomes 0',
            name,
            f" in {constant} of {len(std)} channels" if of_channels else "",
        )
    normalization = Normalization(tuple(mean), tuple(each or 1.0 for each in std))
    if len(mean) == 1:
        logger.info("data.normalize.%s: mean %.6g, std %.6g", name, mean[0], std[0])
    else:
        logger.info("data.normalize.%s: mean and std of %d channels", name, len(mean))
    return normalization


def build_finishing(
    config: Config,
    fields: Mapping[str, Field],
    needed: Sequence[str],
    normalizations: Mapping[str, Normalization],
    device: torch.device,
) -> Finishing:
    """Return what is done to every batch, in training and evaluation alike.

    Args:
        config: names the transform.
        fields: as they come to the device.
        needed: those that the task sees.
        normalizations: by field.
        device: where the batches are.

    Raises:
        ConfigError: if the numbers do not fit the fields, or the transform its arguments.
    """
    dtype = torch.float64 if config.training.precision == "64-true" else torch.float32
    scales = {
        name: Scale.of(fields, name, each.mean, each.std, device, dtype)
        for name, each in normalizations.items()
    }
    return Finishing(scales, _transform(config), tuple(needed))


def _transform(config: Config) -> Transform | None:
    section = config.data
    if section.transform is None:
        return None
    resolve_transform(config, "transform")
    return build_transform("data.transform", section.transform, section.transform_arguments)
