"""A TOML file to frozen dataclasses, with every mistake explained. Needs neither torch nor MPI."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpctrain.config.schema import Config
    from hpctrain.config.validate import load
    from hpctrain.config.writing import to_toml

__all__ = ["Config", "load", "to_toml"]

_HOMES = {"Config": "schema", "load": "validate", "to_toml": "writing"}


def __getattr__(name: str) -> object:
    """Load a part when it is asked for: ranks that read no file need no checks."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
