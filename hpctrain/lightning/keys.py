"""Keys of a config by their names with a dot, and the config that they make."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

from hpctrain.config import Config
from hpctrain.config.validate import from_table
from hpctrain.errors import ConfigError

Keys = dict[str, Any]
"""Keys of the config with a dot, such as "training.precision", and their values."""

_DURATION = re.compile(r"(\d+):(\d\d):(\d\d):(\d\d)")


def seconds_of(name: str, value: Any) -> float:
    """Return the seconds of a "DD:HH:MM:SS", a timedelta, or a dict of its arguments.

    Raises:
        ConfigError: if it is none of these, or no time at all.
    """
    duration: datetime.timedelta | None = None
    if isinstance(value, str) and (found := _DURATION.fullmatch(value.strip())):
        days, hours, minutes, seconds = (int(part) for part in found.groups())
        duration = datetime.timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    elif isinstance(value, dict):
        try:
            duration = datetime.timedelta(**value)
        except TypeError:
            duration = None
    elif isinstance(value, datetime.timedelta):
        duration = value
    if duration is None or duration.total_seconds() <= 0:
        raise ConfigError(f'{name}={value!r}: expected a duration such as "00:12:00:00" (DD:HH:..)')
    return duration.total_seconds()


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
