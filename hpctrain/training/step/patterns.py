"""Modules that the config names by patterns."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from torch import nn

from hpctrain.errors import ConfigError
from hpctrain.utils.text import did_you_mean

_SHOWN = 4


def fitting_modules(modules: Mapping[str, nn.Module], pattern: str, key: str) -> list[str]:
    """Return the names of the modules that a pattern fits, in their order.

    Args:
        modules: of the model, by name.
        pattern: of names, with * and ?, or the name of a class.
        key: of the config, for the message.

    Raises:
        ConfigError: if it fits none.
    """
    found = [
        name
        for name, module in modules.items()
        if fnmatch.fnmatchcase(name, pattern) or type(module).__name__ == pattern
    ]
    if not found:
        known = [*modules, *{type(module).__name__ for module in modules.values()}]
        raise ConfigError(
            f'{key} = "{pattern}": fits no module of the model and none of their '
            f"classes{did_you_mean(pattern, known, quote=chr(34))} (names are such as "
            f"{', '.join(list(modules)[:_SHOWN])})"
        )
    return found
