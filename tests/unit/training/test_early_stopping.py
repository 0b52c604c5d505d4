"""A run ends where Lightning's own EarlyStopping would end it, and knows so ever after."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping as Lightnings

from hpctrain.config.schema import EarlyStoppingSection, TrainingSection
from hpctrain.errors import TrainingError
from hpctrain.launch.communicators import SingleCommunicator
from hpctrain.training.early_stopping import EarlyStopping
from hpctrain.training.position import Position

SETTINGS: list[dict[str, Any]] = [
    {},
    {"patience": 0},
    {"patience": 1, "min_delta": 0.05},
    {"stopping_threshold": 0.2},
    {"divergence_threshold": 0.8},
    {"check_finite": False, "patience": 2},
]


def places() -> list[Position]:
    return [Position(step=10 * epoch, epoch=epoch) for epoch in range(1, 40)]


def ours(values: list[float], mode: Any, settings: dict[str, Any], stop_at: int = 0) -> int | None:
    """Return the evaluation after which a run ends, which may be stopped and go on before that."""
    section = EarlyStoppingSection(monitor="loss", mode=mode, **settings)
    training = TrainingSection(max_epochs=99)
    stopping = EarlyStopping(section, training, mode)
    for index, (value, place) in enumerate(zip(values, places(), strict=False)):
        if index == stop_at:
            saved = json.loads(json.dumps(stopping.state_dict()))
            stopping = EarlyStopping(section, training, mode)
            stopping.load_state_dict(saved)
        stopping.observe({"loss": value}, place)
        if stopping.ends(place):
            return index
    return None


def lightnings(values: list[float], mode: Any, settings: dict[str, Any]) -> int | None:
    stopping = Lightnings("loss", mode=mode, **settings)
    for index, value in enumerate(values):
        ends, _ = stopping._evaluate_stopping_criteria(torch.tensor(value, dtype=torch.float64))
        if ends:
            return index
    return None


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_it_ends_where_lightning_ends(mode: str, settings: dict[str, Any]) -> None:
    draw = random.Random(7)
    if mode == "max":
        settings = {
            name: 1 - value if name.endswith("_threshold") else value
            for name, value in settings.items()
        }
    worst = math.inf if mode == "min" else -math.inf
    ends = set()
    for number in range(60):
        values = [0.3 + 0.4 * draw.random() for _ in range(12)]
        if number % 4 == 0:
            values[draw.randrange(12)] = draw.choice([math.nan, worst, 0.9, 0.1])
        if number % 3 == 0:
            values = sorted(values, reverse=mode == "min")
        expected = lightnings(values, mode, settings)
        assert ours(values, mode, settings, stop_at=draw.randrange(12)) == expected, values
        ends.add(expected)
    assert len(ends) > 2  # early, later, and some of them never


def test_the_reason_is_told() -> None:
    for settings, values, reason in [
        ({"patience": 2}, [0.5, 0.6, 0.7], "has not become better for 2 evaluations, best 0.5"),
        ({"patience": 1, "check_finite": False}, [math.nan], "better for 1 evaluation"),
        ({}, [math.nan], "is nan, which is not finite"),
        ({"stopping_threshold": 0.1}, [0.05], "has come to 0.05, beyond stopping_threshold = 0.1"),
        ({"divergence_threshold": 9}, [10.0], "has come to 10, beyond divergence_threshold = 9"),
    ]:
        section = EarlyStoppingSection(monitor="loss", **settings)
        stopping = EarlyStopping(section, TrainingSection(max_steps=9))
        for value, place in zip(values, places(), strict=False):
            assert stopping.reason is None
            stopping.observe({"loss": value}, place)
        assert stopping.reason is not None
        assert stopping.reason.startswith("early stopping: loss ")
        assert reason in stopping.reason


def test_not_before_the_least_length() -> None:
    section = EarlyStoppingSection(monitor="loss", patience=1)
    training = TrainingSection(max_epochs=99, min_epochs=5, min_steps=65)
    stopping = EarlyStopping(section, training)
    ends = []
    for place, value in zip(places(), itertools.count(), strict=False):
        stopping.observe({"loss": float(value)}, place)
        ends.append(stopping.ends(place))
    assert ends.index(True) == 6  # epoch 7, step 70: the first end of an epoch from both on
    assert stopping.ends(Position(step=65, epoch=6))  # and between two evaluations too


def test_what_is_asked_for_ends_a_run_too() -> None:
    stopping = EarlyStopping(EarlyStoppingSection(), TrainingSection(max_epochs=9))
    stopping.observe({"loss": math.nan}, places()[0])  # nothing is monitored
    assert not stopping.ends(places()[0])
    stopping.ask("enough")
    stopping.ask("and again")
    assert stopping.ends(places()[0])
    assert stopping.reason == "enough"


def test_other_settings_go_on() -> None:
    section = EarlyStoppingSection(monitor="loss", patience=2)
    training = TrainingSection(max_epochs=99)
    stopping = EarlyStopping(section, training)
    for value, place in zip([0.5, 0.6, 0.7], places(), strict=False):
        stopping.observe({"loss": value}, place)
    saved = json.loads(json.dumps(stopping.state_dict()))
    longer = EarlyStopping(dataclasses.replace(section, patience=4), training)
    longer.load_state_dict(saved)
    assert longer.reason is None
    for value, ends in [(0.6, False), (0.6, True)]:  # two more of four
        longer.observe({"loss": value}, places()[5])
        assert longer.ends(places()[5]) is ends
    other = EarlyStopping(dataclasses.replace(section, monitor="accuracy"), training)
    other.load_state_dict(saved)
    assert other.state_dict()["best"] is None
    other.load_state_dict({})  # of a run that an older release began


def test_a_metric_that_is_not_there() -> None:
    section = EarlyStoppingSection(monitor="los")
    stopping = EarlyStopping(section, TrainingSection(max_epochs=9))
    with pytest.raises(TrainingError, match="no such metric; did you mean loss"):
        stopping.observe({"loss": 1.0}, places()[0])


def test_a_study_prunes() -> None:
    """Asked until it says so, and never again; a question that fails is an error of all ranks."""
    stopping = EarlyStopping(EarlyStoppingSection(), TrainingSection(max_epochs=99))
    asked = []

    def prune(step: int, metrics: Mapping[str, float]) -> bool:
        asked.append((step, metrics["loss"]))
        return step >= 20

    for place in places()[:4]:
        stopping.ask_study(prune, place, {"loss": 1.0}, SingleCommunicator())
    assert asked == [(10, 1.0), (20, 1.0)]
    assert stopping.reason == "pruned"
    assert stopping.ends(places()[2])
    broken = EarlyStopping(EarlyStoppingSection(), TrainingSection(max_epochs=99))
    with pytest.raises(TrainingError, match=r"prune\(step=10, metrics\) has failed: KeyError") as e:
        broken.ask_study(lambda _, found: found["x"], places()[0], {}, SingleCommunicator())
    assert e.value.everywhere
