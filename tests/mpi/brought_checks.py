"""Run on every rank: models that people bring train as in a plain loop, ddp and fsdp alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brought
import torch
from helpers.one_sample import OneSample
from sharded_world import SECTION, full
from step_world import FEATURES, alone, batch_of, samples
from torch import Tensor, nn

from hpctrain.config.schema import TrainingSection
from hpctrain.errors import TrainingError
from hpctrain.launch.process_group import World
from hpctrain.training.evaluation import Turn, evaluate
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.preparation import cast_model
from hpctrain.training.optim.optimizer import build_optimizer
from hpctrain.training.step import StepOptions, TrainStep
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Classification

# Of the last, ranks beyond the first have no sample.
COUNTS = (28, 29, 28, 1)
Model = Callable[[], nn.Module]
MODELS: list[tuple[Model, str, float]] = [
    (brought.Operator, "64-true", 1e-11),
    (brought.Operator, "32-true", 1e-4),
    (brought.Rotary, "64-true", 1e-11),
    (brought.Rotary, "32-true", 1e-4),
    (brought.Diffusion, "32-true", 1e-4),
    (lambda: brought.Diffusion().double(), "32-true", 1e-11),
    (brought.Mixed, "32-true", 1e-4),
    (brought.Counting, "64-true", 1e-11),
    *((lambda how=how: brought.Teacher(how), "64-true", 1e-11) for how in ("lerp_", "data", "new")),
    (brought.Teacher, "bf16-mixed", 0.05),
]


def build(world: World, model: nn.Module, precision: Any, *, sharded: bool) -> TrainStep:
    """Return a primed step, made as a job makes it."""
    number_format = NumberFormat.of(precision, world.device)
    cast_model(model, number_format, None)
    number_format = number_format.for_model(model)
    task = Classification(["features"], "label")
    example = samples(1, seed=99 + world.topology.rank)
    spread = None
    if sharded and world.topology.world_size > 1:
        from hpctrain.training.parallel.fsdp import ShardedModel
        from hpctrain.training.parallel.fsdp_units import try_out

        findings = try_out(world, model, task, number_format.cast(example, task.inputs))
        spread = ShardedModel(model, SECTION, number_format, world, findings)
    step = TrainStep(
        TaskRunner(model, task, number_format),
        build_optimizer(torch.optim.AdamW, spread or model, 0.01, {}),
        world,
        options=StepOptions(training=TrainingSection(clip_norm=0.5, ema_decay=0.5)),
        shapes=OneSample(example, -(-35 // world.topology.world_size)),
        example=example,
        sharded=spread,
    )
    step.dry_run()
    return step


def plain(model: nn.Module, precision: Any) -> tuple[list[float], nn.Module]:
    """Train as one would by hand, on whole batches."""
    number_format = NumberFormat.of(precision, torch.device("cpu"))
    cast_model(model, number_format, None)
    dtype = number_format.for_model(model).parameters
    trained = [item for item in model.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for seed, count in enumerate(COUNTS):
        fields = samples(count, seed=seed)
        optimizer.zero_grad()
        with number_format.arithmetic():
            output = model(fields["features"].to(dtype))
        output = output.float() if output.dtype == torch.bfloat16 else output
        loss = nn.functional.cross_entropy(output, fields["label"])
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def trained(world: World, step: TrainStep) -> list[float]:
    losses = []
    for seed, count in enumerate(COUNTS):
        step(batch_of(world, samples(count, seed=seed)), lr=0.01)
        assert step.average is not None
        step.average.update(seed + 1)
        numbers = step.read()
        assert numbers["bad_steps"] == 0
        losses.append(numbers["loss"])
    return losses


def check_models_train_as_in_a_plain_loop(world: World, *, sharded: bool = False) -> None:
    for make, precision, tolerance in MODELS:
        model = make()
        kinds = {name: item.dtype for name, item in model.named_parameters()}
        step = build(world, model, precision, sharded=sharded)
        losses = trained(world, step)
        expected, reference = plain(make(), precision)
        what = type(model).__name__, precision
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < tolerance, what
        # A rank without samples runs nothing: rank 0's buffers count, and it always had some.
        mine = world.communicator.broadcast(full(world, step))
        for name, item in reference.state_dict().items():
            if name in mine:
                assert mine[name].dtype == item.dtype, (what, name)
                assert torch.allclose(mine[name], item, rtol=0, atol=10 * tolerance), (what, name)
        if precision in ("32-true", "bf16-mixed"):
            assert {name: item.dtype for name, item in model.named_parameters()} == kinds
        if isinstance(model, brought.Counting):
            assert world.topology.rank or model.counts() == {float(len(COUNTS))}, model.__dict__
        check_evaluation_leaves_no_trace(world, step)


def check_evaluation_leaves_no_trace(world: World, step: TrainStep) -> None:
    """Ranks with fewer batches, or none: the first has the most."""
    before = full(world, step)
    whole = samples(5, seed=5)
    rank, size = world.topology.rank, world.topology.world_size
    mine = {name: item[rank::size] for name, item in whole.items()}
    assert step.average is not None
    with step.average.in_model():
        metrics = evaluate(
            TaskRunner(
                step.model,
                Classification(["features"], "label"),
                NumberFormat.of("32-true", world.device).for_model(step.model),
                call=step.runner.call,
            ),
            [
                Turn(
                    batches=[batch_of(alone(), mine)] if len(mine["label"]) else [],
                    rounds=1,
                    idle_row=None if step.sharded is None else lambda: step.idle_row,
                )
            ],
            world,
        )
        step.settle()
    assert metrics is not None
    after = full(world, step)
    assert after.keys() == before.keys()
    for name, item in before.items():
        assert torch.equal(after[name], item), name


class ByItsSamples(nn.Module):
    """Changes a parameter by the samples that a rank happens to have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(FEATURES, 5)
        self.center = nn.Parameter(torch.zeros(FEATURES), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        self.center.data.lerp_(features.detach().mean(0), 0.1)
        output: Tensor = self.net(features - self.center)
        return output


def check_what_would_drift_apart_is_refused(world: World, *, sharded: bool = False) -> None:
    if world.topology.world_size == 1:
        build(world, ByItsSamples(), "32-true", sharded=sharded)
        return
    try:
        build(world, ByItsSamples(), "32-true", sharded=sharded)
    except TrainingError as error:
        assert error.everywhere
        assert "changes the parameters center by the samples of each rank" in str(error)
    else:
        raise AssertionError("nothing was said")


class Unseen(nn.Module):
    """Changes a parameter behind torch's back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(FEATURES, 5)
        self.scale = nn.Parameter(torch.ones(FEATURES), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.net(features * self.scale)
        numbers = self.scale.detach().numpy() if type(self.scale) is nn.Parameter else None
        if numbers is not None:
            numbers *= 0.5
        return output


def check_changes_that_would_be_lost_are_refused(world: World, *, sharded: bool = False) -> None:
    spread = sharded and world.topology.world_size > 1
    try:
        step = build(world, Unseen(), "32-true", sharded=sharded)
    except TrainingError as error:
        assert spread
        assert "the forward pass changes the parameters scale, and with" in str(error)
    else:
        assert not spread
        step(batch_of(world, samples(28)), lr=0.01)
        assert step.model.scale.tolist() == [0.5] * FEATURES


CHECKS = [
    check_changes_that_would_be_lost_are_refused,
    check_models_train_as_in_a_plain_loop,
    check_what_would_drift_apart_is_refused,
]
