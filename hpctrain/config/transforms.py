"""Users' own transforms: from an import path and arguments to something that can be called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from hpctrain.config.importing import imported
from hpctrain.errors import ConfigError


def build_transform(key: str, reference: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a function with its arguments bound, or an object of a class made with them.

    Args:
        key: of the config that names it, such as "data.transform".
        reference: "package.module:Name".
        arguments: by name.

    Raises:
        ConfigError: if it cannot be imported, or refuses its arguments.
    """
    target = imported(reference)
    if not isinstance(target, type):
        return functools.partial(target, **arguments)
    try:
        built: object = target(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{key} = "{reference}" refuses its arguments: {error}') from error
    if not callable(built):
        raise ConfigError(
            f'{key} = "{reference}": its objects cannot be called; give the class a method __call__'
        )
    return built
