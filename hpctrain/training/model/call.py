"""The one call through which a task reaches the model, so that it may use all of it.

DistributedDataParallel and FSDP prepare gradients and parameters around the forward pass of the
module that they wrap. They wrap a module whose forward pass is whatever a task does, so that a task
gets the bare model at any world size: its methods, its attributes, its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Method = Callable[[nn.Module, Any], Any]
"""A method of a task, such as `task.loss`: of the bare model and the fields of a pass."""

Call = Callable[[Method, Any], Any]
"""Calls a method of a task with the model and these fields."""


class Callee(nn.Module):
    """Wraps the model for those who watch forward passes; names and state are the model's own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: Method, fields: Any) -> Any:
        """Return what the method makes of the bare model and the fields."""
        return method(self.module, fields)


class UnhookedCallee(Callee):
    """A callee without hooks, which torch need not look for in every pass."""

    bare: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.__dict__["bare"] = module  # found without the search of nn.Module

    def forward(self, method: Method, fields: Any) -> Any:
        """Return what the method makes of the bare model and the fields."""
        return method(self.bare, fields)

    __call__ = forward


def call_directly(model: nn.Module) -> Call:
    """Return the call that nobody watches."""
    return lambda method, fields: method(model, fields)
