"""Steps on a device: those of a plain loop, without waiting, with bad gradients refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from helpers.one_sample import OneSample
from helpers.worlds import world_of_one
from torch import Tensor, nn

from hpctrain.checkpoint.save import HostCopies
from hpctrain.config.schema import Precision, TrainingSection
from hpctrain.data.loading.loader import Batch
from hpctrain.launch.process_group import World
from hpctrain.models.mlp import MLP
from hpctrain.training.evaluation import Turn, evaluate
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.preparation import cast_model
from hpctrain.training.optim.optimizer import build_optimizer
from hpctrain.training.step import StepOptions, TrainStep
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Classification

ROWS, WIDTH, CLASSES, LR = 48, 32, 10, 0.05
# Of the largest change of a parameter: what a plain loop may differ by.
TOLERANCES = {"64-true": 1e-10, "32-true": 1e-4, "bf16-mixed": 0.1, "16-mixed": 0.05}


@pytest.fixture(scope="module")
def world(device: torch.device) -> World:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return replace(world_of_one("test"), device=device)


def batches(device: torch.device, count: int, bad: int | None = None) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        x = torch.randn(ROWS, WIDTH, generator=generator)
        y = torch.randint(CLASSES, (ROWS,), generator=generator)
        if number == bad:
            x[3, 5] = math.inf
        fields = {"x": x.to(device), "y": y.to(device)}
        found.append(Batch(fields=fields, size=ROWS, global_size=ROWS, epoch=0, start=number))
    return found


def build(
    world: World,
    precision: Any = "32-true",
    *,
    passes: int = 1,
    optimizer: Any = torch.optim.SGD,
    mode: str | None = None,
    clip_norm: float | None = 1.0,
    **arguments: Any,
) -> tuple[nn.Module, TrainStep]:
    torch.manual_seed(0)
    number_format = NumberFormat.of(precision, world.device)
    model = MLP(WIDTH, CLASSES, hidden_features=[64, 64])
    cast_model(model, number_format, world.device)
    if mode is not None:
        model.compile(mode=mode)
    step = TrainStep(
        TaskRunner(
            model, Classification(["x"], "y"), number_format, graphs=mode == "reduce-overhead"
        ),
        build_optimizer(optimizer, model, LR, arguments),
        world,
        options=StepOptions(
            training=TrainingSection(clip_norm=clip_norm), micro_batch_size=ROWS // passes
        ),
        shapes=OneSample(
            {name: row[:1] for name, row in batches(world.device, 1)[0].fields.items()}, ROWS
        ),
        example={name: row[:1] for name, row in batches(world.device, 1)[0].fields.items()},
    )
    return model, step


def plain_loop(world: World, precision: Any, data: list[Batch]) -> nn.Module:
    """Return the model after the textbook loop; a scale of gradients would not change it."""
    model, _ = build(world, precision)
    number_format = NumberFormat.of(precision, world.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for batch in data:
        optimizer.zero_grad()
        with number_format.arithmetic():
            output = model(batch.fields["x"].to(number_format.parameters))
        loss = F.cross_entropy(
            output.float() if output.element_size() < 4 else output, batch.fields["y"]
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def distance(one: nn.Module, other: nn.Module, start: nn.Module) -> float:
    """Return the largest difference of two models, over the largest change since the start."""
    pairs = list(zip(one.parameters(), other.parameters(), start.parameters(), strict=True))
    change = max((a - c).abs().max().item() for a, _, c in pairs)
    return max((a - b).abs().max().item() for a, b, _ in pairs) / change


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("passes", [1, 3])
def test_steps_are_those_of_a_plain_loop(world: World, precision: Any, passes: int) -> None:
    data = batches(world.device, 4)
    model, step = build(world, precision, passes=passes, momentum=0.9)
    start, _ = build(world, precision)
    for batch in data:
        step(batch, LR)
    tolerance = TOLERANCES.get(precision, 0.3)
    assert distance(model, plain_loop(world, precision, data), start) < tolerance
    assert step.read()["bad_steps"] == 0


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_bad_gradient_changes_nothing(world: World, precision: Any, optimizer: Any) -> None:
    data = batches(world.device, 3, bad=1)
    model, step = build(world, precision, optimizer=optimizer)
    step(data[0], LR)
    before = [item.clone() for item in model.parameters()]
    step(data[1], LR)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert step.read()["skipped_steps"] == 1
    step(data[2], LR)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.SGD, {}),
    ],
)
def test_fused_kernels_do_what_plain_ones_do(
    world: World, optimizer: Any, arguments: dict[str, Any]
) -> None:
    data = batches(world.device, 6)
    start, _ = build(world, "64-true")
    models = []
    for fused in (True, False):
        model, step = build(world, "64-true", optimizer=optimizer, fused=fused, **arguments)
        for batch in data:
            step(batch, LR)
        models.append(model)
    assert distance(*models, start) < 1e-9


@pytest.mark.on_device
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_steps_wait_for_nothing(
    world: World, precision: Any, optimizer: Any, request: pytest.FixtureRequest
) -> None:
    """By what torch calls an error, and by what its profiler sees the runtime do."""
    data = batches(world.device, 12)
    _, step = build(world, precision, passes=2, optimizer=optimizer)
    assert not step.syncs
    for batch in data[:3]:
        step(batch, LR)
    torch.cuda.synchronize()
    request.getfixturevalue("waits_are_errors")
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        with torch.profiler.record_function("the steps"):
            for batch in data[3:]:
                step(batch, LR)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    events = list(profile.events())
    within = next(event.time_range for event in events if event.name == "the steps")
    waits = [
        event.name
        for event in events
        if ("Synchronize" in event.name or "DtoH" in event.name)
        and within.start <= event.time_range.start <= within.end
    ]
    assert waits == []


@pytest.mark.on_device
@pytest.mark.parametrize("passes", [1, 3])
def test_cuda_graphs_keep_their_hands_off_gradients(world: World, passes: int) -> None:
    data = batches(world.device, 6)
    eager, step = build(world, passes=passes, momentum=0.9)
    start, _ = build(world)
    losses: list[list[float]] = [[], []]
    for batch in data:
        step(batch, LR)
        losses[0].append(step.read()["loss"])
    model, step = build(world, passes=passes, momentum=0.9, mode="reduce-overhead")
    step.dry_run()
    for batch in data:
        step(batch, LR)
        losses[1].append(step.read()["loss"])
    assert distance(model, eager, start) < 1e-3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_saves_are_of_one_moment(world: World) -> None:
    """While steps go on: what is lent is copied before the next update changes it."""
    data = batches(world.device, 10)
    model, step = build(world, optimizer=torch.optim.AdamW)
    step(data[0], LR)
    copies = HostCopies()
    for batch in data[1:]:
        optimizer = {f"{i}": s["exp_avg"] for i, s in enumerate(step.optimizer.state.values())}
        expected = {name: tensor.clone() for name, tensor in optimizer.items()}
        weights = {name: item.detach().clone() for name, item in model.named_parameters()}
        whole = copies.copy("model", dict(model.named_parameters()))
        later = copies.copy_later("lent", optimizer)
        writing = Thread(target=later.make)
        writing.start()
        step.before_update(later.wait)
        step(batch, LR)
        writing.join()
        assert all(torch.equal(later.host[name], each.cpu()) for name, each in expected.items())
        assert all(torch.equal(whole[name], each.cpu()) for name, each in weights.items())


def test_an_evaluation_is_that_of_all_samples(world: World) -> None:
    data = batches(world.device, 5)
    model, step = build(world, "64-true")
    found = evaluate(
        TaskRunner(
            model,
            Classification(["x"], "y"),
            NumberFormat.of("64-true", world.device),
            call=step.runner.call,
        ),
        [Turn(batches=data)],
        world,
    )
    whole = {name: torch.cat([each.fields[name] for each in data]) for name in ("x", "y")}
    with torch.no_grad():
        output = model(whole["x"].double())
    assert found is not None
    assert found["loss"] == pytest.approx(F.cross_entropy(output, whole["y"]).item(), rel=1e-12)
    right: Callable[[], Tensor] = (output.argmax(1) == whole["y"]).double().mean
    assert found["accuracy"] == right().item()


@pytest.mark.on_device
def test_batches_of_an_evaluation_wait_for_nothing(
    world: World, request: pytest.FixtureRequest
) -> None:
    from hpctrain.training.metric_objects import MetricObjects
    from hpctrain.training.metrics import Totals

    model, _ = build(world)
    task = Classification(["x"], "y")
    totals = Totals(task, MetricObjects(task, world.device))
    data = batches(world.device, 4)
    with torch.no_grad():
        totals.add(task.evaluate(model, data[0].fields))
        request.getfixturevalue("waits_are_errors")
        for batch in data[1:]:
            totals.add(task.evaluate(model, batch.fields))
    torch.cuda.set_sync_debug_mode("default")
    assert totals.part().quotients["loss"][1] == 4 * ROWS
