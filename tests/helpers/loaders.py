"""Loaders as tests make them: of one rank, on the CPU, where nothing else is said."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.evaluation_loader import EvaluationLoader
from hpctrain.data.loading.loader import LoaderOptions, TrainLoader
from hpctrain.data.order.order import Order

_OPTIONS = {each.name for each in dataclasses.fields(LoaderOptions)}


def train_loader(dataset: Dataset, order: Order, **changes: Any) -> TrainLoader:
    """Return a loader of whole epochs; `changes` are its arguments and those of its options."""
    options, rest = _split(changes)
    return TrainLoader(dataset, order, options, **({"drop_last": False} | rest))


def evaluation_loader(dataset: Dataset, **changes: Any) -> EvaluationLoader:
    """Return a loader of an evaluation; `changes` are its arguments and those of its options."""
    options, rest = _split(changes)
    return EvaluationLoader(dataset, options, **rest)


def _split(changes: dict[str, Any]) -> tuple[LoaderOptions, dict[str, Any]]:
    """Return the options of a loader, and its other arguments."""
    options: dict[str, Any] = {"device": torch.device("cpu"), "buffer_mb": 64.0}
    options |= {name: value for name, value in changes.items() if name in _OPTIONS}
    others = {name: value for name, value in changes.items() if name not in _OPTIONS}
    return LoaderOptions(**options), {"rank": 0, "world_size": 1} | others
