"""A config back to TOML: what is saved with a run and in each checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from hpctrain.config.schema import ComponentSection, Config


def to_toml(config: Config) -> str:
    """Return the resolved config, every default written out; `load` of it gives an equal one."""
    import tomli_w

    return tomli_w.dumps(
        {field.name: _table(getattr(config, field.name)) for field in dataclasses.fields(config)}
    )


def _table(section: Any) -> dict[str, Any]:
    table = {
        field.name: _value(getattr(section, field.name))
        for field in dataclasses.fields(section)
        if getattr(section, field.name) is not None  # TOML knows no null: left out is none
    }
    if isinstance(section, ComponentSection):
        reserved = {field.name for field in dataclasses.fields(section)}
        arguments = table.pop("arguments")
        # As people write them: among the section's own keys, apart only where names collide.
        table |= {key: value for key, value in arguments.items() if key not in reserved}
        apart = {key: value for key, value in arguments.items() if key in reserved}
        if apart:
            table["arguments"] = apart
    return table


def _value(value: Any) -> Any:
    """Return a value with what is in it of the schema as tables."""
    if dataclasses.is_dataclass(value):
        return _table(value)
    if isinstance(value, dict):
        return {name: _value(inner) for name, inner in value.items()}
    return [_value(item) for item in value] if isinstance(value, tuple) else value
