"""A config file to a Config: names, types and ranges by the schema, then the rules.

pydantic decides what fits a type; what is wrong is said in our words, from the schema itself, and
all mistakes at once.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hpctrain.config.foreign_keys import (
    instead_of,
    instead_of_section,
    own_key,
    own_section,
)
from hpctrain.config.importing import has_method, is_reference
from hpctrain.config.messages import KeyPath, Mistake, config_error
from hpctrain.config.registry import BUILTINS, OWN
from hpctrain.config.rules import CHECKS
from hpctrain.config.schema import ComponentSection, Config
from hpctrain.config.toml import Source, Table, apply_overrides, read, refuse_depth
from hpctrain.config.value_types import expectation, remedy
from hpctrain.utils.text import did_you_mean, nearest

if TYPE_CHECKING:
    from pydantic import TypeAdapter


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
    mistakes += _without_echoes([*mistakes, *_missing_parts(source)])[len(mistakes) :]
    misfits = {mistake.key for mistake in mistakes}
    for check in CHECKS:
        mistakes += [mistake for mistake in check(source) if mistake.key not in misfits]
    if config is None or mistakes:
        raise config_error(path, mistakes)
    return config


def from_table(
    name: str,
    table: Table,
    overrides: Sequence[str] = (),
    *,
    given: frozenset[KeyPath] = frozenset(),
) -> Config:
    """Return the config that a table of sections comes to, by the same checks as a file's.

    Args:
        name: of what has made the table, for the messages.
        table: by section.
        overrides: over it, as on a command line.
        given: keys that name what is there already, an object: nothing is looked for.

    Raises:
        ConfigError: with every mistake.
    """
    source = Source(path=name, text="", table=table)
    mistakes = apply_overrides(source, overrides)
    config, against_schema = validate(source)
    mistakes += against_schema
    misfits = {mistake.key for mistake in mistakes}
    for check in CHECKS:
        mistakes += [
            mistake
            for mistake in check(source)
            if mistake.key not in misfits and mistake.key not in given
        ]
    if config is None or mistakes:
        raise config_error(name, mistakes)
    return config


def validate(source: Source) -> tuple[Config | None, list[Mistake]]:
    """Return the config, or None and every mistake against the schema."""
    table, mistakes = _usable(source)
    mistakes += _missing_data(source)
    found = {mistake.key for mistake in mistakes}
    unknown, table = _known_only(source, table)
    mistakes += unknown

    from pydantic import ValidationError

    try:
        # By way of JSON, in which strict validation takes objects and lists for dataclasses and
        # tuples, and whole numbers for floats; nothing else is coerced.
        config = _adapter().validate_json(json.dumps(table), strict=True)
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False, include_input=False):
            key, inner = _place(tuple(str(part) for part in item["loc"]))
            if key not in found:
                found.add(key)
                missing = item["type"].startswith("missing")
                if _is_list(key[0]):
                    mistakes.append(_list_misfit(source, key[0], item["loc"][1:3], missing))
                elif inner is not None:
                    problem = f"expected {expectation(inner)}{remedy(inner, source.get(*key))}"
                    mistakes.append(source.mistake(key, problem))
                elif len(item["loc"]) > 3 and (kind := _item_type(*key)) is not None:
                    mistakes.append(_item_misfit(source, key, kind, item["loc"][2:4], missing))
                else:
                    mistakes.append(_misfit(source, key, missing=missing))
        return None, _without_echoes(mistakes)
    return (None if mistakes else config), _without_echoes(mistakes)


@functools.cache
def _adapter() -> TypeAdapter[Config]:
    from pydantic import TypeAdapter

    return TypeAdapter(Config)


@functools.cache
def _sections() -> dict[str, type]:
    return typing.get_type_hints(Config)


def _is_list(section: str) -> bool:
    """Tell whether a section is written once for each of several tables, such as [[callbacks]]."""
    return typing.get_origin(_sections()[section]) is tuple


def _section_type(section: str) -> type:
    """Return the dataclass of a section, or of each of its tables."""
    annotation = _sections()[section]
    kind: type = typing.get_args(annotation)[0] if _is_list(section) else annotation
    return kind


@functools.cache
def _fields(section: str) -> dict[str, Any]:
    """Return the annotation of every key that a section of the file may have."""
    return typing.get_type_hints(_section_type(section), include_extras=True)


def reserved_keys(section: str) -> tuple[str, ...]:
    """Return the keys that are hpctrain's own in a section, not arguments of its component."""
    return tuple(field.name for field in dataclasses.fields(_section_type(section)))


def _item_type(section: str, key: str) -> type | None:
    """Return the dataclass of each table in a list of tables, None if a key is no such list."""
    annotation = _fields(section).get(key)
    kinds = typing.get_args(annotation) if typing.get_origin(annotation) is tuple else ()
    if kinds and isinstance(kinds[0], type) and dataclasses.is_dataclass(kinds[0]):
        return kinds[0]
    return None


def _place(where: KeyPath) -> tuple[KeyPath, Any]:
    """Return the key that pydantic means, and what it expects if it is inside of a table."""
    if len(where) < 3 or where[1] not in (fields := _fields(where[0])):
        return where[:2], None
    within, inner = _inside(fields[where[1]], where[2:])
    return (*where[:2], *within), inner


def _is_component(section: str) -> bool:
    """Tell whether further keys of a section are arguments of what it names."""
    return issubclass(_section_type(section), ComponentSection)


def _usable(source: Source) -> tuple[Table, list[Mistake]]:
    """Return a copy without the values that TOML has and a config has no use for, and those."""
    mistakes: list[Mistake] = []

    def usable(value: Any, key: KeyPath) -> Any:
        if isinstance(value, dict):
            return {name: usable(inner, (*key, name)) for name, inner in value.items()}
        if isinstance(value, list):
            return [usable(inner, key) for inner in value]
        problem = ""
        if isinstance(value, datetime.date | datetime.time):
            problem = "dates and times are of no use here; as a string it needs quotes"
        elif isinstance(value, float) and not math.isfinite(value):
            problem = "expected a finite number"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            problem = "expected a number of at most 64 bits"
        if not problem:
            return value
        if key not in [mistake.key for mistake in mistakes]:
            mistakes.append(source.mistake(key, problem))
        return None

    return usable(source.table, ()), mistakes


def _missing_data(source: Source) -> list[Mistake]:
    """Return what a config has to say of files, which a datamodule or a DataLoader brings."""
    data = source.get("data")
    if not isinstance(data, dict) or data.get("use") is not None:
        return []
    needed = ["train"] if not data.get("sources") else []
    if not (isinstance(train := data.get("train"), str) and is_reference(train)):
        needed.append("global_batch_size")
    return [
        _misfit(source, ("data", key), missing=key not in data)
        for key in needed
        if data.get(key) in (None, "", 0)
    ]


def _known_only(source: Source, table: Table) -> tuple[list[Mistake], Table]:
    """Return what the schema does not know, and a table without it.

    Further keys of a component have moved into its `arguments`.
    """
    mistakes = []
    known: Table = {}
    for section, given in table.items():
        if section not in _sections():
            mistakes.append(source.mistake((section,), _unknown_section(section, given)))
            continue
        if _is_list(section) and isinstance(given, list):
            moved = [_with_arguments(source, section, item) for item in given]
            known[section] = [item for _, item in moved]
            mistakes += [mistake for found, _ in moved for mistake in found]
            continue
        if not isinstance(given, dict) or _is_list(section):
            known[section] = given
            continue
        reserved = reserved_keys(section)
        known[section] = {key: value for key, value in given.items() if key in reserved}
        for key, value in known[section].items():
            if (kind := _item_type(section, key)) is not None and isinstance(value, list):
                mistakes += _unknown_in_items(source, (section, key), kind, value)
            for within, near in _unknown_inside(_fields(section)[key], value).items():
                mistakes.append(source.mistake((section, key, *within), f"unknown key{near}"))
        further = [key for key in given if key not in reserved]
        if not _is_component(section) and not (section == "data" and "use" in given):
            mistakes += [source.mistake((section, key), _unknown(section, key)) for key in further]
            continue
        twice, moved_into = _with_arguments(source, section, given)
        mistakes += twice
        if "arguments" in moved_into:
            known[section]["arguments"] = moved_into["arguments"]
    return mistakes, known


def _with_arguments(source: Source, section: str, given: Any) -> tuple[list[Mistake], Any]:
    """Return the keys that are given twice, and a component with further keys as arguments."""
    if not isinstance(given, dict) or not isinstance(named := given.get("arguments", {}), dict):
        return [], given
    reserved = reserved_keys(section)
    further = [key for key in given if key not in reserved]
    problem = f"given twice, also in [{section}.arguments]"
    mistakes = [source.mistake((section, key), problem) for key in further if key in named]
    known = {key: value for key, value in given.items() if key in reserved}
    return mistakes, {**known, "arguments": {key: given[key] for key in further} | named}


def _misfit(source: Source, key: KeyPath, *, missing: bool) -> Mistake:
    """Say what is wrong with the value of a key that the schema knows."""
    if len(key) == 1:
        annotation = _sections()[key[0]]
        problem = "missing section" if missing else f"expected {expectation(annotation)}"
        return source.mistake(key, problem)
    annotation = _fields(key[0])[key[1]]
    problem = f"expected {expectation(annotation)}"
    if missing:
        beside = source.get(key[0]) if _is_component(key[0]) else ()
        further = [name for name in beside or () if name not in reserved_keys(key[0])]
        others = (name for name in further if own_key(key[0], name) == ".".join(key))
        near = next(others, None) or nearest(key[1], further)
        slip = "" if near is None else f"; is {key[0]}.{near} a slip for it?"
        return source.mistake(key, f"missing; {problem}{slip}")
    return source.mistake(key, problem + remedy(annotation, source.get(*key)))


def _missing_parts(source: Source) -> list[Mistake]:
    """Return what the config has to say of the task and the optimizer of a model that has none.

    A module, with a `training_step`, brings its own. Where its source does not tell whether a model
    is one, that is found out once it is built.
    """
    use = source.get("model", "use")
    may_be_module = isinstance(use, str) and is_reference(use) and use not in BUILTINS["model"]
    if may_be_module and has_method(use, "training_step") is not False:
        needed = [key for key in _NEEDED if source.get(key[0], "use") not in (None, OWN)]
        needed = [key for key in needed if key[1] != "use"]
    else:
        needed = [key for key in _NEEDED if isinstance(source.get(key[0]), dict)]
        absent = {section for section, _ in _NEEDED if source.get(section) is None}
        needed += [(section,) for section in sorted(absent, reverse=True)]
    return [
        _misfit(source, key, missing=source.get(*key) is None)
        for key in needed
        if source.get(*key) is None or source.get(*key) in (OWN, [])
    ]


_NEEDED: tuple[KeyPath, ...] = (
    ("task", "use"),
    ("task", "inputs"),
    ("optimizer", "use"),
    ("optimizer", "lr"),
)


def _item_misfit(
    source: Source, key: KeyPath, kind: type, within: tuple[int | str, ...], missing: bool
) -> Mistake:
    """Say what is wrong with a key of a table in a list of tables."""
    index, name = int(within[0]), str(within[1])
    problem = f"expected {expectation(typing.get_type_hints(kind, include_extras=True)[name])}"
    if missing:
        return source.mistake((*key, name), f"missing; {problem}")
    item = source.get(*key)[index]
    value = item[name] if isinstance(item, dict) else item
    return source.place(Mistake(key=(*key, name), problem=problem, value=value))


def _list_misfit(
    source: Source, section: str, within: tuple[int | str, ...], missing: bool
) -> Mistake:
    """Say what is wrong with a section that is written once for each of its tables."""
    if len(within) < 2:
        return _misfit(source, (section,), missing=missing)
    return _item_misfit(source, (section,), _section_type(section), within, missing)


def _unknown_in_items(source: Source, key: KeyPath, kind: type, items: list[Any]) -> list[Mistake]:
    """Return the keys that the tables of a list should not have."""
    known = [field.name for field in dataclasses.fields(kind)]
    found = {
        name: value
        for item in items
        if isinstance(item, dict)
        for name, value in item.items()
        if name not in known
    }
    return [
        source.place(
            Mistake(
                key=(*key, name),
                problem=f"unknown key{did_you_mean(name, known, prefix=f'{key[-1]}.')}",
                value=value,
            )
        )
        for name, value in found.items()
    ]


def _unknown_section(section: str, given: Any) -> str:
    if isinstance(given, dict):
        meant = instead_of_section(section)
        return f"unknown section{f'; {meant}' if meant else did_you_mean(section, _sections())}"
    homes = [f"{name}.{section}" for name in _sections() if section in reserved_keys(name)]
    said = f"did you mean {homes[0]}?" if len(homes) == 1 else instead_of("", section)
    return f"stands before the first [section], so it belongs to none{f'; {said}' if said else ''}"


def _unknown(section: str, key: str) -> str:
    """Name the known key that was meant: others' word for it, one elsewhere, or a near one here."""
    if (said := instead_of(section, key)) is not None:
        return f"unknown key; {said}"
    homes = [f"{name}.{key}" for name in _sections() if key in reserved_keys(name)]
    if len(homes) == 1:
        return f"unknown key; did you mean {homes[0]}?"
    return f"unknown key{did_you_mean(key, reserved_keys(section), prefix=f'{section}.')}"


def _without_echoes(mistakes: list[Mistake]) -> list[Mistake]:
    """Drop "missing" where an unknown key or section beside it was a slip for just that."""
    meant: set[KeyPath] = set()
    for *above, name in (mistake.key for mistake in mistakes if "unknown" in mistake.problem):
        ours = own_key(above[0], name) if above else own_section(name)
        known = reserved_keys(above[0]) if above else tuple(_sections())
        if ours is not None:
            meant.add(tuple(ours.split(".")))
        elif (close := nearest(name, known)) is not None:
            meant.add((*above, close))
    return [
        mistake
        for mistake in mistakes
        if not (mistake.problem.startswith("missing") and mistake.key in meant)
    ]


def _inside(annotation: Any, where: KeyPath) -> tuple[KeyPath, Any]:
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


def _unknown_inside(annotation: Any, value: Any) -> dict[KeyPath, str]:
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
