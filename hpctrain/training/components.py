"""The parts of a run that the config names: imported, their arguments checked, then built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from hpctrain.config import Config
from hpctrain.config.code_folder import snapshot
from hpctrain.config.components import resolve_all
from hpctrain.errors import ConfigError
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
    components = resolve_all(config, given=_given, path=path, overrides=overrides)
    _refuse_live_code()
    return components


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
