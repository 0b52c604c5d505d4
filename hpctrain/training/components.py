"""The parts of a run that the config names: imported, their arguments checked, then built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from hpctrain.config import Config
from hpctrain.config.components import resolve_all

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
        ConfigError: with all mistakes of all components.
    """
    return resolve_all(config, given=_given, path=path, overrides=overrides)


def _given(section: str, target: Callable[..., Any]) -> Collection[str]:
    # A schedule that is a class is built with its arguments, and its objects are called.
    return () if section == "scheduler" and inspect.isclass(target) else _GIVEN[section]
