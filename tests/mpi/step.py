"""Run on every rank: a step does what one process would do with the whole global batch."""

from __future__ import annotations

import itertools

import brought_checks
import step_exactness
import torch
import wrong_sums
from helpers.one_sample import OneSample
from torch import nn

import hpctrain
from hpctrain.config.schema import TrainingSection
from hpctrain.data.loading.loader import Batch
from hpctrain.errors import TrainingError
from hpctrain.launch.process_group import World
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.preparation import cast_model
from hpctrain.training.optim.optimizer import build_optimizer
from hpctrain.training.step import StepOptions, TrainStep
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Classification

FEATURES, CLASSES = 6, 4


def global_batch(samples: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64),
        "y": torch.randint(CLASSES, (samples,), generator=generator),
    }


def share(fields: dict[str, torch.Tensor], rank: int, world_size: int) -> Batch:
    """Deal the samples round, so that shares are unequal and may be empty."""
    mine = {name: tensor[rank::world_size] for name, tensor in fields.items()}
    size = len(mine["x"])
    return Batch(fields=mine, size=size, global_size=len(fields["x"]), epoch=0, start=0)


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def make_step(
    world: World,
    model: nn.Module,
    *,
    task: Classification | None = None,
    largest_share: int = 8,
    micro_batch_size: int | None = 2,
    clip_norm: float | None = 0.5,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> TrainStep:
    step = TrainStep(
        TaskRunner(
            model, task or Classification(["x"], "y"), NumberFormat.of("64-true", world.device)
        ),
        build_optimizer(optimizer, model, 0.01, {}),
        world,
        options=StepOptions(
            training=TrainingSection(clip_norm=clip_norm), micro_batch_size=micro_batch_size
        ),
        shapes=OneSample(global_batch(1, 99), largest_share),
        example=global_batch(1, 99),
    )
    step.dry_run()
    return step


def reference(
    batches: list[dict[str, torch.Tensor]], ignore_index: int, clip_norm: float
) -> tuple[nn.Module, list[float]]:
    """The textbook loop on the whole batches, in one process."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for fields in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            model(fields["x"]), fields["y"], ignore_index=ignore_index
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def check_a_step_is_that_of_the_global_batch(world: World) -> None:
    """Also where a batch leaves one sample over, or is smaller than the world."""
    rank, size = world.topology.rank, world.topology.world_size
    batches = [global_batch(samples, samples) for samples in (12, 13, 7, 1, 2, 16, 5)]
    for ignore_index, micro_batch_size in itertools.product((-100, 2), (None, 1, 2, 5)):
        expected, losses = reference(batches, ignore_index, 0.5)
        task = Classification(["x"], "y", ignore_index=None if ignore_index < 0 else ignore_index)
        model = make_model()
        step = make_step(
            world,
            model,
            task=task,
            micro_batch_size=micro_batch_size,
            largest_share=-(-16 // size),
        )
        for fields, loss in zip(batches, losses, strict=True):
            step(share(fields, rank, size), 0.01)
            numbers = step.read()
            if loss == loss:  # a batch of ignored samples only has no mean
                assert abs(numbers["loss"] - loss) < 1e-12, (numbers, loss)
        for name, tensor in expected.state_dict().items():
            difference = (model.state_dict()[name] - tensor).abs().max().item()
            assert difference < 1e-12, (name, difference, ignore_index, micro_batch_size)


def check_a_bad_gradient_is_never_applied(world: World) -> None:
    """One rank's infinity is everybody's: parameters and optimizer stay, the count goes up."""
    rank, size = world.topology.rank, world.topology.world_size
    for optimizer in (torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop):
        model = make_model()
        step = make_step(world, model, optimizer=optimizer)
        assert step.syncs == (optimizer is torch.optim.RMSprop)
        step(share(global_batch(8, 0), rank, size), 0.01)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        bad = global_batch(8, 1)
        bad["x"][size - 1, 0] = float("inf")  # on the last rank
        for count in (1, 2):
            step(share(bad, rank, size), 0.01)
            assert step.read()["bad_steps"] == count
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        step(share(global_batch(8, 2), rank, size), 0.01)
        assert step.read()["bad_steps"] == 0
        assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])


def check_ranks_agree(world: World) -> None:
    model = make_model()
    step = make_step(world, model)
    for seed in range(5):
        step(share(global_batch(11, seed), world.topology.rank, world.topology.world_size), 0.01)
    everywhere = world.communicator.all_gather([item.tolist() for item in model.parameters()])
    assert all(other == everywhere[0] for other in everywhere)


def check_forgotten_parameters_are_named(world: World) -> None:
    model = make_model()
    model.register_parameter("forgotten", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    step = make_step(world, model)
    rank, size = world.topology.rank, world.topology.world_size
    try:
        step(share(global_batch(8, 0), rank, size), 0.01)
    except TrainingError as error:
        assert size > 1
        assert "forgotten had no part in the loss of this step, nor" in str(error)
    else:
        assert size == 1
        assert torch.equal(model.forgotten, torch.ones(3))


def check_priming_leaves_no_trace(world: World) -> None:
    """Buffers and generators are those of before: a start is not a step."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES)
    ).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    make_step(world, model)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def check_every_precision_trains(world: World) -> None:
    rank, size = world.topology.rank, world.topology.world_size
    for name in ("32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"):
        number_format = NumberFormat.of(name, world.device)  # type: ignore[arg-type]
        model = make_model().float()
        cast_model(model, number_format, None)
        step = TrainStep(
            TaskRunner(model, Classification(["x"], "y"), number_format),
            build_optimizer(torch.optim.AdamW, model, 0.01, {}),
            world,
            options=StepOptions(training=TrainingSection(clip_norm=1.0), micro_batch_size=4),
            shapes=OneSample(global_batch(1, 99), 8),
            example=global_batch(1, 99),
        )
        step.dry_run()
        losses = []
        for _ in range(30):
            step(share(global_batch(8 * size, 3), rank, size), 0.02)
            losses.append(step.read()["loss"])
        assert losses[-1] < 0.8 * losses[0], (name, losses)
        assert {item.dtype for item in model.parameters()} == {number_format.parameters}


CHECKS = [
    check_a_step_is_that_of_the_global_batch,
    check_a_bad_gradient_is_never_applied,
    check_ranks_agree,
    check_forgotten_parameters_are_named,
    check_priming_leaves_no_trace,
    check_every_precision_trains,
]


def main() -> None:
    with hpctrain.connect() as world:
        checks = [*CHECKS, *step_exactness.CHECKS]
        if world.topology.world_size in {2, 3}:  # one rank is compared with; a fourth adds nothing
            from metrics_exact import CHECKS as OF_METRICS

            checks += OF_METRICS
        if world.topology.world_size == 3:
            checks += wrong_sums.CHECKS
        if world.topology.world_size < 4:
            checks += brought_checks.CHECKS
        for check in checks:
            check(world)
        if world.topology.is_rank_zero:
            print("passed", len(checks), flush=True)


if __name__ == "__main__":
    main()
