"""A dry run and an evaluation leave no trace in a model, by name and not by object."""

from __future__ import annotations

import copy
import itertools
import logging
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.steps import CPU, WORLD, batch, fields, make_step
from torch import Tensor, nn

from hpctrain.errors import TrainingError
from hpctrain.training.evaluation import Turn, evaluate
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.undisturbed import kept_model
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Classification


@dataclass(slots=True)
class Statistics:
    count: int = 0
    sums: list[float] = field(default_factory=list)
    newest: Any = None


class Meter:
    def __init__(self) -> None:
        self.values = deque([1.0], maxlen=3)
        self.statistics = Statistics()


class Restless(nn.Module):
    """Does in every pass to itself whatever a module can."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, 3)
        self.embedding = nn.Embedding(4, 6, max_norm=0.5)
        self.teacher = nn.Linear(6, 3).requires_grad_(False)
        self.hidden = [nn.Linear(6, 3)]  # in a list: no part of the parameters
        self.hidden[0].extra = 1
        self.register_buffer("assigned", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("in_place", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("nothing", None)
        self.register_buffer("queue", torch.zeros(0, 6))
        self.register_buffer("gone", torch.ones(1))
        self.calls = 0
        self.plain = torch.zeros(2)
        self.array = np.zeros(3)
        self.table: dict[str, Any] = {"a": [1, {2}], "b": bytearray(b"xy")}
        self.ordered = OrderedDict(x=1, y=2)
        self.groups: defaultdict[str, list[int]] = defaultdict(list)
        self.counter = Counter("aab")
        self.meter = Meter()
        self.same = self.meter.statistics
        self.count = itertools.count()
        self.generators = (
            *(torch.Generator().manual_seed(1), np.random.default_rng(1)),
            *(np.random.RandomState(1), random.Random(1)),
        )
        self.old = object()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.net.weight, 0.5)
            self.teacher.bias.data = self.net.bias.data * 2
            self.hidden[0].weight += 1
            self.hidden[0].extra += 1
        self.assigned = self.assigned + 1
        self.in_place.logical_not_()
        self.nothing = torch.ones(1)
        self.queue = torch.cat([self.queue, x.detach()])
        if "gone" in self._buffers:
            del self.gone
        if not hasattr(self, "lazy"):
            self.register_buffer("lazy", x.detach().mean(0))
            self.register_buffer("cache", x.detach(), persistent=False)
        self.calls += 1
        self.plain += 1
        self.array += 1
        self.table["a"][1].add(3)
        self.table["a"].append(4)
        self.table["b"] += b"z"
        self.table["c"] = 1
        self.ordered.move_to_end("x")
        self.groups["new"].append(1)
        self.counter.update("b")
        self.meter.values.append(0.0)
        self.meter.statistics.count += 1
        self.meter.statistics.sums.append(1.0)
        self.meter.statistics.newest = x
        next(self.count)
        for generator in self.generators:
            if isinstance(generator, torch.Generator):
                torch.rand(1, generator=generator)
            else:
                generator.random()
        self.old = object()
        self.added = 1
        self.teacher.train(not self.teacher.training)
        self.net.bias.requires_grad_(requires_grad=True)
        self.embedding.weight.requires_grad_(requires_grad=True)
        self.child = nn.Identity()
        output: Tensor = self.net(x) + self.embedding(torch.arange(4)).sum()
        return output + self.teacher(x)


def picture(model: Restless, *, plain: bool = True) -> list[Any]:
    """Return all that a restless model holds, by value and by object."""
    tensors = [list(model.named_parameters()), list(model.named_buffers())]
    if plain:
        tensors.append(list(model.hidden[0].named_parameters()))
    values: list[Any] = [
        [[(name, item.dtype, item.tolist(), id(item)) for name, item in some] for some in tensors],
        [(name, module.training) for name, module in model.named_modules()],
        [item.requires_grad for item in model.parameters()],
        sorted(model._non_persistent_buffers_set),
        list(model._buffers),
    ]
    if not plain:
        return values
    statistics = model.meter.statistics
    return [
        *values,
        *(model.calls, model.plain.tolist(), model.array.tolist(), model.hidden[0].extra),
        *(copy.deepcopy(model.table), list(model.ordered), dict(model.groups), model.counter),
        *(model.meter.values, statistics.count, list(statistics.sums), statistics.newest),
        *(model.same is statistics, repr(model.count), id(model.old), hasattr(model, "added")),
        model.generators[0].get_state().tolist(),
        model.generators[1].bit_generator.state,
        model.generators[2].get_state()[1].tolist(),
        model.generators[3].getstate(),
    ]


def test_a_dry_run_leaves_no_trace() -> None:
    model = Restless()
    before = picture(model)
    step = make_step(model)
    step.dry_run()
    assert picture(model) == before
    for number in (1, 2):
        step(batch(), 0.0)
        assert model.calls == number
        assert model.assigned.tolist() == [number] * 3
        assert len(model.queue) == 8 * number
        assert next(copy.deepcopy(model.count)) == number


def test_an_evaluation_leaves_no_trace_but_in_plain_attributes() -> None:
    model = Restless()
    before = picture(model, plain=False)
    evaluate(
        TaskRunner(model, Classification(["x"], "y"), NumberFormat.of("32-true", CPU)),
        [Turn(batches=[batch()])],
        WORLD,
    )
    after = picture(model, plain=False)
    # What is kept for later passes goes with attributes, which stay.
    assert after[3:] == [["cache"], [*before[4], "cache"]]
    assert after[0][1].pop()[0] == "cache"
    assert after[:3] == before[:3]
    assert model.calls == 1


def test_a_cache_that_grew_in_an_evaluation_fits_the_attribute_that_knows_of_it() -> None:
    """As rotary embeddings of many models keep their table, and its length beside it."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)
            self.register_buffer("table", torch.arange(2.0), persistent=False)
            self.length = 2

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.length:
                self.register_buffer("table", torch.arange(float(len(x))), persistent=False)
                self.length = len(x)
            output: Tensor = self.net(x * self.table[: len(x), None])
            return output

    model = Cached()
    task = Classification(["x"], "y")
    for _ in range(2):
        evaluate(
            TaskRunner(model, task, NumberFormat.of("32-true", CPU)),
            [Turn(batches=[batch()])],
            WORLD,
        )
    assert len(model.table) == model.length == 8


class Opaque(nn.Module):
    """Holds what cannot be copied."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.lock = threading.Lock()
        self.draws = (random.Random(number).random() for number in range(9))
        self.file = path.open("w")
        self.logger = logging.getLogger("mine")
        self.worker = Worker()
        self.what: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.logger.info("called")
            for name in self.what:
                if name == "draws":
                    next(self.draws)
                elif name == "file":
                    self.file.write("x")
                else:
                    self.worker.done += 1
        output: Tensor = self.net(x)
        return output


class Worker:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done = 0


@pytest.mark.parametrize("what", [(), ("draws",), ("file",), ("worker",)])
def test_what_cannot_be_copied_is_named_if_it_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: tuple[str, ...]
) -> None:
    model = Opaque(tmp_path / "log")
    model.what = what
    step = make_step(model)
    with caplog.at_level(logging.WARNING, logger="hpctrain"):
        step.dry_run()
    model.file.close()
    if what:
        assert f"the dry run has changed {what[0]} of the model" in caplog.text
    else:
        assert not caplog.text


def test_the_attributes_of_a_task_are_left_alone_too() -> None:
    class Counted(Classification):
        def __init__(self) -> None:
            super().__init__(["x"], "y")
            self.passes: list[int] = []

        def loss(self, model: nn.Module, fields: Any) -> Any:
            self.passes.append(len(fields["y"]))
            return super().loss(model, fields)

    task = Counted()
    step = make_step(nn.Linear(6, 3), task=task)
    step.dry_run()
    step(batch(), 0.1)
    assert task.passes == [8]


class Growing(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.other = nn.Linear(6, 3), nn.Linear(6, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "registers":
            self.late = nn.Linear(6, 3)
            return self.net(x) + self.other(x) + 0 * self.late(x)
        output: Tensor = self.net(x) + self.other(x)
        self.other.weight = nn.Parameter(self.other.weight.detach() * 0.5)
        return output


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("registers", "registers the parameters late.weight, late.bias, which the optimizer"),
        ("replaces", "puts new parameters in the place of other.weight"),
    ],
)
def test_parameters_that_no_optimizer_would_train_are_refused(how: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        make_step(Growing(how)).dry_run()


def test_the_model_is_put_back_after_a_failure() -> None:
    model = Restless()
    before = picture(model)

    def fail() -> None:
        with kept_model(model):
            model(fields()["x"])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert picture(model) == before
