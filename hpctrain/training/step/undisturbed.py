"""Passes through a model that training must not notice."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Leave the generators of torch, numpy and Python as they stood before the body."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - users draw from it
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Leave the buffers of a model, such as batch statistics, as they were before the body."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def copied_buffers(model: nn.Module) -> Iterator[None]:
    """Have copies in place of a model's buffers in the body.

    Its backward pass may come after that: what it needs of the copies is not touched any more.
    """
    before = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    copies: dict[Tensor, Tensor] = {}  # one that is in two modules stays one
    for module, buffers in before:
        for name, buffer in buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(buffer, buffer.clone())
    try:
        yield
    finally:
        for module, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Set the train flag of just these modules to False in the body."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def with_statistics(model: nn.Module) -> list[nn.Module]:
    """Return the modules that keep running statistics of batches: batch norms and their like."""
    return [module for module in model.modules() if isinstance(module, _NormBase)]
