"""What of the config has changed since a checkpoint: told, or refused."""

from __future__ import annotations

from typing import Any

from hpctrain.checkpoint.inspect import config_changes
from hpctrain.config import Config, to_toml
from hpctrain.config.messages import shown
from hpctrain.config.semantics import CHOOSABLE, Semantics, older_rules, semantics_of
from hpctrain.config.toml import parse
from hpctrain.config.validate import validate
from hpctrain.errors import ConfigError
from hpctrain.training.persistence import Resumed
from hpctrain.utils.text import first_lines

# Of these a change says nothing about what is trained.
_UNREMARKABLE = ("run.", "logging.", "launch.", "checkpoint.")

_FIXED = {
    "optimizer.use": (
        "the state of one optimizer is none of another's. Bring the old one back, or start a new "
        "run (run.name) with checkpoint.initialize_from"
    ),
}
"""Keys that a run keeps for its life, and why. Shapes of the model are compared as tensors."""

_SHOWN = 12


def rules_and_changes(config: Config, resumed: Resumed | None) -> tuple[Semantics, list[str]]:
    """Return the rules of the run, and what is not as it was, a line for each.

    Args:
        config: of this job.
        resumed: the checkpoint that the run goes on from; None: it begins.

    Raises:
        ConfigError: if what a run keeps for its life has changed.
        CheckpointError: if the record of the rules cannot be read.
    """
    if resumed is None:
        return semantics_of(config), []
    semantics = semantics_of(config, resumed.values)
    return semantics, [
        *older_rules(semantics, config),
        *told_changes(resumed.config_toml, config),
    ]


def told_changes(before: str, now: Config) -> list[str]:
    """Return what has changed, a line for each key.

    Args:
        before: config.toml of the checkpoint.
        now: the config of this job.

    Raises:
        ConfigError: if what a run keeps for its life has changed.
    """
    changes = {
        key: values
        for key, values in config_changes(_with_defaults(before), to_toml(now)).items()
        if not key.startswith(_UNREMARKABLE)
        and key not in CHOOSABLE  # `semantics_of` looks at those
    }
    for key, why in _FIXED.items():
        if key in changes:
            then, here = changes[key]
            raise ConfigError(
                f"{key} = {shown(here)}, but the checkpoint to go on from has {shown(then)}: {why}",
                everywhere=True,  # all ranks compare the same two
            )
    lines = [
        f"{key}: {_text(then)} when saved, {_text(here)} now"
        for key, (then, here) in changes.items()
    ]
    return first_lines(lines, _SHOWN, noun="keys have changed")


def _with_defaults(before: str) -> str:
    """Return an older config with the keys that it did not know, at their defaults."""
    config, _ = validate(parse(before, "config.toml"))
    return before if config is None else to_toml(config)


def _text(value: Any) -> str:
    return "not set" if value is None else shown(value)
