"""What a script hands to fit, validate, test and predict: modules, loaders, data modules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpctrain.errors import ConfigError
from hpctrain.lightning.keys import Keys
from hpctrain.training.brought import Brought

_METHODS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """Objects of a script, and what they say of the config.

    Attributes:
        brought: the objects.
        keys: of the config.
        batches: of an epoch; None: not known before the data are asked for.
    """

    brought: Brought
    keys: Keys
    batches: int | None


def hand(
    model: Any,
    *,
    train: Any = None,
    validation: Any = None,
    test: Any = None,
    predict: Any = None,
    datamodule: Any = None,
    accumulated: int = 1,
    callbacks: Any = (),
) -> Handed:
    """Return the objects of a script as a job takes them.

    Args:
        model: to train.
        train: a DataLoader, or a data module in its place.
        validation: a DataLoader, or several.
        test: the same.
        predict: the same.
        datamodule: makes the four.
        accumulated: batches of the loader that make a step.
        callbacks: that are called.

    Raises:
        ConfigError: if they are none of these, or two stand for the same.
    """
    _require_module(model)
    loaders = {"train": train, "validation": validation, "test": test, "predict": predict}
    for name, loader in loaders.items():
        if is_datamodule(loader):
            if datamodule is not None:
                raise ConfigError(
                    f"a data module was given twice, as {name} data and as datamodule"
                )
            datamodule, loaders[name] = loader, None
    if datamodule is not None and any(loader is not None for loader in loaders.values()):
        raise ConfigError("data loaders and a datamodule were given: leave out one of them")
    loaders = {name: _single(name, loader) for name, loader in loaders.items()}
    first = loaders["train"]
    return Handed(
        brought=Brought(
            model=model,
            datamodule=datamodule,
            callbacks=callbacks,
            **loaders,
        ),
        keys={"model.use": _reference(model), **_arguments(model), **_batch(first, accumulated)},
        batches=None if first is None else len(first),
    )


def is_datamodule(loader: Any) -> bool:
    """Tell whether an object makes data loaders, and is none."""
    return any(callable(getattr(loader, name, None)) for name in _METHODS)


def _require_module(model: Any) -> None:
    from torch import nn

    if isinstance(model, nn.Module) and callable(getattr(model, "training_step", None)):
        return
    raise ConfigError(
        f"model: {type(model).__name__} is not a module with a training_step: a LightningModule is "
        "one, and so is every torch.nn.Module that has the method"
    )


def _single(name: str, loader: Any) -> Any:
    """Return the one loader of a kind, None if there is none."""
    if isinstance(loader, list | tuple):
        if len(loader) > 1:
            raise ConfigError(
                f"{len(loader)} {name} data loaders: one is served; torch.utils.data.ConcatDataset "
                "joins datasets, and fit, validate and test may be called once each"
            )
        loader = loader[0] if loader else None
    has_rows = hasattr(loader, "dataset") or hasattr(loader, "__getitem__")
    if loader is None or (has_rows and not isinstance(loader, Mapping)):
        return loader
    raise ConfigError(
        f"{name} data: {type(loader).__name__} is no DataLoader over a dataset with a length; what "
        "can only be iterated is packed once, `python -m hpctrain data pack dataset=my:make FOLDER`"
    )


def _batch(loader: Any, accumulated: int) -> Keys:
    """Return the size of a step's global batch: that of the loader, as for one process."""
    size = getattr(loader, "batch_size", None)
    if size is None:
        return {}
    keys: Keys = {"data.global_batch_size": size * accumulated}
    if accumulated > 1:
        keys["data.micro_batch_size"] = size
    return keys


def _reference(model: Any) -> str:
    """Return the import path of a module's class; of one of the script itself: `__main__:Name`."""
    kind = type(model)
    return f"{kind.__module__}:{kind.__qualname__}"


def _arguments(model: Any) -> Keys:
    """Return the hyperparameters of a module that TOML can hold, for exports to come with them."""
    hparams = getattr(model, "hparams_initial", None) or {}
    name = getattr(model, "_hparams_name", None)
    plain = {str(key): value for key, value in dict(hparams).items() if _is_plain(value)}
    if not plain:
        return {}
    # `save_hyperparameters(config)` keeps one argument that is a dictionary, under its own name.
    return {"model.arguments": plain if name in (None, "kwargs") else {name: plain}}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return isinstance(value, str)
