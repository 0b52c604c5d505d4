"""Parameters without a part in a step, where one process has nobody to wait for them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers.steps import batch, make_step
from torch import Tensor, nn

from hpctrain.training.parallel.unused_parameters import UnusedParameters


class Branches(nn.Module):
    """Two of which one runs at a time, and one that none knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 3)
        self.left, self.right, self.forgotten = (nn.Linear(3, 3) for _ in range(3))
        self.goes_left = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        output: Tensor = self.left(x) if self.goes_left else self.right(x)
        return output


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_one_process_says_so_once_and_leaves_them_as_they_are(
    optimizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Branches()
    step = make_step(model, optimizer=optimizer, clip_norm=1.0)
    with caplog.at_level(logging.INFO, logger="hpctrain"):
        step.dry_run()
        assert not caplog.messages
        for goes_left in (True, False, True):
            model.goes_left = goes_left
            before = {name: item.clone() for name, item in model.named_parameters()}
            step(batch(), 0.1)
            moved = {
                name.split(".")[0]
                for name, item in model.named_parameters()
                if not torch.equal(item, before[name])
            }
            assert moved == {"trunk", "left" if goes_left else "right"}
    (said,) = caplog.messages
    assert said == (
        "4 of 8 parameters had no part in the loss of a step: right.weight, right.bias, "
        "forgotten.weight, forgotten.bias. In such a step the optimizer leaves them as they are"
    )


def test_ranks_that_do_not_look_for_them_are_told_what_helps() -> None:
    unused = UnusedParameters("error", 2)
    unused.at_start = frozenset({"forgotten.weight"})
    with pytest.raises(Exception, match=r"forgotten\.weight had no .* nor in .* remove them"):
        unused.met(["forgotten.weight"], 3)
    with pytest.raises(Exception, match=r"^left\.weight had no .* \(and 1 more in neither\)"):
        unused.met(["left.weight", "forgotten.weight"], 3)
    UnusedParameters("allow", 2).met(["left.weight"], 3)
