"""Modules, DataLoaders and DataModules that a script hands to fit, validate, test and predict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.errors import ConfigError
from hpctrain.lightning.keys import Keys
from hpctrain.training.components import Brought
from hpctrain.training.data.user_data import own_hook
from hpctrain.training.modules.overrides import uncompiled

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
    datamodule: Any = None,
    accumulated: int = 1,
    callbacks: Sequence[Any] = (),
) -> Handed:
    """Return the objects of a script as a job takes them to train.

    Args:
        model: to train.
        train: a DataLoader, or a data module in its place.
        validation: a DataLoader.
        datamodule: makes both.
        accumulated: batches of the loader that make a step.
        callbacks: that are called.

    Raises:
        ConfigError: if they are none of these, or two stand for the same.
    """
    require_module(model)
    model = uncompiled(model)
    train, datamodule = apart(train, datamodule)
    if datamodule is not None and validation is not None:
        raise ConfigError("data loaders and a datamodule were given: leave out one of them")
    loaders = {"train": served("train", train), "validation": served("validation", validation)}
    if datamodule is None and ModuleData.is_needed(model, loaders):
        datamodule, loaders = ModuleData(model, loaders), dict.fromkeys(loaders)
    if datamodule is None and loaders["train"] is None:
        raise ConfigError(
            "no data to train with: give fit a DataLoader or a datamodule, or the module a "
            "train_dataloader"
        )
    first = loaders["train"]
    return Handed(
        brought=Brought(
            model=model,
            datamodule=datamodule,
            callbacks=callbacks,
            accumulated=accumulated,
            **loaders,
        ),
        keys={"model.use": reference(model), **_arguments(model), **_named(datamodule, loaders)},
        batches=_num_batches(first),
    )


def hand_to_evaluate(
    stage: str, model: Any, loader: Any, datamodule: Any, callbacks: Sequence[Any]
) -> Handed:
    """Return the objects of a script as an evaluation takes them.

    Args:
        stage: "validate", "test" or "predict".
        model: the module.
        loader: a DataLoader, or a data module in its place.
        datamodule: makes it; where neither is given the module does.
        callbacks: that are called.

    Raises:
        ConfigError: if they are none of these, or two stand for the same.
    """
    require_module(model)
    model = uncompiled(model)
    loader, datamodule = apart(loader, datamodule)
    name = "validation" if stage == "validate" else stage
    given = served(name, loader)
    brought = Brought(model=model, datamodule=datamodule, callbacks=callbacks, **{name: given})
    source = next(each for each in (given, datamodule, model) if each is not None)
    keys = {"model.use": reference(model), "data.train": reference(source)}
    return Handed(brought=brought, keys=keys, batches=None)


def _num_batches(loader: Any) -> int | None:
    """Return how many batches a DataLoader has; None: it has none, or does not know."""
    try:
        return len(loader) if hasattr(loader, "batch_size") else None
    except TypeError:  # over a stream, which is refused with the way out where it is taken in
        return None


class ModuleData:
    """A module's own loaders, as a data module has them.

    What the module prepares and sets up comes before its loaders, as there; the job, which would
    call that later once more, finds it done.
    """

    of_module = True
    """That it is none of the user's."""

    def __init__(self, module: Any, loaders: Mapping[str, Any]) -> None:
        """Take the loaders that are given, and the module's own in place of others."""
        self._module = module
        for name, hook in _HOOKS.items():
            loader, own = loaders[name], own_hook(module, hook)
            if loader is not None:
                setattr(self, hook, lambda loader=loader: loader)
            elif own is not None:
                setattr(self, hook, own)

    @staticmethod
    def is_needed(module: Any, loaders: Mapping[str, Any]) -> bool:
        """Tell whether a module has loaders of its own in place of those that are not given."""
        return any(
            loaders[name] is None and own_hook(module, hook) is not None
            for name, hook in _HOOKS.items()
        )

    def prepare_data(self) -> None:
        """Have the module fetch what it needs."""
        self._once("prepare_data")

    def setup(self, stage: str) -> None:
        """Have the module make what it needs."""
        self._once("setup", stage)

    def _once(self, name: str, *arguments: Any) -> None:
        if (hook := own_hook(self._module, name)) is not None:
            hook(*arguments)
            self._module.__dict__[name] = _done

    def release(self) -> None:
        """Give the module its methods back."""
        for name in ("prepare_data", "setup"):
            if vars(self._module).get(name) is _done:
                del self._module.__dict__[name]


_HOOKS = {"train": "train_dataloader", "validation": "val_dataloader"}


def _done(*_: Any) -> None:
    """Stand for a method of a module that has been called."""


def tear_down(datamodule: Any, stage: str) -> None:
    """Have a data module put away what its `setup` has made."""
    if datamodule is not None and (hook := own_hook(datamodule, "teardown")) is not None:
        hook(stage)


def apart(loader: Any, datamodule: Any) -> tuple[Any, Any]:
    """Return a loader, and a data module, which may have been given in the loader's place.

    Raises:
        ConfigError: if both were given.
    """
    if loader is not None and datamodule is not None:
        raise ConfigError("data loaders and a datamodule were given: leave out one of them")
    return (None, loader) if is_datamodule(loader) else (loader, datamodule)


def is_datamodule(loader: Any) -> bool:
    """Tell whether an object makes data loaders, and is none."""
    return any(callable(getattr(loader, name, None)) for name in _METHODS)


def require_module(model: Any) -> None:
    """See that a model is a module.

    Raises:
        ConfigError: if it is none.
    """
    from torch import nn

    if isinstance(model, nn.Module) and callable(getattr(model, "training_step", None)):
        return
    raise ConfigError(
        f"model: {type(model).__name__} is not a module with a training_step: a LightningModule is "
        "one, and so is every torch.nn.Module that has the method"
    )


def served(name: str, loader: Any) -> Any:
    """Return the loader of a kind, or several of them as they were given; None: there is none."""
    if isinstance(loader, Mapping | list | tuple) and not loader:
        return None
    if loader is None or hasattr(loader, "dataset") or hasattr(loader, "__getitem__"):
        return loader
    if hasattr(
        loader, "flattened"
    ):  # Lightning's CombinedLoader; the job says what it serves of it
        return loader
    raise ConfigError(
        f"{name} data: {type(loader).__name__} is no DataLoader over a dataset with a length; what "
        "can only be iterated is packed once, `python -m hpctrain data pack dataset=my:make FOLDER`"
    )


def _named(datamodule: Any, loaders: Mapping[str, Any]) -> Keys:
    """Return the names of what the data come from, for the record in config.toml."""
    if datamodule is not None:
        return {"data.use": reference(datamodule)}
    return {
        f"data.{name}": reference(getattr(loaders[name], "dataset", loaders[name]))
        for name in ("train", "validation")
        if loaders[name] is not None
    }


def reference(thing: Any) -> str:
    """Return the import path of an object's class; of one of the script itself: `__main__:Name`."""
    kind = type(thing)
    return f"{kind.__module__}:{kind.__name__}"


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
