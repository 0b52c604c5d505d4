"""State that is saved with a run by name: any objects with state_dict and load_state_dict."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hpctrain.checkpoint.state import Json, Placement, UnsavableError, decode, encode
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.utils.text import listed

REGISTERED = "registered/"
"""Begins the names of their tensors among those of the training state."""


_OF_ROWS = (
    '. With training.strategy = "fsdp" parameters are spread over the ranks, and so are copies of '
    'them: training.ema_decay keeps an average of them, or use "ddp"'
)


class Stateful(Protocol):
    """What can be saved and go on, as torch's own objects can."""

    def state_dict(self) -> Any:
        """Return tensors, numbers, texts and containers of these."""
        ...

    def load_state_dict(self, state: Any, /) -> object:
        """Go on from a state."""
        ...


class RegisteredState:
    """The objects by name, each the same on all ranks; what rank 0's know is saved."""

    def __init__(self, device: torch.device) -> None:
        """Begin with none.

        Args:
            device: of the rank: tensors that were there come back there.
        """
        self._device = device
        self._items: dict[str, Stateful] = {}

    def add(self, name: str, item: Stateful) -> None:
        """Save an object with the run from now on, and put it back.

        Raises:
            ConfigError: if the name is taken, or the object cannot say what it knows.
        """
        if name in self._items:
            raise ConfigError(f"state {name!r}: two objects of this name; each has its own")
        for method in ("state_dict", "load_state_dict"):
            if not callable(getattr(item, method, None)):
                raise ConfigError(f"state {name!r}: {type(item).__name__} has no {method}")
        self._items[name] = item

    @property
    def names(self) -> set[str]:
        """Of all objects."""
        return set(self._items)

    def capture(self, tensors: MutableMapping[str, Tensor]) -> dict[str, Json]:
        """Return what they know as JSON, by name.

        Args:
            tensors: takes the tensors among it.

        Raises:
            UnsavableError: naming what a checkpoint cannot hold.
        """
        found = {}
        for name, item in self._items.items():
            state = item.state_dict()
            try:
                found[name] = encode(state, REGISTERED + name, tensors, tensor_facts)
            except UnsavableError as error:
                hint = _OF_ROWS if "DTensor" in str(error) else ""
                raise UnsavableError(f"the state of {name}: {error}{hint}") from error
        return found

    def ask(self) -> None:
        """Ask them, where only another rank saves: they may talk to each other about it."""
        for item in self._items.values():
            item.state_dict()

    def restore(self, saved: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> list[str]:
        """Have them go on from what was saved.

        Args:
            saved: what `capture` gave.
            tensors: of the training state, by name.

        Returns:
            What the header should say: who has none, and what belongs to nobody.

        Raises:
            CheckpointError: if one of them refuses its state.
        """
        place = tensor_placement(self._device)
        for name in saved.keys() & self._items.keys():
            state = decode(saved[name], tensors, place)
            try:
                self._items[name].load_state_dict(state)
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise CheckpointError(
                    f"{name} refuses the state that it has in the checkpoint: "
                    f"{type(error).__name__}: {error}. Bring the old code back, or begin a new run "
                    "with checkpoint.initialize_from"
                ) from error
        notes = []
        if fresh := sorted(self._items.keys() - saved.keys()):
            notes.append(f"not in the checkpoint, and begun anew: {listed(fresh)}")
        if lost := sorted(saved.keys() - self._items.keys()):
            notes.append(f"in the checkpoint, and not here any more: {listed(lost)}")
        return notes


def tensor_facts(tensor: Tensor) -> Mapping[str, Json]:
    """Return what is to stand beside a tensor, so that it comes back where it was."""
    return {} if tensor.device.type == "cpu" else {"on_device": True}


def tensor_placement(device: torch.device) -> Placement:
    """Return what puts a tensor back by `tensor_facts`."""

    def place(tensor: Tensor, facts: Mapping[str, Json]) -> Tensor:
        return tensor.to(device if "on_device" in facts else "cpu", copy=True)

    return place
