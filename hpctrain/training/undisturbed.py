"""Passes through a model that training must not notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def kept_generators() -> AbstractContextManager[None]:
    """Return a context after which torch's generators stand where they stood."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    return torch.random.fork_rng(devices=devices)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Run batch norms in the body on their statistics, and do not add to these."""
    training = [item for item in model.modules() if isinstance(item, _NormBase) and item.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the model in the body as `eval()` has it; every module's flag is then as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
