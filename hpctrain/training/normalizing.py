"""The numbers that fields are normalised by: measured once, and a run's own for its life."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpctrain.config import Config
from hpctrain.config.fields import Normalization, normalization_of
from hpctrain.data.dataset import Dataset
from hpctrain.data.decoding import decoding_record
from hpctrain.data.stats import STATS_NAME, read_stats
from hpctrain.data.view import View
from hpctrain.errors import ConfigError

logger = logging.getLogger("hpctrain")

RECORD = "normalization"
"""Name of the numbers in use among the values of a checkpoint."""


def normalizations_to_record(
    config: Config, normalizations: Mapping[str, Normalization]
) -> dict[str, Any]:
    """Return what a checkpoint says of the numbers in use, and of what they were taken from."""
    return {
        name: {
            "given": config.data.normalize[name],
            "mean": list(each.mean),
            "std": list(each.std),
        }
        for name, each in normalizations.items()
    }


def normalizations_begun_with(config: Config, saved: Mapping[str, Any]) -> dict[str, Normalization]:
    """Return the numbers that a run began with, of fields of which the config says the same still.

    Of statistics that were measured anew since, a run that has begun takes no note.
    """
    return {
        name: Normalization(tuple(then["mean"]), tuple(then["std"]))
        for name, then in saved.get(RECORD, {}).items()
        if config.data.normalize.get(name) == then["given"]
    }


def find_normalizations(
    config: Config, train: Dataset, begun: Mapping[str, Normalization]
) -> dict[str, Normalization]:
    """Return the numbers of every field to normalise. Reads a file: for one rank to do.

    Args:
        config: says where they come from.
        train: to train with.
        begun: the numbers of fields that the run has begun with.

    Raises:
        DatasetError: if there are no statistics of the training data where they are wanted.
        ConfigError: if they cannot be those of samples.
    """
    said = {name: normalization_of(given) for name, given in config.data.normalize.items()}
    return {
        name: begun[name]
        if name in begun
        else _measured(name, _stats(name, train, each), each)
        if isinstance(each, str)
        else each
        for name, each in said.items()
    }


def _stats(name: str, train: Dataset, word: str) -> Mapping[str, Any]:
    """Return the statistics of a field, of all rows that are stored."""
    record = decoding_record(train, name)
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
    found: Mapping[str, Any] = read_stats(path, train, [name], {name: record})[name]
    return found


def _measured(name: str, facts: Mapping[str, Any], word: str) -> Normalization:
    of_channels = word == "channel_stats"
    mean, std = (facts["channels"][key] if of_channels else [facts[key]] for key in ("mean", "std"))
    # A channel without a single value is all NaN, or all fill, whatever it is normalised by.
    mean = [each or 0.0 for each in mean]
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
