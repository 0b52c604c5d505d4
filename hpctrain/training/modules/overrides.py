"""Overridden methods of a module or a callback: its own, and not its base class's defaults."""

from __future__ import annotations

import inspect
from typing import Any

import torch

_BASES = (
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "torch",
    "builtins",
    "typing",
    "abc",
)
"""Packages whose classes bring defaults: nobody's own words, and nothing is imported to know it."""


def is_base(kind: type) -> bool:
    """Tell whether a class brings defaults, and is not what somebody wants to train.

    Lightning's own examples, in `lightning.pytorch.demos`, are modules like any other.
    """
    package, *within = kind.__module__.split(".")
    return package in _BASES and "demos" not in within


def is_own(holder: Any, name: str) -> bool:
    """Tell whether an object has a method that its author wrote, or has put there."""
    if name in getattr(holder, "__dict__", {}):
        return callable(holder.__dict__[name])
    for kind in type(holder).__mro__:
        if name in kind.__dict__:
            return not is_base(kind)
    return False


def place_of(holder: Any, name: str) -> str:
    """Return where a method stands, such as "nets.py, line 12", for messages."""
    function = inspect.unwrap(getattr(type(holder), name, getattr(holder, name)))
    try:
        code = function.__code__
    except AttributeError:
        return f"{type(holder).__module__}.{type(holder).__qualname__}"
    return f"{code.co_filename}, line {code.co_firstlineno}"


_STEPS = ("training_step", "validation_step", "test_step", "predict_step", "forward")


def uncompiled(model: Any) -> Any:
    """Return a module that was given as `torch.compile(module)`, its steps compiled.

    As Lightning has it: names of its parameters are its own then, and hooks are called as they are.
    """
    module = getattr(model, "_orig_mod", None)
    if not isinstance(module, torch.nn.Module) or not is_own(module, "training_step"):
        return model
    for name in _STEPS:
        if is_own(module, name) and name not in module.__dict__:
            module.__dict__[name] = model.dynamo_ctx(getattr(module, name))
    return module


def is_module(model: object) -> bool:
    """Tell whether a model is one that trains itself: it has a `training_step` of its own."""
    return isinstance(model, torch.nn.Module) and is_own(model, "training_step")


def inner_modules(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Return a module and those inside it that log by themselves, as one in another does."""
    return [module, *(item for item in module.modules() if item is not module and _logs(item))]


def _logs(module: torch.nn.Module) -> bool:
    return callable(getattr(module, "training_step", None)) and callable(
        getattr(module, "log", None)
    )
