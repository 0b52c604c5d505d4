"""Run on every rank: spread over the ranks, a step does what it does where each has everything."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import brought_checks
import torch
import torch._dynamo.utils
from sharded_world import SECTION, Tower, build, full
from step_world import FEATURES, alone, batch_of, samples
from torch import Tensor, nn

import hpctrain
from hpctrain.data.loading.loader import Batch
from hpctrain.errors import TrainingError
from hpctrain.launch.process_group import World
from hpctrain.training.evaluation import Turn, evaluate
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.step import TrainStep
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Classification

# A batch of one sample leaves all ranks but one without any.
COUNTS = (28, 29, 1, 2, 29)
# Largest differences of losses and gradient norms to those of ddp.
TOLERANCES = {
    "64-true": 1e-12,
    "32-true": 1e-5,
    "bf16-mixed": 0.02,
    "16-mixed": 0.002,
    "bf16-true": 0.03,
}


# Micro-batch sizes and normalisations: exact formats meet all of them, each narrow one meets one.
WAYS: tuple[tuple[int | None, str], ...] = ((None, "layer"), (3, "layer"), (7, "batch"))
NARROW = {"bf16-mixed": WAYS[1:2], "16-mixed": WAYS[2:], "bf16-true": WAYS[:1]}


def check_every_precision_is_as_with_ddp(world: World) -> None:
    for precision, tolerance in TOLERANCES.items():
        # Four ranks add a rank without samples, and nothing to the other formats.
        if world.topology.world_size > 3 and precision != "64-true":
            continue
        for micro_batch_size, norm in NARROW.get(precision, WAYS):
            counts = [28, 28, 28] if norm == "batch" else COUNTS
            numbers, parameters = [], []
            for sharded in (False, True):
                step = build(
                    world,
                    Tower(norm=norm),
                    sharded=sharded,
                    precision=precision,
                    micro_batch_size=micro_batch_size,
                )
                numbers.append(trained(world, step, counts))
                parameters.append(full(world, step))
            for ours, theirs in zip(*numbers, strict=True):
                assert ours["bad_steps"] == theirs["bad_steps"] == 0
                # Statistics of few rows amplify every rounding of a low precision.
                rough = norm == "batch" and tolerance > 1e-3
                for name in ["loss"] if rough else ["loss", "grad_norm"]:
                    close = abs(ours[name] - theirs[name]) <= tolerance * max(1, theirs[name])
                    # An overflow that a smaller loss scale cures is one with both.
                    overflow = not (math.isfinite(ours[name]) or math.isfinite(theirs[name]))
                    assert close or overflow, (precision, ours, theirs)
            if precision == "64-true":
                for name, tensor in parameters[0].items():
                    torch.testing.assert_close(parameters[1][name], tensor, rtol=0, atol=1e-9)


def trained(world: World, step: TrainStep, counts: Any = COUNTS) -> list[dict[str, float]]:
    numbers = []
    for seed, count in enumerate(counts):
        step(batch_of(world, samples(count, seed=seed)), lr=0.01)
        if step.average is not None:
            step.average.update(seed + 1)
        numbers.append(step.read())
    return numbers


def check_ways_to_compute(world: World) -> None:
    """None of them changes a number; and every optimizer that works by elements does it here."""
    ways: list[dict[str, Any]] = [
        {"section": replace(SECTION, reshard_after_forward=False)},
        {"section": replace(SECTION, shard=("blocks.*", "first"))},
        {"section": replace(SECTION, shard=("Block",))},
        {"section": replace(SECTION, activation_checkpointing=("blocks.*",))},
        {"section": replace(SECTION, cpu_offload=True)},
        {"clip_value": 0.01},
        {"task": Classification(["features"], "label", ignore_index=2)},
        *(
            {"optimizer": getattr(torch.optim, name), "arguments": arguments}
            for name, arguments in {
                "SGD": {"momentum": 0.9},
                "Adam": {"amsgrad": True},
                "Adagrad": {},
                "RMSprop": {"momentum": 0.9, "centered": True},
                "NAdam": {},
            }.items()
        ),
    ]

    def outcome(*, sharded: bool, **way: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        step = build(world, Tower(), sharded=sharded, micro_batch_size=3, ema_decay=0.5, **way)
        numbers = trained(world, step, (29, 1, 28))
        with step.average.in_model():  # type: ignore[union-attr]
            return numbers, full(world, step)

    plain = outcome(sharded=False)
    for way in ways:
        expected = plain if way.keys() == {"section"} else outcome(sharded=False, **way)
        found = outcome(sharded=True, **way)
        for ours, theirs in zip(found[0], expected[0], strict=True):
            if theirs["loss"] == theirs["loss"]:  # where nothing counts there is no mean
                assert abs(ours["loss"] - theirs["loss"]) < 1e-11, (way, ours, theirs)
        for name, tensor in expected[1].items():
            torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-9)


def check_units_are_compiled(world: World) -> None:
    counters = torch._dynamo.utils.counters
    counters.clear()
    numbers = []
    for section in (SECTION, replace(SECTION, compile=True)):
        with compiled_without_a_compiler():
            step = build(world, Tower(), sharded=True, section=section)
            numbers.append(trained(world, step, (29, 1)))
    for ours, theirs in zip(*numbers, strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 1e-12
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


@contextmanager
def compiled_without_a_compiler() -> Iterator[None]:
    original = nn.Module.compile

    def compile_(self: nn.Module, mode: str) -> None:
        original(self, backend="aot_eager")

    nn.Module.compile = compile_  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.compile = original  # type: ignore[method-assign]


def check_a_bad_gradient_is_never_applied(world: World) -> None:
    """What is not finite in the rows of one rank is everybody's."""
    rank, size = world.topology.rank, world.topology.world_size
    for optimizer, syncs in ((torch.optim.AdamW, False), (torch.optim.RMSprop, True)):
        step = build(world, Tower(), sharded=True, precision="32-true", optimizer=optimizer)
        assert step.syncs == syncs
        trained(world, step, (28,))
        for poison in (math.inf, math.nan):
            before = full(world, step)
            batch = batch_of(world, samples(28))
            if rank == size - 1:
                batch.fields["features"][0, 0] = poison
            step(batch, lr=0.1)
            after = full(world, step)
            assert all(torch.equal(after[name], item) for name, item in before.items())
        assert step.read()["bad_steps"] == 2
        assert trained(world, step, (28,))[0]["bad_steps"] == 0


def check_priming(world: World) -> None:
    """It leaves no trace, and a parameter without a part in the loss is named in the step after."""
    torch.manual_seed(5)
    step = build(world, Tower(norm="batch"), sharded=True, prime=False)
    before, generator = full(world, step), torch.get_rng_state()
    step.dry_run()
    assert torch.equal(torch.get_rng_state(), generator)
    after = full(world, step)
    assert all(torch.equal(after[name], item) for name, item in before.items())

    model = Tower()
    model.extra = nn.Linear(3, 3)
    step = build(world, model, sharded=True)
    try:
        trained(world, step, (28,))
    except TrainingError as error:
        assert "extra.weight, extra.bias" in str(error)
    else:
        raise AssertionError("nothing was said")


def check_evaluation(world: World) -> None:
    """Ranks with fewer batches, or none, keep the others company."""
    rank, size = world.topology.rank, world.topology.world_size
    number_format = NumberFormat.of("64-true", world.device)
    task = Classification(["features"], "label")
    for count, batch_size in itertools.product((1, 5, 29), (2, 8)):
        step = build(world, Tower(norm="batch"), sharded=True, ema_decay=0.9)
        trained(world, step, (28, 28))
        before = full(world, step)
        whole = samples(count, seed=5)
        whole["features"] = whole["features"].double()
        largest = -(-count // size)
        with averaged(step):
            metrics = evaluate(
                TaskRunner(step.model, task, number_format, call=step.runner.call),
                [
                    Turn(
                        batches=batches(whole, rank, size, batch_size),
                        rounds=-(-largest // batch_size),
                        idle_row=lambda row=step.idle_row: row,
                    )
                ],
                world,
            )
            step.settle()
        after = full(world, step)
        assert all(torch.equal(after[name], item) for name, item in before.items())
        reference = Tower(norm="batch").double()
        with averaged(step):
            reference.load_state_dict(world.communicator.broadcast(full(world, step)))
        expected = evaluate(
            TaskRunner(reference, task, number_format),
            [Turn(batches=batches(whole, 0, 1, count), rounds=1)],
            alone(),
        )
        assert metrics is not None
        assert expected is not None
        assert metrics["accuracy"] == expected["accuracy"]
        assert abs(metrics["loss"] - expected["loss"]) < 1e-12
        again = trained(world, step, (28,))
        assert again[0]["bad_steps"] == 0


@contextmanager
def averaged(step: TrainStep) -> Iterator[None]:
    assert step.average is not None
    with step.average.in_model():
        yield


def batches(
    fields: dict[str, torch.Tensor], rank: int, world_size: int, batch_size: int
) -> Iterator[Batch]:
    mine = {name: item[rank::world_size] for name, item in fields.items()}
    for first in range(0, len(mine["label"]), batch_size):
        part = {name: item[first : first + batch_size] for name, item in mine.items()}
        size = len(part["label"])
        yield Batch(fields=part, size=size, global_size=size, epoch=0, start=0)


def check_memory(world: World) -> None:
    """A rank holds its part, and no more of the optimizer's state."""
    step = build(world, Tower(), sharded=True)
    trained(world, step, (28,))
    size = world.topology.world_size
    whole = sum(item.numel() for item in Tower().parameters())
    mine = sum(item.numel() for _, item in step.held.named_parameters())
    assert sum(world.communicator.all_gather(mine)) == whole
    assert mine < 1.5 * whole / size
    state = [item for slots in step.optimizer.state.values() for item in slots.values()]
    trained_here = sum(item.numel() for item in step.optimizer.param_groups[0]["params"])
    assert sum(item.numel() for item in state if item.ndim) == 2 * trained_here
    assert step.idle_row["features"].shape == (1, FEATURES)


BROUGHT = [functools.partial(check, sharded=True) for check in brought_checks.CHECKS]
CHECKS: list[Callable[[World], None]] = [
    check_every_precision_is_as_with_ddp,
    check_ways_to_compute,
    check_units_are_compiled,
    check_a_bad_gradient_is_never_applied,
    check_priming,
    check_evaluation,
    check_memory,
    *BROUGHT,
]


ONCE = {check_ways_to_compute, check_units_are_compiled, *BROUGHT}
"""What a fourth rank adds nothing to."""


def main() -> None:
    with hpctrain.connect() as world:
        for check in CHECKS:
            if world.topology.world_size < 4 or check not in ONCE:
                check(world)
        if world.topology.is_rank_zero:
            print("passed", len(CHECKS), flush=True)


if __name__ == "__main__":
    main()
