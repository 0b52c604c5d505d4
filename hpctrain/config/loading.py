"""A config file and its overrides to a Config, checked as far as that goes without torch."""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.config.checks import CHECKS
from hpctrain.config.messages import config_error
from hpctrain.config.overrides import apply_overrides
from hpctrain.config.schema import Config
from hpctrain.config.source import read, refuse_depth
from hpctrain.config.validation import validate


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply `section.key=value` overrides and check all of it.

    Import paths are located, not imported, and the paths of data and checkpoints looked for, from
    the current directory and on this host only.

    Raises:
        ConfigError: with every mistake, each with its line and what would be right.
    """
    source = read(path)
    mistakes = apply_overrides(source, overrides)
    refuse_depth(source)
    config, against_schema = validate(source)
    mistakes += against_schema
    misfits = {mistake.key for mistake in mistakes}
    for check in CHECKS:
        mistakes += [mistake for mistake in check(source) if mistake.key not in misfits]
    if config is None or mistakes:
        raise config_error(path, mistakes)
    return config
