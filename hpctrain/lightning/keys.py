"""Keys of a config by their names with a dot, and the values that several arguments share."""

from __future__ import annotations

import datetime
import re
from typing import Any

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
