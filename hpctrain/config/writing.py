"""A config back to TOML, whole or with the place that each value comes from; values as TOML."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from hpctrain.config.messages import KeyPath
from hpctrain.config.schema import ComponentSection, Config
from hpctrain.config.schema_data import DataSection
from hpctrain.config.toml import Source, locate_keys


def to_value(value: Any) -> str:
    """Return a value as TOML has it, in one line."""
    if isinstance(value, str):
        # TOML has JSON's escapes, and wants one more character escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{to_value(key)} = {to_value(x)}' for key, x in value.items())}}}"
    return str(value)


def to_toml(config: Config, *, with_job: bool = False) -> str:
    """Return the resolved config, every default written out; `load` of it gives an equal one.

    Args:
        config: of a run.
        with_job: also what a job asks of its batch system, which is no part of the run.
    """
    import tomli_w

    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if not with_job:
        del sections["job"]
    # A list of tables that are none has no header to write.
    return tomli_w.dumps({name: _value(item) for name, item in sections.items() if item != ()})


def flat_config(config: Config) -> dict[str, Any]:
    """Return what of a config makes a run what it is, flat: {"optimizer.lr": 0.001}."""
    found: dict[str, Any] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{path}.{key}", item)
        else:
            found[path] = value

    for name in (each.name for each in dataclasses.fields(config)):
        # How it is run and watched says nothing of what comes of it; arguments may be secret.
        if name not in ("job", "launch", "logging", "profile", "notify", "trackers"):
            add(name, _value(getattr(config, name)))
    return found


def to_explained_toml(config: Config, source: Source) -> str:
    """Return the same with what a job asks for, and behind each key where its value comes from."""
    text = to_toml(config, with_job=True)
    origins = {
        line: _origin(key, source) for key, line in locate_keys(text).items() if len(key) > 1
    }
    return "".join(
        f"{line}  # {origins[number]}\n" if number in origins and "=" in line else f"{line}\n"
        for number, line in enumerate(text.splitlines(), start=1)
    )


def _origin(key: KeyPath, source: Source) -> str:
    """Return where the value of a key comes from."""
    for path in (key, (*key[:1], "arguments", *key[1:])):
        if source.get(*path) is None:
            continue
        for end in range(len(path), 1, -1):
            if path[:end] in source.overrides:
                return "override"
            if path[:end] in source.lines:
                return f"line {source.lines[path[:end]]}"
    return "default"


def _table(section: Any) -> dict[str, Any]:
    table = {
        field.name: _value(getattr(section, field.name))
        for field in dataclasses.fields(section)
        if getattr(section, field.name) is not None  # TOML knows no null: left out is none
    }
    if isinstance(section, ComponentSection | DataSection):
        reserved = {field.name for field in dataclasses.fields(section)}
        arguments = table.pop("arguments")
        # As people write them: among the section's own keys, apart only where names collide.
        table |= {key: value for key, value in arguments.items() if key not in reserved}
        apart = {key: value for key, value in arguments.items() if key in reserved}
        if apart:
            table["arguments"] = apart
    if isinstance(section, DataSection):  # of objects, which say by themselves what is left out
        table = {k: v for k, v in table.items() if v or k not in ("train", "global_batch_size")}
    return table


def _value(value: Any) -> Any:
    """Return a value with what is in it of the schema as tables."""
    if dataclasses.is_dataclass(value):
        return _table(value)
    if isinstance(value, dict):
        return {name: _value(inner) for name, inner in value.items()}
    return [_value(item) for item in value] if isinstance(value, tuple) else value
