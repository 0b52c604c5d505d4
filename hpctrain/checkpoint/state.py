"""Random generators, to tensors and JSON and back, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hpctrain.accelerator import generator_state, set_generator_state


class HasParameters(Protocol):
    """A model, or what one rank holds of it."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return the parameters by name."""
        ...


def rng_to_tensors(device: torch.device) -> tuple[dict[str, Tensor], Any]:
    """Return the state of the generators of torch (host and this device), numpy and Python."""
    tensors = {"torch": torch.get_rng_state()}
    own = generator_state(device)
    if own is not None:
        tensors[device.type] = own
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - users' transforms draw from it
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).view(np.uint8).copy())
    version, internal, gauss = random.getstate()
    tensors["python"] = torch.tensor(internal, dtype=torch.int64)
    return tensors, {"numpy": [kind, *rest], "python": [version, gauss]}


def restore_rng(tensors: Mapping[str, Tensor], values: Any, device: torch.device) -> None:
    """Put the generators back; that of another type of device has nothing to say here."""
    torch.set_rng_state(tensors["torch"])
    if device.type in tensors:
        set_generator_state(device, tensors[device.type])
    kind, *rest = values["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().view(np.uint32), *rest))  # noqa: NPY002
    version, gauss = values["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
