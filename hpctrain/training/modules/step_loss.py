"""Loss of a `training_step`: a mean over its samples, or over weights such as tokens, as a sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpctrain.errors import TrainingError
from hpctrain.training.modules.overrides import place_of


class StepLoss:
    """What a `training_step` returns, as a sum of losses and what that is a mean of.

    Attributes:
        counts_samples: whether a loss is a mean over samples.
        checked: whether it stays so, as the dry run has found it.
    """

    def __init__(self, kind: Literal["mean", "sum"]) -> None:
        self._kind = kind
        self.counts_samples = True
        self.checked = False

    def sum_of(self, module: nn.Module, output: Any, samples: int) -> tuple[Tensor, Tensor | int]:
        """Return the sum of the losses of a pass, and the weight of what they are a mean of.

        Args:
            module: whose step, for messages.
            output: what the step has returned.
            samples: of the pass.

        Raises:
            TrainingError: if it is no loss, or a mean over something else than before.
        """
        weight: Tensor | int | None = None
        if isinstance(output, Mapping):
            loss, weight = output.get("loss"), output.get("weight")
        else:
            loss = output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TrainingError(_no_loss(module, output))
        if loss.ndim:
            loss = loss.reshape(())
        if loss.element_size() < 4:
            loss = loss.float()
        if weight is None:
            if not self.counts_samples:
                raise TrainingError(_other_weight(module, "no weight", "one"))
            return (loss if self._kind == "sum" else loss * samples), samples
        if self.checked and self.counts_samples:
            raise TrainingError(_other_weight(module, "a weight", "none"))
        self.counts_samples = False
        weight = torch.as_tensor(weight, device=loss.device)
        return (loss if self._kind == "sum" else loss * weight.detach()), weight


def _no_loss(module: nn.Module, output: Any) -> str:
    where = place_of(module, "training_step")
    kind = type(module).__name__
    if output is None:
        return (
            f"{kind}.training_step ({where}) returned None: a step that is left out on one rank is "
            "one that the others wait for. Return 0 times a loss, or leave such samples out of the "
            "data"
        )
    if isinstance(output, Mapping):
        what = f"a dict with {', '.join(map(str, output)) or 'nothing'}"
    elif isinstance(output, Tensor):
        what = f"a tensor {tuple(output.shape)}"
    else:
        what = type(output).__name__
    return (
        f'{kind}.training_step ({where}) returned {what}: expected one number, or {{"loss": mean}} '
        'and with it "weight" where it is a mean over something else than samples'
    )


def _other_weight(module: nn.Module, now: str, before: str) -> str:
    return (
        f"{type(module).__name__}.training_step ({place_of(module, 'training_step')}) returned "
        f"{now}, and {before} in the dry run: a loss is a mean over samples, or over weights, in "
        "every step"
    )
