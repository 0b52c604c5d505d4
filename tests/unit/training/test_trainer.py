"""The loop does everything at its step, and between these costs next to nothing."""

from __future__ import annotations

import cProfile
import itertools
import pstats
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from helpers.steps import batch, make_step
from torch import nn

from hpctrain.batch.stop import SAVE_DUE
from hpctrain.config.schema import EarlyStoppingSection, TrainingSection
from hpctrain.data.loading.loader import Batch
from hpctrain.training.early_stopping import EarlyStopping
from hpctrain.training.optim import schedules
from hpctrain.training.optim.lr_scheduler import LearningRate
from hpctrain.training.position import Interval, Position, StopAt
from hpctrain.training.profiling import Phases
from hpctrain.training.trainer import Plan, fit

EPOCH_SAMPLES, BATCH = 60, 8


class Recorded:
    """Hooks that write down what was asked of them, and at which step."""

    def __init__(self, agreements: dict[int, int] | None = None, end: int = 0) -> None:
        section = TrainingSection(max_epochs=99)
        self.stopping = EarlyStopping(EarlyStoppingSection(), section)
        self.seen: list[tuple[str, int]] = []
        self._agreements, self._end, self._step = agreements or {}, end, 0

    def advanced(self, place: Position) -> None:
        self._step = place.step

    def begin_epoch(self, place: Position) -> None:
        self.seen.append(("begin epoch", place.step))

    def end_epoch(self, place: Position, epoch: int) -> None:
        self.seen.append((f"end epoch {epoch}", place.step))

    def log(self, place: Position, epoch: int, lr: float) -> None:
        self.seen.append(("log", place.step))

    def evaluate(self, place: Position, epoch: int) -> dict[str, float]:
        self.seen.append(("evaluate", place.step))
        if place.step == self._end:
            self.stopping.ask("enough")
        return {}

    def check(self, place: Position) -> None:
        self.seen.append(("check", place.step))

    def save(self, place: Position, metrics: object) -> None:
        self.seen.append(("save", place.step))

    def agreed(self) -> int:
        return self._agreements.get(self._step, 0)


class Loader:
    """A batch again and again, and a smaller one at the end of an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        whole = batch(BATCH)
        for first in range(start, EPOCH_SAMPLES, BATCH):
            size = min(BATCH, EPOCH_SAMPLES - first)
            yield replace(whole, global_size=size, epoch=epoch, start=first)


STOP_AT = StopAt(
    max_epochs=None,
    max_steps=29,
    max_samples=None,
    epoch_samples=EPOCH_SAMPLES,
    global_batch_size=BATCH,
)
RATE = LearningRate(
    peak=0.1, factor=schedules.cosine, stop_at=STOP_AT, warmup=1, warmup_unit="epochs"
)
INTERVALS = [
    Interval(),
    Interval(every_steps=1),
    Interval(every_steps=7),
    Interval(every_epochs=2),
    Interval(every_steps=5, every_epochs=1),
]


def run(plan: Plan, hooks: Recorded, step: Any = lambda *_: None) -> tuple[Position, bool]:
    parts: dict[str, Any] = {"step": step, "loader": Loader(), "schedule": RATE, "run": hooks}
    return fit(Position(), plan, **parts)


def plan_of(log: Interval, evaluate: Interval | None, check: Interval, save: Interval) -> Plan:
    return Plan(stop_at=STOP_AT, log=log, evaluate=evaluate, check=check, save=save)


@pytest.mark.parametrize("shift", range(len(INTERVALS)))
def test_everything_is_done_at_its_step(shift: int) -> None:
    log, evaluate, check, save = itertools.islice(itertools.cycle(INTERVALS), shift, shift + 4)
    hooks = Recorded()
    place, complete = run(plan_of(log, evaluate, check, save), hooks)
    assert complete
    assert place.step == 29

    expected: list[tuple[str, int]] = [("begin epoch", 0)]
    place = Position()
    for step in range(1, 30):
        epoch, last = place.epoch, step == 29
        size = min(BATCH, EPOCH_SAMPLES - place.position)
        place = place.after(size, EPOCH_SAMPLES)
        expected += [("log", step)] * (last or log.due(place))
        expected += [("check", step)] * check.due(place)
        expected += [("evaluate", step)] * (last or evaluate.due(place))
        expected += [(f"end epoch {epoch}", step)] * (last or place.position == 0)
        expected += [("save", step)] * (last or save.due(place))
        expected += [("begin epoch", step)] * (place.position == 0 and not last)
    assert hooks.seen == expected


def test_what_the_ranks_agree_on_is_done_at_any_step() -> None:
    never = Interval()
    hooks = Recorded({3: SAVE_DUE, 5: 1})
    place, complete = run(plan_of(never, None, never, never), hooks)
    assert (place.step, complete) == (5, False)
    assert hooks.seen == [("begin epoch", 0), ("save", 3), ("save", 5)]


def test_an_evaluation_may_end_the_run() -> None:
    never = Interval()
    hooks = Recorded(end=6)
    place, complete = run(plan_of(never, Interval(every_steps=3), never, never), hooks)
    assert (place.step, complete) == (6, True)
    assert hooks.seen[-3:] == [("evaluate", 6), ("end epoch 0", 6), ("save", 6)]


MOST_CALLS = 26
"""Functions of hpctrain in a step on one rank, its hooks left out; 25 when this was set."""


def test_a_step_calls_few_functions_of_ours() -> None:
    """A small model feels a dozen more."""
    never = Interval()
    step = make_step(nn.Linear(6, 3), clip_norm=1.0)
    plan = plan_of(never, None, never, never)
    run(plan, Recorded(), step)
    profile = cProfile.Profile()
    profile.runcall(run, plan, Recorded(), step)
    stats: Any = pstats.Stats(profile)
    ours = {
        f"{path.rpartition('/')[2]}:{name}": entry[0]
        for (path, _, name), entry in stats.stats.items()
        if "/hpctrain/" in path and "/tests/" not in path and entry[0] >= 28
    }
    assert sum(ours.values()) <= MOST_CALLS * 29, ours


def test_the_phases_are_the_whole() -> None:
    now, waited = [100.0], [0.0]
    phases = Phases({"data": lambda: waited[0], "checkpoint": lambda: 0.5}, lambda: now[0])
    now[0] += 2
    with phases.measure("evaluation"):
        now[0] += 3
    waited[0] = 1.0
    now[0] += 4
    first = phases.lap()
    assert phases.totals() == {"compute": 4.5, "data": 1.0, "checkpoint": 0.5, "evaluation": 3.0}
    assert sum(phases.totals().values()) == phases.elapsed() == 9
    with phases.measure("checkpoint"):
        now[0] += 1
    second = phases.lap()
    assert phases.totals()["checkpoint"] == 1.5
    assert second == {"compute": 0.0, "data": 0.0, "checkpoint": 1.0, "evaluation": 0.0}
    assert first["compute"] + second["compute"] == pytest.approx(phases.totals()["compute"])
