"""Plain attributes of modules, and what they hold, as they stood: put back in place."""

from __future__ import annotations

import copy
import logging
import pickle
import random
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class _Held:
    """What one object held."""

    def __init__(self, value: object, holding: Holding) -> None:
        self.value, self.holding = value, holding
        self.items = holding.read(value)
        # Copies of items that change by being used, such as iterators, and what these looked like.
        self.spares: dict[int, tuple[object, Any]] = {}

    def changed(self) -> bool:
        now = self.holding.read(self.value)
        same = len(now) == len(self.items) and all(
            (key is before[0] or (isinstance(key, int | str) and key == before[0]))
            and item is before[1]
            for before, (key, item) in zip(self.items, now, strict=True)
        )
        return not same or bool(self._used())

    def put_back(self) -> None:
        if self.changed():
            for index in self._used():
                self.items[index] = (self.items[index][0], self.spares[index][0])
            self.holding.fill(self.value, self.items)

    def _used(self) -> list[int]:
        return [
            index
            for index, (_, before) in self.spares.items()
            if visible(self.items[index][1]) != before
        ]


class _State:
    """The state of one object that has one, such as a random generator."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self._read, self._write = read, write
        self._before = read()

    def changed(self) -> bool:
        return pickle.dumps(self._before) != pickle.dumps(self._read())

    def put_back(self) -> None:
        self._write(self._before)


class Attributes:
    """All that can be reached from some objects by attributes and containers.

    Each object stays the one that it is and gets back what it held, so that those who share one
    still do. One that holds something that cannot be copied, such as a lock or an open file, is
    left alone as a whole; whether it has changed is known as far as that can be seen.

    Attributes:
        modules: all that were found, those given among them, once each.
        tensors: found as attributes; their values are the caller's to keep.
    """

    def __init__(self, roots: Mapping[str, object]) -> None:
        """Take down what objects hold, each under a name for messages."""
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        self._kept: list[_Held | _State] = []
        self._opaque: dict[str, list[_Held | _State]] = {}
        # Holds what was seen: the id of something that is gone could be that of something else.
        self._seen: dict[int, object] = {}
        for name, root in roots.items():
            self._visit(name, root, self._kept)

    def put_back(self) -> list[str]:
        """Make all objects hold what they held.

        Returns:
            The names of those that have changed and cannot be put back.
        """
        changed = [name for name, kept in self._opaque.items() if any(k.changed() for k in kept)]
        for kept in self._kept:
            kept.put_back()
        return changed

    def _visit(self, name: str, value: object, kept: list[_Held | _State]) -> bool:
        """Take down what an object holds, and what that holds in turn.

        Args:
            name: of the object.
            value: the object.
            kept: takes what is taken down. That of an object with attributes counts as a whole.

        Returns:
            False if something in it cannot be copied.
        """
        if is_fixed(value) or id(value) in self._seen:
            return True
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, nn.Module):
            self._visit_module(name, value)
        elif (state := state_of(value)) is not None:
            kept.append(_State(*state))
        elif (holding := holding_of(value)) is None:
            return self._visit_closed(name, value, kept)
        elif is_container(value):
            return self._visit_items(name, _Held(value, holding), kept)
        else:
            return self._visit_object(name, _Held(value, holding), kept)
        return True

    def _visit_object(self, name: str, held: _Held, kept: list[_Held | _State]) -> bool:
        """Take down an object with attributes: it is put back as a whole or not at all."""
        whole: list[_Held | _State] = []
        complete = self._visit_items(name, held, whole)
        if not can_be_taken_apart(held.value):
            whole.append(_State(lambda: visible(held.value), lambda _: None))
            complete = False
        if complete or kept is not self._kept:
            kept += whole
        else:
            self._opaque[name] = whole
        return complete or kept is self._kept

    def _visit_module(self, name: str, module: nn.Module) -> None:
        holding = holding_of(module)
        assert holding is not None
        self.modules.append(module)
        self._visit_items(name, _Held(module, holding), self._kept)
        for key, child in module._modules.items():
            self._visit(f"{name}.{key}".lstrip("."), child, self._kept)

    def _visit_items(self, name: str, held: _Held, kept: list[_Held | _State]) -> bool:
        kept.append(held)
        complete = True
        for index, (key, item) in enumerate(held.items):
            if is_fixed(item) or id(item) in self._seen:
                continue
            spare = None
            if state_of(item) is None and holding_of(item) is None and held.holding.exchanges:
                spare = copied(item)
            if spare is not None:
                held.spares[index] = (spare, visible(item))
            else:
                inside = (name + held.holding.label.format(key)).lstrip(".")
                complete = self._visit(inside, item, kept) and complete
        return complete

    def _visit_closed(self, name: str, value: object, kept: list[_Held | _State]) -> bool:
        """Take down what can be seen of an object that cannot be copied."""
        state = _State(lambda: visible(value), lambda _: None)
        if kept is self._kept:
            self._opaque[name] = [state]
            return True
        kept.append(state)
        return False


Items = list[tuple[Any, Any]]
"""(key, value) of all that an object holds: keys, indices or names of attributes."""

# What does not change, or stands for code.
_FIXED = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type, Enum, PurePath),
    *(FunctionType, BuiltinFunctionType, MethodType, ModuleType, weakref.ref, logging.Logger),
    *(np.dtype, np.generic, torch.dtype, torch.device, torch.Size, torch.layout),
    torch.memory_format,
)
_SIMPLE = frozenset({type(None), bool, int, float, complex, str, bytes})
_OF_MODULES = frozenset(nn.Module().__dict__)
# torch's own objects are its own affair, but for those that are made to hold what users put there.
_OWN = "hpctrain.training.modules."
"""What modules are given here, such as their trainer: not theirs to change."""
_HOLDERS_OF_TORCH = ("torch.optim.", "torch.distributions.")


@dataclass(frozen=True, slots=True)
class Holding:
    """One way of holding things.

    Attributes:
        label: of an item in a name, from its key.
        read: returns the items.
        fill: makes the object hold just some items.
        exchanges: whether it can hold other items than those that it was made with.
    """

    label: str
    read: Callable[[Any], Items]
    fill: Callable[[Any, Items], None]
    exchanges: bool = True


def is_fixed(value: object) -> bool:
    """Tell whether an object does not change, or stands for code, or is torch's own affair."""
    if isinstance(value, _FIXED):
        return True
    if type(value) in (tuple, frozenset):
        return _SIMPLE.issuperset(map(type, value))  # type: ignore[call-overload]
    kind = f"{type(value).__module__}."
    return (
        kind.startswith(("torch.", _OWN))
        and not kind.startswith(_HOLDERS_OF_TORCH)
        and not isinstance(value, nn.Module | Tensor | torch.Generator)
    )


def holding_of(value: object) -> Holding | None:
    """Return how an object holds others; None of one that cannot be looked into."""
    for kind, holding in _HOLDINGS.items():
        if isinstance(value, kind):
            return holding
    return _OBJECT if hasattr(value, "__dict__") or _slots(value) else None


def is_container(value: object) -> bool:
    """Tell whether an object is there to hold others, and nothing by itself."""
    return isinstance(value, tuple(_HOLDINGS))


def state_of(value: Any) -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
    """Return how to read and to set the state of what has one, such as a random generator."""
    for kind, access in _STATES.items():
        if isinstance(value, kind):
            return access(value)
    # A vocabulary has very many items, which need not be looked at one by one.
    if type(value) in (list, set, deque) and _SIMPLE.issuperset(map(type, value)):
        return lambda: copy.copy(value), lambda saved: _fill_flat(value, list(enumerate(saved)))
    if type(value) is dict and _SIMPLE.issuperset(map(type, value.values())):
        return lambda: dict(value), lambda saved: _fill_dict(value, list(saved.items()))
    return None


def can_be_taken_apart(value: object) -> bool:
    """Tell whether an object is no more than its attributes; an open file is more."""
    try:
        value.__reduce_ex__(4)
    except Exception:  # noqa: BLE001 - whatever its maker has it raise
        return False
    return True


def copied(value: object) -> object | None:
    """Return a copy of an object, None if it cannot be copied."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - whatever its maker has it raise
        return None


def visible(value: Any) -> Any:
    """Return what can be seen of an object from outside, to tell whether it has changed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pickle.dumps(value)
    except Exception:  # noqa: BLE001 - whatever its maker has it raise
        pass
    frame = getattr(value, "gi_frame", None)  # of a generator
    if frame is not None:
        return frame.f_lasti, repr(frame.f_locals)
    try:
        return value.tell()
    except Exception:  # noqa: BLE001 - it is no file, or a closed one
        return repr(value)


def _attributes(value: Any) -> Items:
    slots = [(name, getattr(value, name)) for name in _slots(value) if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).items(), *slots]


def _slots(value: object) -> list[str]:
    """Return the names of the attributes that are not in an object's dictionary."""
    return [
        name
        for base in type(value).__mro__
        for name in _listed(base.__dict__.get("__slots__", ()))
        if name not in ("__dict__", "__weakref__")
    ]


def _listed(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


def _fill_attributes(value: Any, items: Items) -> None:
    wanted, slots = dict(items), _slots(value)
    for name in slots:
        if name in wanted:
            object.__setattr__(value, name, wanted[name])
        elif hasattr(value, name):
            object.__delattr__(value, name)
    if hasattr(value, "__dict__"):
        value.__dict__.clear()
        value.__dict__.update({k: item for k, item in wanted.items() if k not in slots})


def _plain_attributes(module: nn.Module) -> Items:
    return [(name, item) for name, item in module.__dict__.items() if name not in _OF_MODULES]


def _fill_plain_attributes(module: nn.Module, items: Items) -> None:
    for name, _ in _plain_attributes(module):
        del module.__dict__[name]
    module.__dict__.update(items)


def _fill_dict(value: dict[Any, Any], items: Items) -> None:
    kind = OrderedDict if isinstance(value, OrderedDict) else dict
    kind.clear(value)
    for key, item in items:
        kind.__setitem__(value, key, item)


def _fill_flat(value: Any, items: Items) -> None:
    value.clear()
    add = value.update if isinstance(value, set) else value.extend
    add(item for _, item in items)


def _enumerated(value: Any) -> Items:
    return list(enumerate(value))


def _fill_nothing(value: object, items: Items) -> None:
    """Leave what cannot change as it is."""


def _state_of_bits(value: np.random.Generator) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    bits = value.bit_generator
    return lambda: copy.deepcopy(bits.state), lambda state: setattr(bits, "state", state)


_STATES: dict[type, Callable[[Any], tuple[Callable[[], Any], Callable[[Any], None]] | None]] = {
    torch.Generator: lambda value: (value.get_state, value.set_state),
    np.random.Generator: _state_of_bits,
    np.random.RandomState: lambda value: (value.get_state, value.set_state),
    random.Random: lambda value: (value.getstate, value.setstate),
    np.memmap: lambda value: None,
    np.ndarray: lambda value: (
        (value.copy, lambda saved: np.copyto(value, saved)) if value.flags.writeable else None
    ),
    bytearray: lambda value: (
        lambda: bytes(value),
        lambda saved: value.__setitem__(slice(None), saved),
    ),
}
_OBJECT = Holding(".{}", _attributes, _fill_attributes)
_FLAT = Holding("[{}]", _enumerated, _fill_flat)
_HOLDINGS: dict[type, Holding] = {
    nn.Module: Holding(".{}", _plain_attributes, _fill_plain_attributes),
    dict: Holding("[{!r}]", lambda value: list(value.items()), _fill_dict),
    list: _FLAT,
    deque: _FLAT,
    set: _FLAT,
    tuple: Holding("[{}]", _enumerated, _fill_nothing, exchanges=False),
    frozenset: Holding("[{}]", _enumerated, _fill_nothing, exchanges=False),
}
