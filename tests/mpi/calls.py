"""Run on every rank: whatever a task does with a model, a step is that of a loop by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import call_models as models
import torch
from helpers.one_sample import OneSample
from sharded_world import SECTION, full
from step_world import alone
from torch import Tensor, nn

import hpctrain
from hpctrain.config.schema import TrainingSection
from hpctrain.data.loading.batch import Batch, Rows, count_passes, cut
from hpctrain.errors import TrainingError
from hpctrain.launch.process_group import World
from hpctrain.training.dry_run.evaluation import rehearse
from hpctrain.training.evaluation import Turn, evaluate
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.optim.optimizer import build_optimizer
from hpctrain.training.parallel.fsdp import ShardedModel
from hpctrain.training.parallel.fsdp_units import Findings, try_out
from hpctrain.training.step import StepOptions, TrainStep
from hpctrain.training.task.runner import TaskRunner

LARGEST = 13
COUNTS = (LARGEST, 1, 12)
"""Samples of global batches: shares are unequal, and a batch of one leaves most ranks none."""

CASES: Sequence[tuple[Callable[[], nn.Module], Callable[[], Any]]] = [
    (models.VAE, models.VAETask),
    (models.CLIP, models.CLIPTask),
    (models.GPT, models.GPTTask),
    (models.Reader, models.ReaderTask),
]


WAYS = (("ddp", 3), ("static", None), ("fsdp", None), ("fsdp", 2))


def built(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind().double()


def by_hand(kind: Callable[[], nn.Module], task: Any, counts: Sequence[int]) -> Any:
    """Return losses and parameters of the textbook loop over whole batches."""
    model = built(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for seed, count in enumerate(counts):
        loss_sum, weight = task.loss(model, models.fields_of(count, seed))
        optimizer.zero_grad()
        (loss_sum / weight).backward()
        optimizer.step()
        losses.append((loss_sum / weight).item())
    return losses, dict(model.named_parameters())


def make_step(
    world: World,
    model: nn.Module,
    task: Any,
    *,
    strategy: str,
    micro: int | None,
    unused: Any = "error",
    tried: bool = True,
) -> TrainStep:
    number_format = NumberFormat.of("64-true", world.device)
    sharded = None
    if strategy == "fsdp" and world.topology.world_size > 1:
        section = replace(SECTION, unused_parameters=unused)
        unfit = try_out(world, model, task, models.fields_of(1, 99)) if tried else Findings()
        sharded = ShardedModel(model, section, number_format, world, unfit)
    step = TrainStep(
        TaskRunner(model, task, number_format),
        build_optimizer(torch.optim.AdamW, sharded or model, 0.01, {}),
        world,
        options=StepOptions(
            training=TrainingSection(static_graph=strategy == "static", unused_parameters=unused),
            micro_batch_size=micro,
        ),
        shapes=OneSample(models.fields_of(1, 99), LARGEST // world.topology.world_size + 1),
        example=models.fields_of(1, 99),
        sharded=sharded,
    )
    step.dry_run()
    return step


def share(world: World, fields: dict[str, Tensor]) -> Batch:
    rank, size = world.topology.rank, world.topology.world_size
    mine = {name: item[rank::size] for name, item in fields.items()}
    return Batch(fields=mine, size=len(mine["x"]), global_size=len(fields["x"]), epoch=0, start=0)


def check_a_task_has_the_bare_model(world: World) -> None:
    for kind, make_task in CASES:
        losses, parameters = by_hand(kind, make_task(), COUNTS)
        for strategy, micro in WAYS:
            task = make_task()
            step = make_step(world, built(kind), task, strategy=strategy, micro=micro)
            for seed, (count, loss) in enumerate(zip(COUNTS, losses, strict=True)):
                step(share(world, models.fields_of(count, seed)), 0.01)
                ours = step.read()["loss"]
                assert abs(ours - loss) < 1e-12, (kind, strategy, micro, seed, ours, loss)
            for name, item in full(world, step).items():
                if name in parameters:
                    torch.testing.assert_close(item, parameters[name], rtol=0, atol=1e-12)
            assert list(step.model.state_dict()) == list(built(kind).state_dict())
            metrics = evaluated(world, step, task)
            model = built(kind)
            model.load_state_dict(parameters, strict=False)
            loss_sum, weight = task.loss(model.eval(), models.fields_of(9, 77))
            assert abs(metrics["loss"] - (loss_sum / weight).item()) < 1e-12


def evaluated(world: World, step: TrainStep, task: Any) -> dict[str, float]:
    number_format = NumberFormat.of("64-true", world.device)
    rehearse(
        TaskRunner(step.model, task, number_format, call=step.runner.call),
        Rows(models.fields_of(4, 7)),
        world,
    )
    metrics = evaluate(
        TaskRunner(step.model, task, number_format, call=step.runner.call),
        [
            Turn(
                batches=[item for item in [share(world, models.fields_of(9, 77))] if item.size],
                rounds=1,
                idle_row=(lambda: step.idle_row) if step.sharded else None,
            )
        ],
        world,
    )
    step.settle()
    assert metrics is not None
    return metrics


def check_no_code_of_a_user_runs_without_samples(world: World) -> None:
    """And under fsdp, where it has to, it leaves nothing behind."""

    class Counting(models.Dropped):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            torch.rand(())
            self.calls = self.calls + 1
            return super().forward(x)

    size = world.topology.world_size
    for strategy in ("ddp", "fsdp") if size > 1 else ():
        model = Counting().double()
        step = make_step(world, model, models.PerSample(), strategy=strategy, micro=2)
        before = int(model.calls)
        generator = torch.get_rng_state()
        batch = share(world, models.fields_of(size - 1, 0))  # none for the last rank
        step(batch, 0.01)
        assert bool(batch.size) != torch.equal(generator, torch.get_rng_state()), strategy
        if not batch.size:
            assert int(model.calls) == before, strategy


class Routed(models.PerSample):
    """Has the model leave out what a plan says: by step, rank and pass."""

    def __init__(self, plan: Callable[[int, int], tuple[set[int], bool]]) -> None:
        self._plan = plan
        self.step = self.calls = 0

    def losses(self, model: models.Dropped, fields: Any) -> Tensor:
        model.skipped, model.uses_auxiliary = self._plan(self.step, self.calls)  # type: ignore[assignment]
        self.calls += 1
        return super().losses(model, fields)


def check_parts_left_out(world: World) -> None:
    """What no rank uses is not updated, what some use has zeros of the others."""
    rank, size = world.topology.rank, world.topology.world_size

    def plan_of(rank: int) -> Callable[[int, int], tuple[set[int], bool]]:
        def plan(step: int, call: int) -> tuple[set[int], bool]:
            plans: list[tuple[set[int], bool]] = [
                ({1} if call > 5 else set(), True),  # seen by a trial
                ({1}, step % 2 == 0),  # on no rank
                ({rank % 3}, True),  # on some ranks
                ({0, 2} if call else {1}, bool(call)),  # in some passes
            ]
            return plans[step % len(plans)]

        return plan

    counts = (13, 12, 13, 9, 1, 12)
    # By hand: each rank's share with what it leaves out, cut into passes as it cuts them.
    for micro in (None, 2):
        model: Any = built(models.Dropped)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = []
        for number, count in enumerate(counts):
            fields = models.fields_of(count, number)
            total = torch.zeros((), dtype=torch.float64)
            for other in range(size):
                mine = {name: item[other::size] for name, item in fields.items()}
                passes = count_passes(LARGEST // size + 1, micro)
                cuts = cut(len(mine["x"]), passes)
                for call, (first, stop) in enumerate(item for item in cuts if item[0] < item[1]):
                    model.skipped, model.uses_auxiliary = plan_of(other)(number, call)
                    part = {name: item[first:stop] for name, item in mine.items()}
                    total = total + models.PerSample().loss(model, part)[0]
            optimizer.zero_grad()
            (total / count).backward()
            optimizer.step()
            losses.append((total / count).item())
        for strategy in ("ddp", "fsdp"):
            ours: Any = built(models.Dropped)
            task = Routed(plan_of(rank))
            step = make_step(world, ours, task, strategy=strategy, micro=micro, unused="allow")
            for number, (count, loss) in enumerate(zip(counts, losses, strict=True)):
                task.step, task.calls = number, 0
                step(share(world, models.fields_of(count, number)), 0.01)
                assert abs(step.read()["loss"] - loss) < 1e-12, (strategy, micro, number)
            expected = model.state_dict()
            for name, item in full(world, step).items():
                torch.testing.assert_close(item, expected[name], rtol=0, atol=1e-12)


def check_experts(world: World) -> None:
    """Of those that no sample was sent to, nothing is known to the optimizer."""
    for counts in ((13, 12, 1), (1, 1)):
        losses, parameters = by_hand(models.MoE, models.PerSample(), counts)
        for strategy, micro in (("ddp", 3), ("fsdp", None)):
            model, task = built(models.MoE), models.PerSample()
            step = make_step(world, model, task, strategy=strategy, micro=micro, unused="allow")
            for seed, (count, loss) in enumerate(zip(counts, losses, strict=True)):
                step(share(world, models.fields_of(count, seed)), 0.01)
                assert abs(step.read()["loss"] - loss) < 1e-12, (counts, strategy, micro, seed)
            for name, item in full(world, step).items():
                torch.testing.assert_close(item, parameters[name], rtol=0, atol=1e-12)


def check_a_loss_without_parameters(world: World) -> None:
    """A batch without targets has a loss that is a plain number; nothing is updated by it."""

    class NoTargets(models.PerSample):
        empty = False

        def losses(self, model: Any, fields: Any) -> Tensor:
            return torch.zeros(len(fields["x"])) if self.empty else super().losses(model, fields)

    for strategy, unused in (("ddp", "allow"), ("ddp", "error"), ("fsdp", "allow")):
        model, task = built(models.Dropped), NoTargets()
        step = make_step(world, model, task, strategy=strategy, micro=4, unused=unused)
        before = {name: item.clone() for name, item in model.state_dict().items()}
        task.empty = True
        try:
            step(share(world, models.fields_of(12, 0)), 0.01)
        except TrainingError as error:
            assert world.topology.world_size > 1
            assert (strategy, unused) != ("ddp", "allow")
            assert "no parameter had a part in the loss of a pass" in str(error)
            continue
        assert world.topology.world_size == 1 or (strategy, unused) == ("ddp", "allow")
        assert step.read()["loss"] == 0
        for name, item in model.state_dict().items():
            assert torch.equal(item, before[name]), name
        task.empty = world.topology.rank == 0  # and the others have targets
        step(share(world, models.fields_of(12, 0)), 0.01)
        assert step.read()["bad_steps"] == 0


def check_parts_left_out_are_an_error(world: World) -> None:
    """On several ranks, unless allowed: by name, on the rank where it happens."""
    rank = world.topology.rank
    if world.topology.world_size == 1:
        return
    had = "had no part in the loss of this step, and in the first one had"
    cases: list[tuple[Any, int | None, str, bool, tuple[str, ...]]] = [
        # plan, micro batch, strategy, whether units were tried, what is said
        (lambda s, c: ({1} if s else set(), True), None, "ddp", True, ("layers.1.linear", had)),
        (lambda s, c: (set(), not (s and c)), 2, "ddp", True, ("auxiliary.weight, ", had)),
        (lambda s, c: (set(), not s), None, "fsdp", True, ("auxiliary.weight, ", had)),
        # Units of one shape: without an error, rows of one would be taken for rows of the other.
        (
            lambda s, c: ({rank % 2} if s else set(), True),
            None,
            "fsdp",
            False,
            (f"layers.{rank % 2} was not called in this pass", "training.shard"),
        ),
    ]
    for plan, micro, strategy, tried, texts in cases:
        task, model = Routed(plan), built(models.Dropped)
        step = make_step(world, model, task, strategy=strategy, micro=micro, tried=tried)
        step(share(world, models.fields_of(12, 0)), 0.01)
        task.step, task.calls = 1, 0
        try:
            step(share(world, models.fields_of(12, 0)), 0.01)
        except TrainingError as error:
            assert all(text in str(error) for text in texts), error
            assert strategy == "fsdp" or 'training.unused_parameters = "allow"' in str(error)
        else:
            raise AssertionError("nothing was said")


CHECKS = [
    check_a_task_has_the_bare_model,
    check_no_code_of_a_user_runs_without_samples,
    check_parts_left_out,
    check_experts,
    check_a_loss_without_parameters,
    check_parts_left_out_are_an_error,
]


def main() -> None:
    with hpctrain.connect() as world:
        for check in CHECKS:
            check(world)
            check(alone())
        if world.topology.is_rank_zero:
            print("passed", len(CHECKS), flush=True)


if __name__ == "__main__":
    main()
