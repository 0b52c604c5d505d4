"""Batch training for MPI clusters: launch, sharded HDF5, DDP, checkpoints, life in a queue.

Public are the names of `__all__` here, in `hpctrain.data` and in `hpctrain.lightning`; all else is
private and may change.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpctrain.version import __version__

if TYPE_CHECKING:
    from hpctrain.config.validate import load as load_config
    from hpctrain.launch.function import launch
    from hpctrain.training.inference.loaded_model import load_model
    from hpctrain.training.loops.world import World, connect
    from hpctrain.training.program import train
    from hpctrain.training.task.language_modeling import LanguageModeling
    from hpctrain.training.task.regression import Regression
    from hpctrain.training.task.task import Classification, Task

__all__ = [
    "Classification",
    "LanguageModeling",
    "Regression",
    "Task",
    "World",
    "__version__",
    "connect",
    "launch",
    "load_config",
    "load_model",
    "train",
]

_HOMES = {
    "Classification": "hpctrain.training.task.task:Classification",
    "LanguageModeling": "hpctrain.training.task.language_modeling:LanguageModeling",
    "Regression": "hpctrain.training.task.regression:Regression",
    "Task": "hpctrain.training.task.task:Task",
    "World": "hpctrain.training.loops.world:World",
    "connect": "hpctrain.training.loops.world:connect",
    "launch": "hpctrain.launch.function:launch",
    "load_config": "hpctrain.config.validate:load",
    "load_model": "hpctrain.training.inference.loaded_model:load_model",
    "train": "hpctrain.training.program:train",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: nothing heavy at import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(module), attribute)
