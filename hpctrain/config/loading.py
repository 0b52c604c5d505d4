"""A config file and its overrides to a Config, checked as far as that goes without torch."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from hpctrain.config.components import BUILTINS, unknown_name
from hpctrain.config.locating import problem
from hpctrain.config.messages import Mistake, config_error, did_you_mean, shown
from hpctrain.config.schema import Config
from hpctrain.config.source import Source, apply_overrides, read
from hpctrain.config.validation import validate

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}")


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply `section.key=value` overrides and check all of it.

    Raises:
        ConfigError: with every mistake, each with its line and what would be right.
    """
    source = read(path)
    mistakes = apply_overrides(source, overrides)
    config, against_schema = validate(source)
    mistakes += against_schema
    for check in (_name, _paths, _components, _limits, _batch_sizes, _best, _backend):
        mistakes += check(source)
    if mistakes or config is None:
        raise config_error(path, mistakes)
    return config


def _name(source: Source) -> list[Mistake]:
    name = source.get("run", "name")
    if not isinstance(name, str) or not name or _FOLDER_NAME.fullmatch(name):
        return []
    text = f" = {shown(name)}: expected the name of a folder: letters, digits and . _ + = -"
    return [source.mistake(("run", "name"), text)]


def _paths(source: Source) -> list[Mistake]:
    """Check that what the config names is there; what is inside it is for later."""
    mistakes = []
    for section, key in (("data", "train"), ("data", "validation"), ("checkpoint", "resume")):
        value = source.get(section, key)
        if not isinstance(value, str) or not value or (key == "resume" and value in _RESUME):
            continue
        try:
            if glob.has_magic(value):
                there = next(glob.iglob(value), None) is not None  # noqa: PTH207 - absolute ones too
            else:
                there = Path(value).exists()
        except (OSError, ValueError):  # a name too long, or with a null byte
            there = False
        if not there:
            what = "no file matches" if glob.has_magic(value) else "no such file or folder"
            hint = did_you_mean(value, _RESUME) if key == "resume" else _packed_hint(value)
            text = f" = {shown(value)}: {what} (seen from {Path.cwd()}){hint}"
            mistakes.append(source.mistake((section, key), text))
    return mistakes


_RESUME = ("auto", "never")


def _packed_hint(value: str) -> str:
    """Say how the example's data come about."""
    if Path(value).parts[:2] == ("data", "digits"):
        return "; `python -m hpctrain data pack digits data/digits` makes it"
    return ""


def _components(source: Source) -> list[Mistake]:
    mistakes = []
    for section in BUILTINS:
        use = source.get(section, "use")
        if not isinstance(use, str) or not use:
            continue
        wrong = unknown_name(section, use)
        if wrong is None and use not in BUILTINS[section]:
            wrong = problem(use)
        if wrong is not None:
            mistakes.append(source.mistake((section, "use"), f" = {shown(use)}: {wrong}"))
    return mistakes


def _limits(source: Source) -> list[Mistake]:
    limits = ("max_epochs", "max_steps", "max_samples")
    training = source.table.get("training")
    if not isinstance(training, dict) or any(key in training for key in limits):
        return []
    return [source.mistake(("training",), ": set max_epochs, max_steps or max_samples")]


def _batch_sizes(source: Source) -> list[Mistake]:
    whole, micro = (source.get("data", f"{kind}_batch_size") for kind in ("global", "micro"))
    if type(whole) is not int or type(micro) is not int or micro <= whole:
        return []
    text = f" = {shown(micro)}: more than data.global_batch_size = {shown(whole)} of all ranks"
    return [source.mistake(("data", "micro_batch_size"), text)]


def _best(source: Source) -> list[Mistake]:
    best = source.get("checkpoint", "keep_best")
    if not isinstance(best, str) or source.get("data", "validation") is not None:
        return []
    text = f" = {shown(best)}: needs evaluations, and data.validation is not set"
    return [source.mistake(("checkpoint", "keep_best"), text)]


def _backend(source: Source) -> list[Mistake]:
    if (source.get("launch", "backend"), source.get("launch", "device")) != ("nccl", "cpu"):
        return []
    text = ' = "nccl": carries GPU tensors only, and launch.device = "cpu"; "gloo" carries these'
    return [source.mistake(("launch", "backend"), text)]
