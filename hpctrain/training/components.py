"""Components: what the config names, imported and checked, or objects that a script brings along.

An object stands in place of what the config names. The config says all else, and its dataclass and
checks are the same, whether a job is made of names or of objects.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hpctrain.config import Config
from hpctrain.config.importing import snapshot
from hpctrain.config.messages import Mistake
from hpctrain.config.registry import OWN, placed_error, resolve_all, resolve_listed
from hpctrain.config.schema import OptimizerSection
from hpctrain.errors import ConfigError
from hpctrain.launch.process_group import loading
from hpctrain.observe.code import user_modules
from hpctrain.training.compiler import leave_out_compiler
from hpctrain.utils.text import listed

Prune = Callable[[int, Mapping[str, float]], object]
"""From the step and the metrics of an evaluation to whether the run ends there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """What a job is given ready-made, the same on all ranks; without any, the config names all.

    Attributes:
        model: to train; never copied: it is the caller's own that is trained.
        train: a torch Dataset or DataLoader to train with.
        validation: the same, for evaluation while training; several in a collection.
        evaluations: the same, further ones by name.
        test: the same, for `test`; several in a collection.
        predict: the same, for `predict`; several in a collection.
        datamodule: makes those four.
        callbacks: objects with the hook names of a Lightning Callback.
        accumulated: batches of a DataLoader that make a step.
        loggers: objects that are handed every line of metrics, on rank 0.
        shown_loggers: what a module finds as its loggers; None among them: the run's own.
        notes: lines for the header.
        given: loaders as the user has made them, by what they are for; known once they are asked.
        prune: is asked on rank 0 behind each evaluation, with the step and the metrics, whether the
            run is to end there.
    """

    model: nn.Module | None = None
    train: Any = None
    validation: Any = None
    evaluations: Mapping[str, Any] = field(default_factory=dict)
    test: Any = None
    predict: Any = None
    datamodule: Any = None
    callbacks: Sequence[Any] = ()
    accumulated: int = 1
    loggers: Sequence[Any] = ()
    shown_loggers: Sequence[Any] = (None,)
    notes: Sequence[str] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    prune: Prune | None = None

    @property
    def sections(self) -> frozenset[str]:
        """The sections of a config whose `use` is not looked at."""
        return frozenset() if self.model is None else frozenset({"model"})


NOTHING = Brought()
"""A job that is made of names alone."""


Components = Mapping[str, Callable[..., Any]]


# What hpctrain itself passes, by section: not for the config to give.
_GIVEN = {
    "model": (),
    "task": ("inputs", "target"),
    "optimizer": ("params", "lr"),
    "scheduler": ("step", "total_steps"),
}


def resolve_components(
    config: Config,
    path: str | None = None,
    overrides: Sequence[str] = (),
    *,
    given: Collection[str] = (),
) -> dict[str, Callable[..., Any]]:
    """Import what the config names and check every argument against its signature.

    Args:
        config: what was loaded.
        path: the file that it was loaded from, so that mistakes are reported with their lines.
        overrides: those that it was loaded with.
        given: sections in whose place there are objects.

    Returns:
        The classes and functions, by section.

    Raises:
        ConfigError: with all mistakes of all components, or if code is not that of the snapshot.
    """
    leave_out_compiler()
    # The user's packages.
    without = {*given, *(["optimizer"] if config.optimizer.use == OWN else [])}
    with loading():
        components = resolve_all(
            config, given=_given, path=path, overrides=overrides, without=without
        )
        for section in ("callbacks", "trackers"):
            resolve_listed(config, section, path=path, overrides=overrides)
        mistake = _refused(config.optimizer, components.get("optimizer"))
    if mistake:
        raise placed_error([mistake], path, overrides)
    _refuse_live_code()
    return components


def _refused(section: OptimizerSection, target: Callable[..., Any] | None) -> Mistake | None:
    """Return the first argument that an optimizer refuses, found by leaving out one at a time.

    A signature has names only: that betas are two numbers, and below 1, the class says itself.
    """
    if not inspect.isclass(target) or not issubclass(target, Optimizer):
        return None
    arguments: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in section.arguments.items()
    }

    make: Callable[..., Any] = target

    def error_without(left_out: str | None) -> Exception | None:
        given = {name: value for name, value in arguments.items() if name != left_out}
        try:
            make([nn.Parameter(torch.zeros(2, 2))], lr=section.lr, **given)
        except (TypeError, ValueError, RuntimeError) as error:
            return error
        return None

    error = error_without(None)
    if error is None:
        return None
    for name in arguments:
        if error_without(name) is None:
            default = inspect.signature(target).parameters.get(name)
            usual = "" if default is None else f"; its default is {default.default!r}"
            problem = f"{section.use} refuses it: {error}{usual}"
            return Mistake(key=("optimizer", name), problem=problem, value=section.arguments[name])
    return None  # it is not a single argument: building it will tell


def _refuse_live_code() -> None:
    """Check that a job with a snapshot of the code runs that and nothing else.

    Raises:
        ConfigError: if a module of the project has come from the project itself.
    """
    if (taken := snapshot()) is None:
        return
    root, project = taken
    live = [
        str(path)
        for path in user_modules().values()
        if path.is_relative_to(project) and not path.is_relative_to(root)
    ]
    if live:
        raise ConfigError(
            f"--code {root}: {listed(live)} came from {project}, not from this snapshot of it: "
            "they are not in it, or installed from that folder in a way that Python's path does "
            "not show. Have git know them, or leave job --snapshot out"
        )


def _given(section: str, target: Callable[..., Any]) -> Collection[str]:
    # A schedule that is a class is built with its arguments, and its objects are called.
    return () if section == "scheduler" and inspect.isclass(target) else _GIVEN[section]
