"""Plain attributes of modules, and of what these hold, as they stood: put back in place."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hpctrain.training.step.holding import (
    Holding,
    can_be_taken_apart,
    copied,
    holding_of,
    is_container,
    is_fixed,
    state_of,
    visible,
)


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
    left alone as a whole; whether it has changed is told as far as that can be seen.

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
