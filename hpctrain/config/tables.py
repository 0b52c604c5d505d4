"""Tables inside of a section whose keys the schema knows: one, or one for each name."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from hpctrain.config.messages import KeyPath
from hpctrain.utils.text import did_you_mean


def inside(annotation: Any, where: KeyPath) -> tuple[KeyPath, Any]:
    """Return how far a path into a table leads to keys, and what the last of them expects.

    Nothing and None where the annotation is not that of a table, or of tables by name.
    """
    kind, is_named = _table(annotation)
    if kind is None:
        return (), None
    if is_named and len(where) == 1:
        return where, kind
    depth = 1 if is_named else 0
    keys = typing.get_type_hints(kind, include_extras=True)
    if len(where) <= depth or where[depth] not in keys:
        return (), None
    return where[: depth + 1], keys[where[depth]]


def unknown_inside(annotation: Any, value: Any) -> dict[KeyPath, str]:
    """Return the keys that a value should not have, and what was perhaps meant."""
    kind, is_named = _table(annotation)
    if kind is None or not isinstance(value, dict):
        return {}
    known = [field.name for field in dataclasses.fields(kind)]
    tables = {(name,): table for name, table in value.items()} if is_named else {(): value}
    return {
        (*path, key): did_you_mean(key, known)
        for path, table in tables.items()
        if isinstance(table, dict)
        for key in table
        if key not in known
    }


def _table(annotation: Any) -> tuple[type | None, bool]:
    """Return the dataclass of a table, and whether there is one by each name."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation, False
    if typing.get_origin(annotation) is dict:
        kind = typing.get_args(annotation)[1]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind, True
    return None, False
