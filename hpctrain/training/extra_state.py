"""What modules want to have saved beside parameters and buffers: `get_extra_state`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from hpctrain.checkpoint.state import Json, UnsavableError, decode, encode
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.training.step.plain_names import PlainNames, plain_state

EXTRA = "extra_state/"
"""Begins the names of tensors of extra states among those of the training state."""

_KEY = "_extra_state"  # what torch calls it in a state_dict


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, and what else of the state_dict is a tensor.

    Raises:
        UnsavableError: if a hook of the model's own puts something else there.
    """
    tensors = {}
    state: Mapping[str, object] = plain_state(model)
    for name, item in state.items():
        if isinstance(item, Tensor):
            tensors[name] = item
        elif not is_extra(name):
            raise UnsavableError(
                f"{name} in the state_dict of {type(model).__name__} is a {type(item).__name__}: "
                "parameters and buffers are tensors, and get_extra_state is for all else"
            )
    return tensors


def refuse_unmade(model: nn.Module) -> None:
    """Refuse parameters and buffers that have no numbers yet.

    Raises:
        ConfigError: naming the first of them.
    """
    for name, item in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(item, UninitializedParameter | UninitializedBuffer):
            raise ConfigError(
                f"model.use: {name} has no shape before the first use of its lazy module: it "
                "can be neither sent to other ranks nor saved: give the module its sizes, or run a "
                "batch through the model where it is built"
            )
        if item.device.type == "meta":
            raise ConfigError(
                f"model.use: {name} is on the device meta and has no numbers: build the model on "
                "the host"
            )


def is_extra(name: str) -> bool:
    """Tell whether a name in a state_dict is that of an extra state."""
    return name.rpartition(".")[2] == _KEY


def capture_extra_states(model: nn.Module, tensors: MutableMapping[str, Tensor]) -> dict[str, Json]:
    """Return the extra state of every module that has one, as JSON, by names of a state_dict.

    Args:
        model: whose modules.
        tensors: takes the tensors of the states.

    Raises:
        UnsavableError: if a state is more than tensors, numbers, texts and containers of these, or
            its module could not take it back.
    """

    def facts(tensor: Tensor) -> Mapping[str, Json]:
        return {} if tensor.device.type == "cpu" else {"on_device": True}

    found = {}
    for name, module in _with_extra_state(model):
        if type(module).set_extra_state is nn.Module.set_extra_state:
            raise UnsavableError(
                f"{name}: {type(module).__name__} has get_extra_state, and no set_extra_state to "
                "take it back"
            )
        found[name] = encode(module.get_extra_state(), EXTRA + name, tensors, facts)
    return found


def restore_extra_states(
    model: nn.Module,
    saved: Mapping[str, Json],
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Give every module its extra state back.

    Raises:
        CheckpointError: if a module that had one has none any more.
    """

    def place(tensor: Tensor, facts: Mapping[str, Json]) -> Tensor:
        return tensor.to(device if "on_device" in facts else "cpu", copy=True)

    modules = dict(_with_extra_state(model))
    for name, value in saved.items():
        if name not in modules:
            raise CheckpointError(f"the checkpoint has {name}, and the model has no such module")
        modules[name].set_extra_state(decode(value, tensors, place))


def _with_extra_state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    plain = PlainNames(model)
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield plain(f"{name}.{_KEY}".removeprefix(".")), module
