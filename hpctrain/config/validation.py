"""A table to a Config, by the schema: names, types, ranges. All mistakes at once."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import typing
from collections.abc import Iterator
from typing import Any

from hpctrain.config.expectations import choices, expectation
from hpctrain.config.messages import Mistake, did_you_mean, shown
from hpctrain.config.schema import ComponentSection, Config
from hpctrain.config.source import KeyPath, Source, Table

SECTIONS: dict[str, type] = typing.get_type_hints(Config)


def validate(source: Source) -> tuple[Config | None, list[Mistake]]:
    """Return the config, or None and every mistake against the schema."""
    table, mistakes = _gather_arguments(source)
    mistakes += [
        source.mistake(path, f" = {shown(value)}: {reason}")
        for path, value, reason in _foreign(table)
    ]
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    adapter = TypeAdapter(Config, config=None)
    for section in (Config, *SECTIONS.values()):
        # No coercion: "3" is no number, and a misspelt key is not dropped.
        section.__pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[attr-defined]
    try:
        # By way of JSON, in which strict validation takes objects and lists for dataclasses and
        # tuples, and whole numbers for floats.
        config = adapter.validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        mistakes += [
            _mistake(source, tuple(map(str, item["loc"])), item["type"])
            for item in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        return None, mistakes
    return config, mistakes


def field_type(path: KeyPath) -> Any:
    """Return the annotation of a section or of a field of one; KeyError if there is none."""
    section = SECTIONS[path[0]]
    if len(path) == 1:
        return section
    return typing.get_type_hints(section, include_extras=True)[path[1]]


def field_names(section: type) -> list[str]:
    """Return the keys that a section of the file may have."""
    return [item.name for item in dataclasses.fields(section)]


def _gather_arguments(source: Source) -> tuple[Table, list[Mistake]]:
    """Return a copy in which a component's further keys have moved into its `arguments`."""
    mistakes = []
    table = dict(source.table)
    for name, section in SECTIONS.items():
        given = table.get(name)
        if not (isinstance(given, dict) and issubclass(section, ComponentSection)):
            continue
        known = field_names(section)
        free = {key: value for key, value in given.items() if key not in known}
        table[name] = {key: value for key, value in given.items() if key in known}
        named = given.get("arguments", {})
        if isinstance(named, dict):
            mistakes += [
                source.mistake((name, key), f": given twice, also in [{name}.arguments]")
                for key in free
                if key in named
            ]
            table[name]["arguments"] = free | named
    return table, mistakes


def _foreign(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any, str]]:
    """Find the values that TOML has and a config has no use for."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _foreign(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _foreign(inner, path)
    elif isinstance(value, datetime.date | datetime.time):
        yield _as_written(path), value, "a date or time is of no use here; write it as a string"
    elif isinstance(value, float) and not math.isfinite(value):
        yield _as_written(path), value, "expected a finite number"


def _as_written(path: KeyPath) -> KeyPath:
    """Return the path without the `arguments` table that most configs leave out."""
    return tuple(part for index, part in enumerate(path) if (index, part) != (1, "arguments"))


def _mistake(source: Source, path: KeyPath, kind: str) -> Mistake:
    """Put a mistake that pydantic found into our words."""
    if path[0] not in SECTIONS:
        return source.mistake(path, f": unknown section{did_you_mean(path[0], SECTIONS)}")
    try:
        annotation = field_type(path)
    except KeyError:
        return source.mistake(path, f": unknown key{_meant(path)}")
    if kind in ("missing", "missing_keyword_only_argument"):
        what = "section" if len(path) == 1 else expectation(annotation)
        return source.mistake(path, f": missing; expected {what}")
    value: Any = source.table
    for part in path[:2]:
        value = value[part]
    text = f" = {shown(value)}: expected {expectation(annotation)}"
    if isinstance(value, str) and (words := choices(annotation)):
        text += did_you_mean(value, words)
    elif annotation is bool and str(value).lower() in ("true", "false", "yes", "no"):
        text += f"; did you mean {'true' if str(value).lower() in ('true', 'yes') else 'false'}?"
    return source.mistake(path[:2], text)


def _meant(path: KeyPath) -> str:
    """Return which known key an unknown one may have meant: of its section, then of another."""
    section, key = path[0], path[1]
    near = did_you_mean(key, field_names(SECTIONS[section]))
    if near:
        return near.replace("mean ", f"mean {section}.")
    for other, kind in SECTIONS.items():
        if key in field_names(kind):
            return f"; did you mean {other}.{key}?"
    return ""
