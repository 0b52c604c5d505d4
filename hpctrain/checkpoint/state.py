"""Optimizer and random generators, to tensors and JSON and back, to the bit."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpctrain.errors import CheckpointError


class HasParameters(Protocol):
    """A model, or what one rank holds of it."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return the parameters by name."""
        ...


def optimizer_to_tensors(optimizer: Optimizer, model: HasParameters) -> dict[str, Tensor]:
    """Return the state of an optimizer as {"parameter/slot": tensor}.

    Hyperparameters are not part of it: they come from the config.

    Raises:
        CheckpointError: if the optimizer keeps something else than tensors and numbers.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            if value is None:  # a slot that is not in use, which is as good as none
                continue
            if isinstance(value, bool | int | float):
                value = torch.tensor(value)  # noqa: PLW2901
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {slot!r}: only "
                    "tensors and numbers can be saved"
                )
            tensors[f"{names[parameter]}/{slot}"] = value
    return tensors


def load_optimizer(
    optimizer: Optimizer, model: HasParameters, tensors: Mapping[str, Tensor]
) -> None:
    """Put saved state back, on the device of each parameter.

    Raises:
        CheckpointError: if a tensor belongs to no parameter.
    """
    parameters = dict(model.named_parameters())
    # load_state_dict would cast moments to the dtype of the parameter; saved is saved.
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"the checkpoint has optimizer state of {name!r}, the model not")
        parameter = parameters[name]
        # Step counts stay on the host unless the optimizer's kernels want them on the device.
        fused = any(
            group.get("fused") or group.get("capturable") for group in optimizer.param_groups
        )
        device = parameter.device if tensor.ndim or fused else torch.device("cpu")
        if tensor.shape == parameter.shape:
            # In the order in memory that the parameter has: fused kernels take it for granted.
            kept = torch.empty_like(parameter, dtype=tensor.dtype, device=device)
            optimizer.state[parameter][slot] = kept.detach().copy_(tensor)
        else:
            optimizer.state[parameter][slot] = tensor.to(device, copy=True)


def rng_to_tensors() -> tuple[dict[str, Tensor], Any]:
    """Return the state of the generators of torch (host and device), numpy and Python."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - users' transforms draw from it
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).view(np.uint8).copy())
    version, internal, gauss = random.getstate()
    tensors["python"] = torch.tensor(internal, dtype=torch.int64)
    return tensors, {"numpy": [kind, *rest], "python": [version, gauss]}


def restore_rng(tensors: Mapping[str, Tensor], values: Any) -> None:
    """Put the generators back."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    kind, *rest = values["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().view(np.uint32), *rest))  # noqa: NPY002
    version, gauss = values["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
