"""Changes to gathered parameters: these are copies, so that what a pass does to them is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpctrain.errors import TrainingError
from hpctrain.utils.text import listed

Gathered = list[tuple[str, Tensor, Tensor]]
"""Name, parameter, and what its values were."""


@contextmanager
def refused_lost_changes(
    model: nn.Module, units: Sequence[nn.Module], whole: Sequence[str]
) -> Iterator[None]:
    """Watch the forward passes in the body, and refuse changes that would be lost.

    Args:
        model: whose parameters.
        units: that are gathered.
        whole: names of parameters that every rank has.

    Raises:
        TrainingError: on this rank, after the body, naming the parameters.
    """
    before: dict[nn.Module, Gathered] = {}
    changed: dict[str, None] = {}

    def enter(unit: nn.Module, *_: Any) -> None:
        before[unit] = [
            (name, item, item.detach().clone())
            for name, item in model.named_parameters()
            if not hasattr(item, "to_local") and name not in whole
        ]

    def leave(unit: nn.Module, *_: Any) -> None:
        for name, item, value in before.pop(unit, []):
            if not torch.equal(item.detach(), value):
                changed[name] = None

    # After FSDP's own that gathers, and before the one that lets go.
    hooks = [unit.register_forward_pre_hook(enter) for unit in units]
    hooks += [unit.register_forward_hook(leave, prepend=True) for unit in units]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if changed:
        raise TrainingError(
            f"the forward pass changes the parameters {listed(list(changed))}, and with "
            'training.strategy = "fsdp" it has copies of them, so that this would be lost. Set it '
            'to "ddp", or change them by functions of torch, which a trial of the model sees'
        )
