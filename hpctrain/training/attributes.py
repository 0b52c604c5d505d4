"""Attributes of an object that change while it works."""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

_DEEPEST = 6
_SAVED = ("state", "param_groups", "defaults")  # the last are what the groups began with
_WITHOUT_STATE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


class Attributes:
    """The attributes of an optimizer at one moment, but for what a checkpoint holds of it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._before = self._prints()

    def changed(self) -> list[str]:
        """Return the names of those that are not what they were."""
        now = self._prints()
        return sorted(name for name in now if now[name] != self._before.get(name))

    def _prints(self) -> dict[str, object]:
        optimizer = self._optimizer
        groups, slots = optimizer.param_groups, list(optimizer.state.values())
        known = [optimizer, optimizer.state, groups, *groups, *slots]
        for content in (*groups, *slots):
            known += content.values() if isinstance(content, dict) else ()
        known += [item for group in groups for item in group["params"]]
        return {
            name: _print(value, set(map(id, known)), 0)
            for name, value in vars(optimizer).items()
            if name not in _SAVED
        }


def _print(value: Any, seen: set[int], depth: int) -> object:
    """Return what tells whether a value has changed, as far as its parts can be seen."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if id(value) in seen or depth > _DEEPEST or isinstance(value, _WITHOUT_STATE):
        return None
    seen.add(id(value))
    if isinstance(value, Tensor):
        return None if value.device.type == "meta" else repr(value.detach().tolist())
    return [(key, _print(item, seen, depth + 1)) for key, item in _parts(value)]


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, torch.Generator):
        return [("state", value.get_state())]
    if isinstance(value, random.Random):
        return [("state", value.getstate())]
    if isinstance(value, np.random.Generator):
        return [("state", value.bit_generator.state)]
    if isinstance(value, Mapping):
        return [(repr(key), item) for key, item in value.items()]
    if isinstance(value, list | tuple | deque | set | frozenset):
        return [("", item) for item in value]
    return list(vars(value).items()) if hasattr(value, "__dict__") else []
