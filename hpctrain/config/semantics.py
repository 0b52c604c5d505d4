"""How a run understands its config: rules that differ between releases, and that it keeps for life.

A later release may take files in another order, or read packed integers as the floats that they
stand for. That is right for a new run, and would make another run of one that has begun. So every
checkpoint records the rules that it was trained by, a job that goes on from it follows those, and
one without a record, of hpctrain 0.1.0, has the rules of `FIRST`.

A change of what a config means is made here: a new rule, its value until now in `FIRST`, from now
on in `NEWEST`, and one more in `VERSION`. A rule that users may choose has a key in `_KEYS`, whose
default is None: as the run began, and as `NEWEST` says in a new one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from hpctrain.config.messages import shown
from hpctrain.config.schema import Config
from hpctrain.errors import CheckpointError, ConfigError

VERSION = 2
"""Of the rules; 1 is that of 0.1.0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Semantics:
    """The rules of one run.

    Attributes:
        version: of the release that the run was begun with.
        file_order: of files that a pattern or a folder names. "name": 10 before 2; "natural": 2
            before 10.
        decode: what becomes of values that are packed or marked as missing by the CF conventions.
            "none": taken as they are stored; "cf": the numbers that they stand for.
        model_dtypes: of parameters and buffers. "cast": all that are not integers become what
            `training.precision` says, complex ones as well; "own": as the model has them.
    """

    version: int
    file_order: Literal["name", "natural"]
    decode: Literal["none", "cf"]
    model_dtypes: Literal["cast", "own"]

    def to_json(self) -> dict[str, Any]:
        """Return the record that `semantics_of` reads."""
        return dataclasses.asdict(self)


FIRST = Semantics(version=1, file_order="name", decode="none", model_dtypes="cast")
"""The rules of 0.1.0, which recorded none."""

NEWEST = Semantics(version=VERSION, file_order="natural", decode="cf", model_dtypes="own")
"""The rules of a run that begins now."""

_KEYS = {"file_order": ("data", "file_order"), "decode": ("data", "decode")}
"""Where a config may choose a rule: section and key."""

CHOOSABLE = frozenset(".".join(key) for key in _KEYS.values())
"""The same keys, as they are written."""

RECORD = "semantics"
"""Name of the record among the values of a checkpoint, and in stats.json."""


def semantics_of(config: Config, saved: Mapping[str, Any] | None = None) -> Semantics:
    """Return the rules of a run.

    Args:
        config: of this job.
        saved: values of the checkpoint to go on from; None: the run begins.

    Raises:
        ConfigError: if the config asks for another rule than the run began with.
        CheckpointError: if the record was written by a newer version, or is damaged.
    """
    asked = {rule: value for rule in _KEYS if (value := _asked(config, rule)) is not None}
    if saved is None or config.checkpoint.allow_data_change:
        begun = NEWEST if saved is None else recorded(saved)
        return dataclasses.replace(begun, **asked)
    begun = recorded(saved)
    for rule, value in asked.items():
        if value != (then := getattr(begun, rule)):
            key = ".".join(_KEYS[rule])
            raise ConfigError(
                f"{key} = {shown(value)}, but the run to go on with began with {shown(then)}: a "
                f"run keeps that for its life. Leave {key} out, start a new run (run.name), or set "
                "checkpoint.allow_data_change = true",
                everywhere=True,  # all ranks compare the same two
            )
    return begun


def recorded(saved: Mapping[str, Any]) -> Semantics:
    """Return the rules that a checkpoint or stats.json was made by.

    Args:
        saved: its values; without a record they are of 0.1.0.

    Raises:
        CheckpointError: if the record was written by a newer version, or is damaged.
    """
    record = saved.get(RECORD)
    if record is None:
        return FIRST
    version = record.get("version") if isinstance(record, Mapping) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"the record of the rules of this run is damaged: {RECORD} = {record!r}",
            everywhere=True,
        )
    if version > VERSION:
        raise CheckpointError(
            f"this run was begun by a newer hpctrain: its rules have version {version}, and this "
            f"one knows them up to {VERSION}: update hpctrain",
            everywhere=True,
        )
    rules = {}
    for rule, kind in get_type_hints(Semantics).items():
        # A rule that the record does not know was introduced later: until then it was FIRST's.
        value = record.get(rule, getattr(FIRST, rule))
        if rule != "version" and value not in get_args(kind):
            raise CheckpointError(
                f"the record of the rules of this run is damaged: {rule} = {value!r}",
                everywhere=True,
            )
        rules[rule] = value
    return Semantics(**rules)


def older_rules(semantics: Semantics, config: Config) -> list[str]:
    """Return a line where keys mean something else than in a new run with this config."""
    today = semantics_of(config)
    kept = [
        f"{'.'.join(key)} = {shown(then)}, not {shown(now)}"
        for rule, key in _KEYS.items()
        if (then := getattr(semantics, rule)) != (now := getattr(today, rule))
    ]
    return [f"the run keeps what it began with: {', '.join(kept)}"] if kept else []


def _asked(config: Config, rule: str) -> Any:
    section, key = _KEYS[rule]
    return getattr(getattr(config, section), key)
