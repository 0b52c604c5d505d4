"""Run on every rank: a step, its resumption and an evaluation are exact at any world size."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import torch
from step_world import Net, alone, batch_of, samples, step_of
from torch import Tensor, nn

from hpctrain.errors import ConfigError, TrainingError
from hpctrain.launch.process_group import World
from hpctrain.training.evaluation import Turn, evaluate
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.parallel.ddp import check_equal_parameters, check_equal_shapes
from hpctrain.training.step import TrainStep
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Classification

CASES = [
    # samples of the batch, micro batch, clipping, arguments of the task
    (28, None, None, {}),
    (28, None, 0.05, {}),
    (29, 3, None, {}),  # unequal shares, unequal passes
    (1, None, None, {}),  # N mod G = 1: all ranks but one have nothing
    (1, 2, 0.05, {}),
    (2, 2, None, {"label_smoothing": 0.1}),
    (29, 3, 0.05, {"ignore_index": 2}),
    (1, 2, None, {"ignore_index": 2}),
    (28, 5, None, {"class_weights": [0.5, 1.0, 2.0, 1.0, 3.0], "ignore_index": 1}),
]


def check_gradients(world: World) -> None:
    for count, micro_batch_size, clip_norm, arguments in CASES:
        fields = samples(count, seed=count)
        results = []
        for where, micro in ((world, micro_batch_size), (alone(), None)):
            task = Classification(["features"], "label", **arguments)
            step = step_of(
                where, Net(), task=task, clip_norm=clip_norm, micro_batch_size=micro, lr=1.0
            )
            step(batch_of(where, fields), lr=1.0)
            numbers = step.read()
            results.append((dict(step.model.named_parameters()), numbers))
        (ours, our_numbers), (theirs, their_numbers) = results
        before = dict(Net().double().named_parameters())
        assert any(not torch.equal(before[name], theirs[name]) for name in before)
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-12, atol=1e-12)
        for name in ("loss", "grad_norm"):
            expected = torch.tensor(their_numbers[name], dtype=torch.float64)
            actual = torch.tensor(our_numbers[name], dtype=torch.float64)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        assert our_numbers["bad_steps"] == 0


def check_bad_gradients(world: World) -> None:
    last = world.topology.world_size - 1
    cases = [
        (torch.optim.AdamW, {}, False),
        (torch.optim.SGD, {"momentum": 0.9}, False),
        (torch.optim.RMSprop, {}, True),
    ]
    for optimizer, arguments, syncs in cases:
        step = step_of(world, Net(), precision="32-true", optimizer=optimizer, arguments=arguments)
        assert step.syncs == syncs
        batch = batch_of(world, samples(28))
        for poison, value in enumerate([math.inf, math.nan], start=1):
            before = {name: item.clone() for name, item in step.model.state_dict().items()}
            poisoned = batch_of(world, samples(28))
            if world.topology.rank == last:
                poisoned.fields["features"][0, 0] = value
            step(poisoned, lr=0.1)
            assert step.bad_steps.tolist() == [poison, poison, poison]
            for name, item in step.model.state_dict().items():
                assert torch.equal(item, before[name]), name
        numbers = step.read()
        assert numbers["bad_steps"] == numbers["skipped_steps"] == 2
        assert not math.isfinite(numbers["grad_norm"])

        step(batch, lr=0.1)
        numbers = step.read()
        assert math.isfinite(numbers["loss"])
        # Two in a row came before the last reading; the streak has ended since.
        assert (numbers["bad_steps"], numbers["most_bad_steps"]) == (0, 2)
        assert numbers["skipped_steps"] == 2
        step(batch, lr=0.1)
        assert step.read()["most_bad_steps"] == 0
        _check_equal_everywhere(world, step.model)


def _check_equal_everywhere(world: World, model: torch.nn.Module) -> None:
    mine = [item.tolist() for item in model.state_dict().values()]
    assert all(other == mine for other in world.communicator.all_gather(mine))
    assert all(
        math.isfinite(number) for item in model.parameters() for number in item.detach().flatten()
    )


STEPS, STOP = 6, 3
SMALL_BUCKETS_MB = 0.001


def check_resume(world: World) -> None:
    ends = [_resume(world, static_graph) for static_graph in (False, True)]
    for name, item in ends[0].items():
        assert torch.allclose(item, ends[1][name], rtol=0, atol=1e-6), name


def _resume(world: World, static_graph: bool) -> dict[str, Tensor]:
    """Stop and go on with an equal step. Return the parameters at the end."""

    def make() -> tuple[TrainStep, Net]:
        torch.manual_seed(0)
        model = Net(normalisation="batch")
        step = step_of(
            world,
            model,
            precision="32-true",
            optimizer=torch.optim.AdamW,
            lr=0.01,
            clip_norm=0.5,
            micro_batch_size=9,
            bucket_mb=SMALL_BUCKETS_MB,
            static_graph=static_graph,
        )
        return step, model

    batches = [batch_of(world, samples(61, seed=number)) for number in range(STEPS)]
    whole, model = make()
    losses = []
    for number, batch in enumerate(batches):
        if number == STOP:
            saved = copy.deepcopy((model.state_dict(), whole.optimizer.state_dict()))
        whole(batch, lr=0.01)
        losses.append(whole.read())

    resumed, other = make()
    other.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    for number in range(STOP, STEPS):
        resumed(batches[number], lr=0.01)
        assert resumed.read() == losses[number]
    rank_zero_decides = {"norm.running_mean", "norm.running_var"}  # DDP broadcasts before a pass
    for name, item in other.state_dict().items():
        if name not in rank_zero_decides or world.topology.rank == 0:
            assert torch.equal(item, model.state_dict()[name]), name
    if world.topology.world_size > 1:
        facts = whole._wrapped.call._get_ddp_logging_data()
        assert facts.get("static_graph", False) == static_graph
        assert len(facts["rebuilt_bucket_sizes"].split(",")) > 1  # else the order could not differ
        assert whole.communication_seconds() > 0
    return dict(model.named_parameters())


class Noisy(Net):
    """Batch statistics that differ over ranks, and dropout that stays in evaluation."""

    def __init__(self) -> None:
        super().__init__(normalisation="batch")
        self.frozen = nn.Linear(1, 1)
        self.frozen.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return super().forward(features)


def shares(world: World, fields: dict[str, Tensor], batch_size: int) -> list[Any]:
    count, rank, size = len(fields["label"]), world.topology.rank, world.topology.world_size
    rows = range(rank * count // size, (rank + 1) * count // size)
    return [
        batch_of(alone(), {name: item[rows[i : i + batch_size]] for name, item in fields.items()})
        for i in range(0, len(rows), batch_size)
    ]


def check_evaluation(world: World) -> None:
    rank = world.topology.rank
    number_format = NumberFormat.of("64-true", world.device)
    for arguments in ({}, {"ignore_index": 3}, {"class_weights": [0.5, 1.0, 2.0, 1.0, 3.0]}):
        task = Classification(["features"], "label", **arguments)
        for count in (37, 2, 1):  # with fewer samples than ranks, some have none
            model = Noisy()
            step = step_of(world, model, largest_share=32)
            step(batch_of(world, samples(28)), lr=0.1)  # rank 0's batch statistics differ now
            model.first.eval()
            fields = samples(count, seed=5)
            torch.manual_seed(rank)
            random.seed(rank)
            np.random.seed(rank)  # noqa: NPY002
            before = _state(model)
            metrics = evaluate(
                TaskRunner(model, task, number_format),
                [Turn(batches=shares(world, fields, 4))],
                world,
            )
            assert _state(model) == before

            reference = Noisy().double()
            tensors = world.communicator.broadcast(model.state_dict())
            reference.load_state_dict(tensors)
            whole = shares(alone(), fields, count)
            expected = evaluate(
                TaskRunner(reference, task, number_format), [Turn(batches=whole)], alone()
            )
            assert metrics.keys() == expected.keys() == task.metrics.keys()
            assert metrics["accuracy"] == expected["accuracy"]
            assert abs(metrics["loss"] - expected["loss"]) <= 1e-12 * expected["loss"]


def _state(model: nn.Module) -> list[Any]:
    return [
        [item.tolist() for item in model.state_dict().values()],
        [module.training for module in model.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
    ]


class Unused(Net):
    def __init__(self, unused_here: bool) -> None:
        super().__init__()
        self.extra = nn.Linear(3, 3)
        self._unused_here = unused_here

    def forward(self, features: Tensor) -> Tensor:
        output = super().forward(features)
        return output if self._unused_here else output + 0 * self.extra(torch.ones(3)).sum()


def check_mistakes(world: World) -> None:
    check_equal_shapes(Net(), world)
    last = world.topology.world_size - 1
    if world.topology.world_size > 1:
        model = Unused(unused_here=False)
        step = step_of(world, model, precision="32-true")
        step(batch_of(world, samples(28)), lr=0.1)
        model._unused_here = True
        try:
            step(batch_of(world, samples(28)), lr=0.1)
        except TrainingError as error:
            assert "extra.weight, extra.bias had no part in the loss of this step" in str(error)
        else:
            raise AssertionError("nothing was said")
        odd = Net()
        if world.topology.rank == last:
            odd.third = nn.Linear(16, 7)
        try:
            check_equal_shapes(odd, world)
        except TrainingError as error:
            assert error.everywhere
            assert "third.weight is (" in str(error)
        else:
            raise AssertionError("nothing was said")
        odd = Net()
        odd.register_buffer("table", torch.zeros(3 + (world.topology.rank == last)))
        try:
            check_equal_shapes(odd, world)
        except TrainingError as error:
            assert "table is (" in str(error)
        else:
            raise AssertionError("nothing was said")
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(Net(normalisation="batch"))
        try:
            step_of(world, synchronised)
        except ConfigError as error:
            assert "SyncBatchNorm" in str(error)
        else:
            raise AssertionError("nothing was said")


def check_parameters_are_compared(world: World) -> None:
    """One flipped bit on one rank is found and named, on every rank."""
    model = Net()
    check_equal_parameters(model, world, 7)
    rank, size = world.topology.rank, world.topology.world_size
    if rank == size - 1:
        model.second.weight.data.view(torch.int32)[3, 4] ^= 1
    if size == 1:
        check_equal_parameters(model, world, 7)
        return
    try:
        check_equal_parameters(model, world, 7)
    except TrainingError as error:
        assert error.everywhere
        assert "step 7" in str(error)
        assert "second.weight (1 of 6)" in str(error)
        assert f"on rank {size - 1} of {size}" in str(error)
    else:
        raise AssertionError("nothing was said")


def check_compressed_gradients(world: World) -> None:
    """Rounded on the way, the same on all ranks, and close to those of one process."""
    results = []
    for where in (world, alone()):
        step = step_of(
            where,
            Net(),
            precision="32-true",
            lr=1.0,
            compress_gradients="fp16",
            micro_batch_size=5,
            bucket_mb=SMALL_BUCKETS_MB,
        )
        before = {name: item.detach().clone() for name, item in step.model.named_parameters()}
        step(batch_of(where, samples(28)), lr=1.0)
        assert step.read()["bad_steps"] == 0
        updates = {name: before[name] - item for name, item in step.model.named_parameters()}
        results.append(updates)
        if where is world:
            _check_equal_everywhere(world, step.model)
    ours, theirs = results
    largest = max(item.abs().max() for item in theirs.values())
    differences = [(ours[name] - item).abs().max() for name, item in theirs.items()]
    assert max(differences) < 2e-3 * largest
    assert world.topology.world_size == 1 or max(differences) > 0  # they were rounded indeed


CHECKS = [
    check_gradients,
    check_bad_gradients,
    check_resume,
    check_evaluation,
    check_mistakes,
    check_parameters_are_compared,
    check_compressed_gradients,
]
