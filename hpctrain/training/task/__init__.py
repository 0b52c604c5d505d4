"""Tasks: what a step computes from a batch; the built-in ones, losses, masks, index ranges.

Users' own import the built-in ones from here, or from `hpctrain`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Classification": "task",
    "LanguageModeling": "language_modeling",
    "Regression": "regression",
    "Task": "task",
}


def __getattr__(name: str) -> Any:
    """Import a task when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
