"""The way into a model of a loop of one's own: its number format, and what FSDP gathers around it.

The model stays the object that its owner has made. Where something has to happen around a call, its
class becomes a class of the same name below its own, whose methods do that: a copy of the model,
its state and its attributes are as they were.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpctrain.data.loading.nested import map_tensors
from hpctrain.errors import TrainingError
from hpctrain.training.fsdp import ShardedModel
from hpctrain.training.precision import NumberFormat

_ENTRY = "_hpctrain_entry"
_NARROW = (torch.bfloat16, torch.float16)


def enter_by(model: nn.Module, number_format: NumberFormat, sharded: ShardedModel | None) -> None:
    """Have a model's forward pass and its other methods do what format and strategy need.

    Args:
        model: changed in place; where nothing is needed, not at all.
        number_format: of parameters and arithmetic.
        sharded: the same model where its parameters are spread over the ranks, else None.
    """
    is_plain = number_format.autocast is None and not number_format.casts
    if sharded is None and is_plain:
        return
    kind = type(model)
    members: dict[str, Any] = {name: _entering(method) for name, method in _methods(kind)}
    members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    if sharded is not None:
        members["__deepcopy__"] = _refuse_copy
    model.__dict__[_ENTRY] = Entry(number_format, sharded)
    model.__class__ = type(kind.__name__, (kind,), members)
    for name, child in model.named_children() if sharded is not None else ():
        if any(True for _ in child.parameters()):
            child.register_forward_pre_hook(functools.partial(_refuse_part, model, name))


class Entry:
    """What happens around a call of a model from outside of it."""

    def __init__(self, number_format: NumberFormat, sharded: ShardedModel | None) -> None:
        self.inside = False
        self._format = number_format
        self._sharded = sharded

    def __deepcopy__(self, memo: Any) -> Entry:
        """Return that of a copy of the model."""
        return Entry(self._format, self._sharded)

    def run(self, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return what a method of the model makes of its arguments. Under FSDP, collective."""
        if self._format.casts:
            args, kwargs = map_tensors(self._cast, (args, kwargs))
        with self._entered(), self._format.arithmetic():
            if self._sharded is None:
                result = method(*args, **kwargs)
            else:

                def of_bare(_model: nn.Module, _fields: Mapping[str, Tensor]) -> Any:
                    return method(*args, **kwargs)

                result = self._sharded.root(of_bare, {})
        # Sums of many numbers, as losses are, need more than 8 or 11 bits.
        return map_tensors(_wide, result)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._format.fitting(tensor.dtype))

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _NARROW else tensor


def _methods(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the public methods that a model has beyond those of every module, and its forward."""
    found: dict[str, Callable[..., Any]] = {}
    for each in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, member in vars(each).items():
            if name.startswith("_") or (hasattr(nn.Module, name) and name != "forward"):
                continue
            if inspect.isfunction(member) and not inspect.isgeneratorfunction(member):
                found.setdefault(name, member)
    yield from found.items()


def _entering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that enters the model, unless it is called from inside of it."""

    @functools.wraps(function)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        entry: Entry = self.__dict__[_ENTRY]
        if entry.inside:
            return function(self, *args, **kwargs)
        return entry.run(functools.partial(function, self), args, kwargs)

    return method


def _refuse_copy(self: nn.Module, memo: Any) -> nn.Module:
    """Refuse a copy that would hold this rank's rows, and gather nothing."""
    raise TrainingError(
        f'{type(self).__name__} has its parameters spread over the ranks (strategy "fsdp") and '
        'cannot be copied: copy it before world.setup, or take strategy="ddp"'
    )


def _refuse_part(model: nn.Module, name: str, child: nn.Module, _args: Any) -> None:
    """Refuse a part of a spread model that is called by itself: it has only rows."""
    # A backward pass runs parts again whose activations were not kept.
    is_backward = torch._C._current_graph_task_id() != -1
    if not (model.__dict__[_ENTRY].inside or is_backward):
        kind = type(model).__name__
        raise TrainingError(
            f"{kind}.{name} was called by itself, and has only some rows of its parameters "
            f'(strategy "fsdp"), which are gathered for calls of {kind}: put the call into a '
            f'method of {kind}, or take strategy="ddp"'
        )
