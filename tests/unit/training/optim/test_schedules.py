"""Learning rates: shapes, units, warm-ups, chains, and the plateau that remembers."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch

from hpctrain.config.registry import BUILTINS, resolve
from hpctrain.config.schema import SchedulerSection
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.training.optim.lr_scheduler import LearningRate
from hpctrain.training.optim.schedules import Chained, Plateau
from hpctrain.training.position import Position, StopAt

EPOCH, BATCH, EPOCHS = 100, 10, 12
HORIZON = StopAt(
    max_epochs=EPOCHS,
    max_steps=None,
    max_samples=None,
    epoch_samples=EPOCH,
    global_batch_size=BATCH,
)
PLACES = [Position()]
for _ in range(EPOCHS * EPOCH // BATCH):
    PLACES.append(PLACES[-1].after(BATCH, EPOCH))
END = PLACES[-1]

ARGUMENTS: dict[str, dict[str, Any]] = {
    "chained": {"parts": [{"use": "constant", "until": 3}, {"use": "linear"}]},
    "inverse_square_root": {"timescale": 10},
    "multistep": {"milestones": [3, 6]},
    "step": {"every": 4},
}


def schedule(use: str, arguments: dict[str, Any] | None = None, **section: Any) -> LearningRate:
    chosen = SchedulerSection(use=use, arguments=arguments or {}, **section)
    return LearningRate.of(chosen, resolve("scheduler", chosen), 1.0, HORIZON)


def rates(lr: LearningRate) -> list[float]:
    return [lr(place, END) for place in PLACES[:-1]]


@pytest.mark.parametrize("use", sorted(BUILTINS["scheduler"]))
@pytest.mark.parametrize("unit", ["steps", "epochs", "samples"])
def test_every_schedule_in_every_unit(use: str, unit: Any) -> None:
    values = rates(schedule(use, ARGUMENTS.get(use), unit=unit, warmup_steps=5))
    assert values[:5] == pytest.approx([step / 6 for step in range(1, 6)])
    assert max(values) <= 1
    assert min(values) >= 0
    if use != "one_cycle":
        assert values[5] == 1
        assert values[5:] == sorted(values[5:], reverse=True)


@pytest.mark.parametrize("use", ["linear", "cosine", "one_cycle"])
def test_shapes_over_the_whole_run_do_not_depend_on_the_unit(use: str) -> None:
    steps = rates(schedule(use))
    for unit in ("epochs", "samples"):
        assert rates(schedule(use, unit=unit)) == pytest.approx(steps, abs=1e-12)


@pytest.mark.parametrize("warmup", [{"warmup_epochs": 2.5}, {"warmup_samples": 250}])
@pytest.mark.parametrize("unit", ["steps", "epochs", "samples"])
def test_warm_ups_of_the_same_length_are_the_same(warmup: dict[str, Any], unit: Any) -> None:
    expected = rates(schedule("cosine", warmup_steps=25))
    assert rates(schedule("cosine", unit=unit, **warmup)) == pytest.approx(expected, abs=1e-12)


def test_torch_has_the_same_shapes() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torch_schedules = torch.optim.lr_scheduler
    cases = [
        (torch_schedules.StepLR(optimizer, 7, gamma=0.5), "step", {"every": 7, "factor": 0.5}),
        (
            torch_schedules.MultiStepLR(optimizer, [10, 40], gamma=0.3),
            "multistep",
            {"milestones": [10, 40], "factor": 0.3},
        ),
        (torch_schedules.CosineAnnealingLR(optimizer, END.step), "cosine", {}),
    ]
    for theirs, use, arguments in cases:
        ours = rates(schedule(use, arguments))
        for step, value in enumerate(ours):
            expected = theirs._get_closed_form_lr() if hasattr(theirs, "_get_closed_form_lr") else 0
            assert value == pytest.approx(expected[0], abs=1e-12), (use, step)
            theirs.last_epoch += 1


def test_one_cycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=END.step)
    ours = rates(schedule("one_cycle"))
    # torch counts to the last step, this to the end of the run: a step apart at most.
    assert ours[0] == pytest.approx(theirs.get_last_lr()[0])
    assert ours.index(max(ours)) == pytest.approx(0.3 * END.step, abs=1)


def test_steps_in_epochs_are_those_epochs() -> None:
    values = rates(schedule("step", {"every": 4}, unit="epochs"))
    steps = EPOCH // BATCH
    assert values == pytest.approx([0.1 ** (step // (4 * steps)) for step in range(END.step)])


def test_inverse_square_root_is_vaswanis() -> None:
    values = rates(schedule("inverse_square_root", {"timescale": 20}, warmup_steps=20))
    theirs = [min(step**-0.5, step * 20**-1.5) * 20**0.5 for step in range(1, END.step + 1)]
    assert values[20:] == pytest.approx(theirs[19:-1])


def test_a_chain_goes_on_from_where_the_part_before_ended() -> None:
    parts = [
        {"use": "constant", "until": 40},
        {"use": "cosine", "until": 80, "final": 0.5},
        {"use": "linear", "final": 0.2},
    ]
    lr = schedule("chained", {"parts": parts})
    values = rates(lr)
    assert values[:41] == [1.0] * 41
    assert values[80] == pytest.approx(0.5)
    assert lr(END, END) == pytest.approx(0.1)
    assert all(abs(after - before) < 0.03 for before, after in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "at least one"),
        ("cosine", "at least one"),
        ([{"until": 3}], "`use` is missing"),
        ([{"use": "cosin"}], 'did you mean "cosine"'),
        ([{"use": "cosine", "until": 3}], "the last one ends with the run"),
        ([{"use": "cosine"}, {"use": "linear"}], "1. of them: `until` is missing"),
        ([{"use": "cosine", "until": "x"}, {"use": "linear"}], "expected a number"),
        ([{"use": "cosine", "until": 0}, {"use": "linear"}], "rising numbers"),
        ([{"use": "cosine", "finall": 0}], "did you mean scheduler.final"),
        ([{"use": "plateau"}], "stands alone only"),
    ],
)
def test_chains_that_are_none(parts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Chained(parts)


def test_a_plateau_falls_after_its_patience_and_rests() -> None:
    plateau = Plateau("accuracy", factor=0.5, patience=2, cooldown=1, final=0.2)
    plateau.watch({"accuracy": "max"})
    factors = []
    for value in [0.5, 0.6, 0.6, 0.5, math.nan, 0.6, 0.6, 0.6, 0.6, 0.9, 0.9, 0.9, 0.9]:
        plateau.observe({"accuracy": value})
        factors.append(plateau(0, 0))
    assert factors == [1.0] * 4 + [0.5] * 4 + [0.25] * 4 + [0.2]


def test_a_plateau_goes_on_from_its_state() -> None:
    values = [3.0, 2.0, 2.5, 2.4, 2.3, 2.2, 1.0, 1.5, 1.4]
    for stop in range(len(values)):
        whole, resumed = (schedule("plateau", {"patience": 1}) for _ in range(2))
        for lr in (whole, resumed):
            lr.watch({"loss": "min"})
        for value in values[:stop]:
            whole.observe({"loss": value})
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        for value in values[stop:]:
            whole.observe({"loss": value})
            resumed.observe({"loss": value})
            assert whole(Position(), END) == resumed(Position(), END)
        assert whole(Position(), END) < 1


@pytest.mark.parametrize(
    ("arguments", "metrics", "message"),
    [
        ({}, {}, "set data.validation"),
        ({"metric": "los"}, {"loss": "min"}, "did you mean loss"),
        ({"factor": 1.5}, {"loss": "min"}, "between 0 and 1"),
        ({"patience": -1}, {"loss": "min"}, "numbers from 0"),
    ],
)
def test_plateaus_that_cannot_work(
    arguments: dict[str, Any], metrics: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule("plateau", arguments).watch(metrics)


@pytest.mark.parametrize("value", [math.nan, -0.1, math.inf])
def test_a_schedule_that_gives_no_number_is_refused(value: float) -> None:
    def mine(step: float, total_steps: float) -> float:
        return value

    lr = LearningRate.of(SchedulerSection(use="my:mine"), mine, 1.0, HORIZON)
    with pytest.raises(TrainingError, match=r"mine gave .* a factor is a number from 0"):
        lr(Position(), END)
