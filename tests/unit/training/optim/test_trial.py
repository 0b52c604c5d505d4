"""What an optimizer keeps and could not be saved is named before the first step."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import schedulefree
import torch
from helpers import optimizer_zoo as zoo
from prodigyopt import Prodigy
from torch import nn
from torch.optim import Optimizer

from hpctrain.checkpoint.optimizer_state import OptimizerState, SavedOptimizer
from hpctrain.config.schema import ParameterGroup, SchedulerSection
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.training.optim.optimizer import build_optimizer
from hpctrain.training.optim.trial import TriedOptimizer, by_pattern, try_optimizer

GROUPS = (ParameterGroup(pattern="0.*", weight_decay=0.0), ParameterGroup(pattern="*.bias"))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 70, 3), nn.Linear(500, 400), nn.Linear(1, 1))


def tried(
    kind: Callable[..., Any],
    arguments: Mapping[str, Any] | None = None,
    *,
    groups: tuple[ParameterGroup, ...] = (),
    rows: bool = False,
    ranks: int = 1,
    model: nn.Module | None = None,
) -> TriedOptimizer | None:
    def build(held: Any) -> Optimizer:
        return build_optimizer(kind, held, 0.01, arguments or {}, groups=groups)

    model = network() if model is None else model
    build(model)
    return try_optimizer(build, model, by_pattern(groups), rows=rows, ranks=ranks)


class Caches(zoo.Plain):
    """Prepares in its first step what it needs, and keeps no numbers."""

    def learn(self, group: dict[str, Any]) -> float:
        self.mine = [item for each in self.param_groups for item in each["params"]]
        self.ready = True
        return 1.0


@pytest.mark.parametrize(
    "kind",
    [
        *(*zoo.ALL, zoo.SecondSet, Caches, Prodigy, schedulefree.SGDScheduleFree),
        *(torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.Adagrad),
    ],
)
def test_what_can_be_saved_passes(kind: type[Optimizer]) -> None:
    shown = tried(kind)
    assert shown is not None
    learning = zoo.GroupState, zoo.ArgumentState, zoo.TensorGroups, zoo.OldRAdam, zoo.OtherKeys
    assert (
        shown.learns == (kind in (*learning, zoo.SecondSet, Prodigy, schedulefree.SGDScheduleFree))
        or kind is zoo.SecondSet
    )


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (zoo.SAM, "cannot take a step .* no closure: AssertionError: SAM requires closure"),
        (zoo.Counts, "changes its attribute steps"),
        (zoo.Wraps, "changes its attribute base"),
        (zoo.Draws, "changes its attribute generator"),
        (zoo.DrawsInPython, "changes its attribute random"),
        (zoo.SetsItsRate, "changes `lr` itself"),
        (zoo.Foreign, r"history is a helpers\.optimizer_zoo\.History"),
        (zoo.ForeignGroup, r"history is a helpers\.optimizer_zoo\.History"),
        (zoo.Alias, "keeps the parameter .* itself"),
        (zoo.OwnFactory, "a function of its own"),
        (zoo.ChangesItsState, r"is another one after eval\(\)"),
    ],
)
def test_what_cannot_be_saved_is_named_at_the_start(kind: type[Optimizer], what: str) -> None:
    with pytest.raises(ConfigError, match=f"use: .*{kind.__name__}.*{what}|{what}"):
        tried(kind)


class Hidden(zoo.Plain):
    """Keeps its numbers where nobody would look."""

    table: dict[int, float] = {}  # noqa: RUF012 - that is the fault

    def learn(self, group: dict[str, Any]) -> float:
        self.table[id(self)] = self.table.get(id(self), 1.0) * 0.5
        return self.table[id(self)]


class SharesMemory(zoo.Plain):
    def update(self, state: dict[str, Any], parameter: torch.Tensor) -> float:
        state["view"] = parameter.detach().view(-1)
        return 1.0


def test_what_hides_is_found_by_going_on() -> None:
    with pytest.raises(ConfigError, match="goes on in another way after a restart"):
        tried(Hidden)
    with pytest.raises(ConfigError, match="keeps the memory of the parameter"):
        tried(SharesMemory)


@pytest.mark.parametrize(
    ("kind", "fits"),
    [(zoo.Lion, True), (torch.optim.AdamW, True), (zoo.GroupState, True), (zoo.ListState, False)],
)
def test_rows_of_parameters_have_state_of_their_shape(kind: type[Optimizer], fits: bool) -> None:
    if fits:
        tried(kind, rows=True)
        return
    with pytest.raises(ConfigError, match=r'has not the shape of a parameter.*Use "ddp"'):
        tried(kind, rows=True)


def test_ranks_that_draw_their_own_numbers_would_drift_apart() -> None:
    assert tried(zoo.DrawsFromAll) is not None
    assert tried(zoo.DrawsFromAll, rows=True, ranks=2) is not None  # each rank has its own rows
    with pytest.raises(ConfigError, match="DrawsFromAll draws random numbers in its steps"):
        tried(zoo.DrawsFromAll, ranks=2)
    assert tried(torch.optim.AdamW, ranks=2) is not None


class WithoutRate(Optimizer):
    """Finds its step size by itself, as A2Grad does."""

    def __init__(self, params: Any, lr: float | None = None) -> None:
        super().__init__(params, {"scale": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for item in group["params"]:
                if item.grad is not None:
                    item.sub_(item.grad, alpha=group["scale"])


class OwnRate(WithoutRate):
    """Takes the rate when it is built, and looks at no other."""

    def __init__(self, params: Any, lr: float) -> None:
        Optimizer.__init__(self, params, {"lr": lr, "scale": lr})


@pytest.mark.parametrize("kind", [WithoutRate, OwnRate])
@pytest.mark.parametrize(
    ("scheduler", "factor", "named"),
    [
        (SchedulerSection(use="cosine"), 1.0, 'use = "cosine"'),
        (SchedulerSection(warmup_epochs=0.5), 1.0, 'use = "constant"'),
        (SchedulerSection(), 0.1, "lr_factor"),
        (SchedulerSection(), 1.0, None),
    ],
)
def test_learning_rates_that_would_change_nothing_are_refused(
    kind: type[Optimizer], scheduler: SchedulerSection, factor: float, named: str | None
) -> None:
    groups = (ParameterGroup(pattern="0.*", lr_factor=factor),)
    found = tried(kind, groups=groups)
    assert found is not None
    if named is None:
        found.check_schedule(scheduler, groups)
        return
    with pytest.raises(ConfigError, match=re.escape(named)) as caught:
        found.check_schedule(scheduler, groups)
    assert kind.__name__ in str(caught.value)


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.AdamW, Prodigy, schedulefree.AdamWScheduleFree, zoo.Late]
)
def test_optimizers_that_read_the_rate_may_have_schedules(kind: type[Optimizer]) -> None:
    found = tried(kind)
    assert found is not None
    found.check_schedule(SchedulerSection(use="cosine"), GROUPS)


def test_groups_and_other_dtypes_have_their_stand_ins() -> None:
    seen: list[tuple[torch.dtype, int]] = []

    class Records(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                seen.extend((item.dtype, item.ndim) for item in group["params"])
                assert all(item.numel() <= 2**16 for item in group["params"])

    model = network()
    model[2] = nn.Linear(1, 1, dtype=torch.complex64)
    tried(Records, groups=GROUPS, model=model)
    assert {(torch.float32, 4), (torch.float32, 2), (torch.float32, 1)} <= set(seen)
    assert (torch.complex64, 2) in seen


def test_a_trial_leaves_nothing_behind() -> None:
    def draws() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.random()), random.random()  # noqa: NPY002

    model = network()
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    expected = draws()
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])
    tried(torch.optim.AdamW, model=model)
    assert draws() == expected


def saved_after_a_step(kind: type[Optimizer], **arguments: Any) -> SavedOptimizer:
    model = network()
    optimizer = build_optimizer(kind, model, 0.01, arguments)
    state = OptimizerState(optimizer)
    for item in model.parameters():
        item.grad = torch.ones_like(item)
    optimizer.step()
    return state.capture(model)


def test_what_a_checkpoint_lacks_is_named_before_a_step_misses_it() -> None:
    plain = saved_after_a_step(torch.optim.AdamW)
    shown = tried(torch.optim.AdamW, {"amsgrad": True})
    assert shown is not None
    with pytest.raises(CheckpointError, match=r"needs max_exp_avg_sq of 0\.weight"):
        shown.check(plain)
    with pytest.raises(CheckpointError, match=r"of torch\.optim\.sgd\.SGD, has none"):
        shown.check(saved_after_a_step(torch.optim.SGD, momentum=0.9))
    adam = tried(torch.optim.Adam)
    assert adam is not None
    adam.check(plain)


def test_an_old_checkpoint_without_what_was_learned_is_refused() -> None:
    """Also one without a tensor: it has nothing beside what it learns in its groups."""
    for kind in (zoo.GroupState, Prodigy):
        shown = tried(kind)
        assert shown is not None
        old = SavedOptimizer(saved_after_a_step(kind).tensors, None)
        with pytest.raises(ConfigError, match=r"^optimizer\.use: .* would go on as another run"):
            shown.check(old)
