"""The fields of a dataset, as a config has them: which the task sees, masks, normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpctrain.config.schema import Config
from hpctrain.utils.text import did_you_mean

STATISTICS = ("stats", "channel_stats")
"""Words for the numbers in `stats.json` of the training data: of a whole field, or a channel."""

EXPECTED = '"stats", "channel_stats", or a table with mean and std'

_KEYS = ("mean", "std")


def seen_fields(config: Config) -> list[str]:
    """Return the fields that the task has named, masks among its inputs included."""
    return list(dict.fromkeys([*config.task.inputs, *filter(None, [config.task.target])]))


def needed_fields(config: Config) -> list[str]:
    """Return the fields that have to be there when the task sees a batch."""
    mask = target_mask(config)
    return list(dict.fromkeys([*seen_fields(config), *filter(None, [mask])]))


def target_mask(config: Config) -> str | None:
    """Return the mask of what the loss compares the model's output with."""
    return masks(config).get(config.task.target or "")


def target_weight(config: Config) -> str | None:
    """Return the field of weights of what the loss compares the model's output with."""
    table = config.data.fields.get(config.task.target or "")
    return f"{config.task.target}.weight" if table is not None and table.weight else None


def static_fields(config: Config) -> frozenset[str]:
    """Return the fields that are one array for all samples."""
    return frozenset(name for name, table in config.data.fields.items() if table.static)


def masks(config: Config) -> dict[str, str]:
    """Return, by field, the mask that says where it has a value."""
    tables = config.data.fields
    return {name: table.mask for name, table in tables.items() if table.mask is not None}


def stored_fields(config: Config) -> list[str]:
    """Return the fields that are read from files."""
    made, static = made_fields(config), static_fields(config)
    seen = [made.get(name, name) for name in seen_fields(config) if name not in static]
    if not seen:
        return []
    tables = config.data.fields
    shifting = [tables[name].shift_by for name in seen if name in tables]
    return list(dict.fromkeys([*seen, *filter(None, shifting)]))


def made_fields(config: Config) -> dict[str, str]:
    """Return the fields that are made of others: of each, that which it is made of."""
    made: dict[str, str] = {}
    for name, table in config.data.fields.items():
        beside = (table.mask, table.sample, table.position)
        made |= dict.fromkeys(filter(None, beside), name)
        if table.batch == "concat":
            made[f"{name}.offsets"] = name
        if table.weight is not None:
            made[f"{name}.weight"] = name
    return made


def ragged_fields(config: Config) -> frozenset[str]:
    """Return the fields whose first axis in a batch is not that of the samples."""
    tables = config.data.fields
    concat = {name for name, table in tables.items() if table.batch == "concat"}
    beside = {f"{name}.offsets" for name in concat}
    return frozenset(concat | beside | {t.sample for t in tables.values() if t.sample})


def integer_fields(config: Config) -> frozenset[str]:
    """Return the fields that are used as integers, if the files hold such.

    That are classes and tokens. What is normalised, or an input of any other task, is used as
    numbers, between which there may be others.
    """
    tables = config.data.fields
    said = {
        name
        for name, table in tables.items()
        if table.decode == "integers" or table.classes is not None or table.missing is not None
    }
    meant = set(filter(None, [config.task.target]))
    if config.task.use == "language_modeling":
        meant |= set(config.task.inputs)
    return frozenset(said | (meant - set(config.data.normalize)))


@dataclass(frozen=True, slots=True)
class Normalization:
    """Values become (value - mean) / std.

    Attributes:
        mean: one number, or one a channel; the first axis of a sample is its channels.
        std: the same, above 0.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


def normalization_of(given: Any) -> Normalization | str:
    """Return what a field's entry says, a word of STATISTICS as it is; `problems_of` found none."""
    if isinstance(given, str):
        return given
    return Normalization(**{key: _numbers(value) for key, value in given.items()})


def problems_of(given: Any) -> dict[tuple[str, ...], str]:
    """Return what is wrong with a field's entry, by the key inside it; () is the entry itself."""
    if isinstance(given, str):
        near = did_you_mean(given, STATISTICS, quote='"')
        return {} if given in STATISTICS else {(): f"expected {EXPECTED}{near}"}
    if not isinstance(given, Mapping) or not given:
        return {(): f"expected {EXPECTED}"}
    problems: dict[tuple[str, ...], str] = {}
    for key, value in given.items():
        if key not in _KEYS:
            problems[key,] = f"unknown key{did_you_mean(key, _KEYS)}; there are mean and std"
        elif (problem := _problem(key, value)) is not None:
            problems[key,] = problem
    if not problems:
        lengths = {len(_numbers(value)) for value in given.values()} - {1}
        if len(lengths) > 1:
            problems["std",] = "mean and std are lists of different length"
    return problems


def _numbers(value: Any) -> tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(float(each) for each in values)


def _problem(key: str, value: Any) -> str | None:
    above = " above 0" if key == "std" else ""
    expected = f"expected a number{above}, or a list of them, one a channel"
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(each) in (int, float) for each in values):
        return expected
    if not all(math.isfinite(each) for each in values):
        return None  # reported already, of any number in the file
    return expected if key == "std" and min(values) <= 0 else None
