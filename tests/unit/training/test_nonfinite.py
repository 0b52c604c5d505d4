"""Numbers that lie: what is done, and what is said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.steps import CPU, WORLD, batch, make_step
from torch import nn

from hpctrain.config.schema import TrainingSection
from hpctrain.errors import TrainingError
from hpctrain.models.mlp import MLP
from hpctrain.training.nonfinite import (
    MOST_ROLLBACKS,
    RECENT_STEPS,
    BadBatch,
    BadStepPolicy,
    BadSteps,
    SpikeWatch,
    explain,
)
from hpctrain.training.optim.ema import WeightAverage
from hpctrain.training.position import Position


class Policy:
    """A policy with its surroundings, and the story of what they were asked."""

    def __init__(self, on_bad_steps: Any, checkpoint: int = 40) -> None:
        self.told: list[str] = []
        self.returns = 0
        self.checkpoint = checkpoint
        section = TrainingSection(max_steps=1, max_bad_steps=3, on_bad_steps=on_bad_steps)
        self._policy = BadStepPolicy(
            section,
            explain=lambda step: f"what was known at {step}",
            roll_back=self._roll_back,
            warn=self.told.append,
        )

    def _roll_back(self) -> int:
        self.returns += 1
        return self.checkpoint

    def judge(self, most: int, skipped: int) -> None:
        numbers = {"most_bad_steps": float(most), "skipped_steps": float(skipped)}
        self._policy.judge(Position(step=50), numbers)


def test_few_bad_steps_are_told_and_many_end_the_run() -> None:
    policy = Policy("abort")
    for most, skipped in [(0, 0), (2, 2), (0, 2)]:
        policy.judge(most, skipped)
    assert len(policy.told) == 1
    assert "2 of the last steps" in policy.told[0]
    with pytest.raises(
        TrainingError, match=r"for 3 steps in a row.*what was known at 50"
    ) as raised:
        policy.judge(3, 5)
    assert raised.value.everywhere


def test_skipping_goes_on_and_does_not_repeat_itself() -> None:
    policy = Policy("skip")
    for most in range(100):
        policy.judge(most, most)
    rows = [line for line in policy.told if "in a row" in line]
    assert len(rows) == 6  # after 3, 6, 12, 24, 48 and 96
    policy.judge(0, 99)
    policy.judge(3, 102)
    assert len([line for line in policy.told if "in a row" in line]) == 7


def test_going_back_ends_where_it_does_not_help() -> None:
    policy = Policy("rollback")
    for number in range(MOST_ROLLBACKS):
        policy.judge(3, 3 * number)
    policy.checkpoint = 60  # a new one: what was tried before does not count
    policy.judge(3, 20)
    assert policy.returns == MOST_ROLLBACKS + 1
    policy.checkpoint = 40
    with pytest.raises(TrainingError, match="returns to step 40 have not helped"):
        policy.judge(3, 30)


def test_spikes_are_noted_and_noise_is_not() -> None:
    generator = np.random.default_rng(0)
    watch = SpikeWatch()
    noise = [2 - step / 200 + 0.2 * generator.standard_normal() for step in range(200)]
    assert [watch.look(loss) for loss in noise] == [None] * 200
    assert watch.look(9.0) is not None
    assert watch.look(math.nan) is None  # what is not a number ends elsewhere
    assert watch.look(1.0) is None
    assert watch.look(9.0) is not None  # the one before does not hide it


def test_the_newest_flags_are_remembered() -> None:
    counter, flags = BadSteps(CPU), []
    for number in range(RECENT_STEPS + 100):
        flags.append(float(number % 7 == 0))
        counter.next_flag().fill_(flags[-1])
        if number in (3, 70, 300):
            counter.counts()
    assert counter.recent().tolist() == flags[-RECENT_STEPS:]


def test_bad_batches_are_known_by_their_step() -> None:
    step = make_step(MLP(6, 3))
    step.dry_run()
    for number in range(5):
        data = batch()
        if number in (1, 3, 4):
            data.fields["x"][2, 0] = math.inf
        step(data, 0.02)
    found = step.bad_batches(105)
    assert [item.step for item in found] == [102, 104, 105]
    assert not any(item.loss_is_finite for item in found)


class Loader:
    """Three shards of ten rows, of which a batch is what it is told."""

    def __init__(self, rows: list[int], bad: list[int]) -> None:
        self._rows = np.array(rows)
        self._bad = bad

    def rows(self, epoch: int, start: int, stop: int) -> Any:
        return self._rows

    def runs(self, rows: Any) -> list[tuple[str, int, int]]:
        return [(f"{row // 10}.h5", row % 10, row % 10) for row in rows.tolist()]

    def read(self, rows: Any) -> dict[str, Any]:
        values = np.zeros((len(rows), 4), np.float32)
        values[np.isin(rows, self._bad), 1] = np.nan
        return {"image": values, "label": np.zeros(len(rows), np.int64)}


def bad_batch(step: int, *, finite: bool = False) -> BadBatch:
    return BadBatch(step=step, epoch=1, start=64, global_size=32, loss_is_finite=finite)


@pytest.mark.parametrize(
    ("batches", "bad", "expected"),
    [
        ([], [], "not known any more"),
        ([bad_batch(9, finite=True)], [], "the loss was finite on every rank"),
        (
            [bad_batch(3), bad_batch(8), bad_batch(9)],
            [12],
            (
                "first in step 8 (epoch 1, samples 65 to 96 of it); the loss was not finite on "
                "rank 0 on here: not finite in the data: image of 1.h5 row 2"
            ),
        ),
        ([bad_batch(9)], [], "0.h5 row 3, 1.h5 row 2, 2.h5 row 9 (all values of the data are"),
    ],
)
def test_the_samples_of_a_bad_batch_are_named(
    batches: list[BadBatch], bad: list[int], expected: str
) -> None:
    loader: Any = Loader([12, 3, 29], bad)
    assert expected in explain(batches, loader, WORLD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_moving_average_is_what_it_says(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to(dtype)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, 0.9)
    expected = model.weight.detach().double().clone()
    for step in range(1, 40):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3).to(dtype))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    state = average.state()
    assert list(state) == ["weight"]
    assert state["weight"].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    torch.testing.assert_close(state["weight"].double(), expected, rtol=1e-5, atol=1e-5)

    before = model.weight.clone()
    with average.in_model():
        assert torch.equal(model.weight, state["weight"].to(dtype))
    assert torch.equal(model.weight, before)
    other = WeightAverage(model, 0.9)
    other.load(state)
    assert torch.equal(other.state()["weight"], state["weight"])
