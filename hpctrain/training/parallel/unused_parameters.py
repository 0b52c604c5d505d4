"""Unused parameters, without a part in the loss: experts, layers left out, heads, mistakes."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hpctrain.errors import TrainingError
from hpctrain.training.model.wrappers import Method
from hpctrain.utils.text import listed, plural

logger = logging.getLogger("hpctrain")

_SHOWN = 8


def reach_all(model: nn.Module, fields: Any) -> tuple[Tensor, int]:
    """Return a loss of 0 from which a backward pass comes to every trained parameter, with nothing.

    In place of `task.loss` for a rank without samples: no code of the user runs, and DDP, which
    waits for every parameter, takes each for one that had no part.

    Args:
        model: whose parameters.
        fields: not looked at.

    Returns:
        The loss, (), and the weight 0.
    """
    trained = [item for item in model.parameters() if item.requires_grad]
    loss_sum: Tensor = _Reach.apply(*trained)  # type: ignore[no-untyped-call]
    return loss_sum, 0


def reaching_all(method: Method) -> Method:
    """Return a loss that every parameter is reached from, whichever have a part in it."""

    def loss(model: nn.Module, fields: Any) -> tuple[Tensor, Any]:
        loss_sum, weight = method(model, fields)
        return loss_sum + reach_all(model, fields)[0], weight

    return loss


def differentiable(method: Method, unused: UnusedParameters, *, spread: bool) -> Method:
    """Return a loss that has a backward pass, and a weight that has none.

    A loss that no parameter has a part in, such as that of a batch without targets, is a number as
    any other, and its gradients are none: where ranks may lack gradients that others have.

    Args:
        method: `task.loss`.
        unused: what is allowed.
        spread: whether the others wait for this rank's part of the parameters in a backward pass.
    """

    def loss(model: nn.Module, fields: Any) -> tuple[Tensor, Any]:
        loss_sum, weight = method(model, fields)
        if not loss_sum.requires_grad and torch.is_grad_enabled():
            if spread or not unused.allowed:
                raise TrainingError(_NO_PART + ("" if spread else _OR_ALLOW))
            loss_sum = loss_sum + reach_all(model, fields)[0]
        if isinstance(weight, Tensor) and weight.requires_grad:
            weight = weight.detach()
        return loss_sum, weight

    return loss


_NO_PART = (
    "no parameter had a part in the loss of a pass, and the other ranks wait for its gradients: "
    "add 0 times an output of the model to the loss"
)
_OR_ALLOW = ', or set training.unused_parameters = "allow"'


class _Reach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return (None,) * ctx.count


class UnusedParameters:
    """What a run says of parameters without a part in a step, and when it is a mistake.

    Attributes:
        allowed: whether ranks look for them, and add zeros where another rank had a gradient.
        at_start: those that had no part in the dry run.
    """

    def __init__(self, policy: str, world_size: int) -> None:
        """Begin without having met any.

        Args:
            policy: "error" or "allow", as `training.unused_parameters` has it.
            world_size: number of ranks; one alone has nobody to wait for it.
        """
        self.allowed = policy == "allow" or world_size == 1
        self.at_start: frozenset[str] = frozenset()
        self._reported = False

    def met(self, names: Sequence[str], total: int) -> None:
        """Take note of a step in which these had no part, on any rank if it is allowed.

        Raises:
            TrainingError: naming them, if it is not.
        """
        if not self.allowed:
            raise TrainingError(_refusal(names, self.at_start))
        if not self._reported:
            self._reported = True
            logger.info(
                "%d of %s had no part in the loss of a step: %s. In such a step the optimizer "
                "leaves them as they are",
                len(names),
                plural(total, "parameter"),
                listed(names, _SHOWN),
            )


def _refusal(names: Sequence[str], at_start: Collection[str]) -> str:
    never = [name for name in names if name in at_start]
    some = [name for name in names if name not in at_start]
    allow = 'set training.unused_parameters = "allow": then missing parts count as zeros'
    branches = "(experts, layers left out at random, auxiliary heads)"
    if never and not some:
        return (
            f"{listed(never, _SHOWN)} had no part in the loss of this step, nor in that of the dry "
            "run: remove them, or set requires_grad = False. Where they have a part in some passes "
            f"only {branches}, {allow}"
        )
    return (
        f"{listed(some, _SHOWN)} had no part in the loss of this step, and in the first one had"
        f"{f' (and {len(never)} more in neither)' if never else ''}: the ranks reduce the "
        "gradients of all parameters in every step. Where a branch of the model is left out now "
        f"and then {branches}, {allow}"
    )


def unreduced(check: Callable[[], None], names: Sequence[str]) -> list[str]:
    """Return the parameters that a backward pass under DDP has not come to, by their names.

    Args:
        check: DDP's own, which counts what it waits for.
        names: of all trained parameters, in the order of the model.
    """
    try:
        check()
    except RuntimeError as error:
        found = re.search(r"did not receive grad for rank \d+: *([\d ]+)", str(error))
        if found is None:
            raise
        return [names[int(index)] for index in found[1].split()]
    return []


class Uses:
    """Which parameters the backward passes of a step came to, where FSDP fills up the others.

    Attributes:
        counting: whether a pass counts: not where a rank has no samples.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        """Begin without a pass.

        Args:
            names: of all trained parameters, the same on all ranks.
            device: of this rank.
        """
        self.counting = True
        self._names = list(names)
        self._device = device
        self._used: set[str] = set()
        self._watches = False

    def watch(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Look at what autograd gives gradients to."""
        self._watches = True
        for name, item in parameters:
            item.register_post_accumulate_grad_hook(functools.partial(self._arrive, name))

    def begin(self) -> None:
        """Forget the passes of the step before."""
        self._used.clear()

    def missing(self) -> list[str]:
        """Return those that no pass with samples of this rank came to; none where it has none."""
        if not (self._watches and self._used):
            return []
        return [name for name in self._names if name not in self._used]

    def missing_everywhere(self) -> list[str]:
        """Return those that no pass of any rank came to. Waits for the device.

        Collective: all ranks.
        """
        used = torch.tensor([name in self._used for name in self._names], dtype=torch.uint8)
        used = used.to(self._device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        return [name for name, flag in zip(self._names, used.tolist(), strict=True) if not flag]

    def _arrive(self, name: str, _: Tensor) -> None:
        if self.counting:
            self._used.add(name)
