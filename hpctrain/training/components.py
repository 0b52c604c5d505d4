"""The parts of a run that the config names: imported, their arguments checked, then built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hpctrain.config import Config
from hpctrain.config.importing import snapshot
from hpctrain.config.messages import Mistake
from hpctrain.config.registry import placed_error, resolve_all
from hpctrain.config.schema import OptimizerSection
from hpctrain.errors import ConfigError
from hpctrain.launch.process_group import loading
from hpctrain.observe.code import user_modules
from hpctrain.utils.text import listed

# What hpctrain itself passes, by section: not for the config to give.
_GIVEN = {
    "model": (),
    "task": ("inputs", "target"),
    "optimizer": ("params", "lr"),
    "scheduler": ("step", "total_steps"),
}


def resolve_components(
    config: Config, path: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, Callable[..., Any]]:
    """Import what the config names and check every argument against its signature.

    Args:
        config: what was loaded.
        path: the file that it was loaded from, so that mistakes are told with their lines.
        overrides: those that it was loaded with.

    Returns:
        The classes and functions, by section.

    Raises:
        ConfigError: with all mistakes of all components, or if code is not that of the snapshot.
    """
    # The user's packages, and by the first optimizer that is made torch._dynamo: 330,000 objects.
    with loading():
        components = resolve_all(config, given=_given, path=path, overrides=overrides)
        mistake = _refused(config.optimizer, components["optimizer"])
    if mistake:
        raise placed_error([mistake], path, overrides)
    _refuse_live_code()
    return components


def _refused(section: OptimizerSection, target: Callable[..., Any]) -> Mistake | None:
    """Return the first argument that an optimizer refuses, found by leaving out one at a time.

    A signature tells names only: that betas are two numbers, and below 1, the class says itself.
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
    """See to it that a job with a snapshot of the code runs that and nothing else.

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
