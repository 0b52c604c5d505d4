"""A job of a script: the config that its arguments come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpctrain.config import Config
from hpctrain.config.validate import from_table
from hpctrain.lightning.keys import Keys

_GIVEN = frozenset(
    {("model", "use"), ("data", "use"), ("data", "train"), ("data", "validation")},
)
"""Keys that name the classes of what a script brings as objects."""


def make_config(keys: Keys, overrides: Sequence[str]) -> Config:
    """Return the config that keys with a dot come to.

    Args:
        keys: of the config.
        overrides: over them, as on a command line.

    Raises:
        ConfigError: with every mistake, as of a config file.
    """
    table: dict[str, dict[str, Any]] = {}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        table.setdefault(section, {})[name] = value
    return from_table("Trainer", table, overrides, given=_GIVEN)
