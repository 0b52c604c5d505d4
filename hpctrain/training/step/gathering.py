"""The order in which units are gathered: every rank's, in every pass, or tensors would mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from hpctrain.errors import TrainingError
from hpctrain.topology import Communicator
from hpctrain.training.step.call import Call, Method
from hpctrain.utils.text import listed


class GatherOrder:
    """Compares the units of every pass with those of the first one, on this rank.

    Ranks that skip different units would gather rows of one with rows of the other, and say
    nothing of it where these have the same shape. Costs a comparison of two short lists a pass:
    FSDP notes the order for itself.
    """

    def __init__(self, root: FSDPModule, communicator: Communicator) -> None:
        """Begin without a pass.

        Args:
            root: what gathers the units.
            communicator: of all ranks.
        """
        # Has the list from the first pass on. Source: torch.distributed.fsdp of torch 2.13,
        # FSDPParamGroup._record_post_forward.
        self._context: Any = root._get_fsdp_state()._comm_ctx
        self._communicator = communicator
        # With gradients, and without: an evaluation may call other modules.
        self._orders: dict[bool, list[Any]] = {}
        self._agreed: set[bool] = set()

    def watched(self, call: Call) -> Call:
        """Return a call whose passes are looked at.

        Its TrainingError, on this rank, names the units that were skipped.
        """

        def watched(method: Method, fields: Mapping[str, Tensor]) -> Any:
            first = len(getattr(self._context, "post_forward_order", ()))
            result = call(method, fields)
            order = self._context.post_forward_order[first:]
            trains = torch.is_grad_enabled()
            if not (trains or any(_names(order))):
                return result  # an evaluation may do without the model, as on outputs it has kept
            expected = self._orders.setdefault(trains, order)
            if order != expected:
                raise TrainingError(_difference(_names(expected), _names(order)))
            return result

        return watched

    def agree(self) -> None:
        """Compare the order of first passes over the ranks, once. Collective: all ranks.

        Raises:
            TrainingError: on every rank, naming the units that one of them has skipped.
        """
        for kind in sorted(self._orders.keys() - self._agreed):
            self._agreed.add(kind)
            orders = self._communicator.all_gather(_names(self._orders[kind]))
            longest = max(orders, key=len)
            for rank, order in enumerate(orders):
                if order != longest:
                    what = _difference(longest, order)
                    raise TrainingError(f"rank {rank}: {what}", everywhere=True)


def _names(groups: Sequence[Any]) -> list[str]:
    return [str(group._module_fqn).removeprefix("module.") for group in groups]


def _difference(expected: Sequence[str], order: Sequence[str]) -> str:
    skipped = [name for name in expected if name not in order]
    if skipped:
        what = f"{listed(skipped)} {'was' if len(skipped) == 1 else 'were'} not called in this pass"
    else:
        pairs = zip(expected, order, strict=False)
        before, now = next(
            (pair for pair in pairs if pair[0] != pair[1]), (f"{len(expected)} calls", len(order))
        )
        what = f"units were called in another order in this pass: {now} in place of {before}"
    return (
        f'training.strategy = "fsdp": {what}. Every rank has to call every unit in every pass, as '
        "they gather its parameters together: gather it with a module around it, by naming that in "
        "training.shard"
    )
