"""Loaders as tests make them: of one rank, on the CPU, where nothing else is said."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.evaluation_loader import EvaluationLoader
from hpctrain.data.loading.loader import LoaderOptions, TrainLoader
from hpctrain.data.loading.preprocessing import Preprocessing
from hpctrain.data.order.batches import (
    NONE_BEGUN,
    Batching,
    Epochs,
    EvaluationShare,
    RankShare,
)
from hpctrain.data.order.order import Order


def train_loader(dataset: Dataset, order: Order, **changes: Any) -> TrainLoader:
    """Return a loader of whole epochs; `changes` are its arguments and those of its options."""
    options, preprocessing, ranks = _common(changes)
    epochs = Epochs(
        order,
        dataset.source,
        _taken(Batching, changes),
        ranks,
        begun=changes.pop("begun", NONE_BEGUN),
        draw=changes.pop("draw", None),
    )
    return TrainLoader(dataset, epochs, options, preprocessing=preprocessing, **changes)


def evaluation_loader(dataset: Dataset, **changes: Any) -> EvaluationLoader:
    """Return a loader of an evaluation; `changes` are its arguments and those of its options."""
    options, preprocessing, ranks = _common(changes)
    share = _taken(EvaluationShare, changes, ranks=ranks)
    return EvaluationLoader(dataset, share, options, preprocessing=preprocessing, **changes)


def _common(changes: dict[str, Any]) -> tuple[LoaderOptions, Preprocessing, RankShare]:
    """Return what all loaders take, out of the changes."""
    return (
        _taken(LoaderOptions, changes, device=torch.device("cpu"), buffer_mb=64.0),
        _taken(Preprocessing, changes),
        _taken(RankShare, changes),
    )


def _taken(made: type[Any], changes: dict[str, Any], **default: Any) -> Any:
    """Return one of the option objects, made of those changes that are fields of it."""
    names = {each.name for each in dataclasses.fields(made)} & set(changes)
    return made(**(default | {name: changes.pop(name) for name in names}))
