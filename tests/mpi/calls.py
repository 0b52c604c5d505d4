"""Run on every rank: whatever a task does with a model, a step is that of a loop by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import call_models as models
import torch
from sharded_world import SECTION, full
from torch import Tensor, nn

import hpctrain
from hpctrain.data.loading.loader import Batch
from hpctrain.launch.world import World
from hpctrain.training.evaluation import evaluate
from hpctrain.training.optimization.optimizers import build_optimizer
from hpctrain.training.step.precision import NumberFormat
from hpctrain.training.step.shards import Shards
from hpctrain.training.step.train_step import TrainStep

COUNTS = (13, 12, 1, 7, 2)
"""Samples of global batches: shares are unequal, and a batch of one leaves most ranks none."""

CASES: Sequence[tuple[Callable[[], nn.Module], Callable[[], Any]]] = [
    (models.VAE, models.VAETask),
    (models.CLIP, models.CLIPTask),
    (models.GPT, models.GPTTask),
    (models.Reader, models.ReaderTask),
]


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
    world: World, model: nn.Module, task: Any, *, strategy: str, micro: int | None, **options: Any
) -> TrainStep:
    number_format = NumberFormat.of("64-true", world.device)
    shards = None
    if strategy == "fsdp" and world.topology.world_size > 1:
        shards = Shards(model, SECTION, number_format, world)
    step = TrainStep(
        model,
        task,
        build_optimizer(torch.optim.AdamW, shards or model, 0.01, {}),
        world,
        number_format=number_format,
        clip_norm=None,
        micro_batch_size=micro,
        largest_share=-(-13 // world.topology.world_size),
        example=models.fields_of(1, 99),
        shards=shards,
        **options,
    )
    step.prime()
    return step


def share(world: World, fields: dict[str, Tensor]) -> Batch:
    rank, size = world.topology.rank, world.topology.world_size
    mine = {name: item[rank::size] for name, item in fields.items()}
    return Batch(fields=mine, size=len(mine["x"]), global_size=len(fields["x"]), epoch=0, start=0)


def check_a_task_has_the_bare_model(world: World) -> None:
    for kind, make_task in CASES:
        losses, parameters = by_hand(kind, make_task(), COUNTS)
        for strategy, micro in (("ddp", None), ("ddp", 3), ("fsdp", None), ("fsdp", 2)):
            if strategy == "fsdp" and kind in (models.CLIP, models.Reader):
                continue
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
    metrics = evaluate(
        step.model,
        task,
        [item for item in [share(world, models.fields_of(9, 77))] if item.size],
        world,
        NumberFormat.of("64-true", world.device),
        rounds=1,
        call=step.call,
        idle_row=step.idle_row if step.shards else None,
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
    for strategy in ("ddp", "fsdp"):
        model = Counting().double()
        step = make_step(world, model, models.PerSample(), strategy=strategy, micro=2)
        before = int(model.calls)
        generator = torch.get_rng_state()
        batch = share(world, models.fields_of(size - 1, 0))  # none for the last rank
        step(batch, 0.01)
        assert bool(batch.size) != torch.equal(generator, torch.get_rng_state()), strategy
        if not batch.size:
            assert int(model.calls) == before, strategy


CHECKS = [check_a_task_has_the_bare_model, check_no_code_of_a_user_runs_without_samples]


def main() -> None:
    with hpctrain.connect() as world:
        for check in CHECKS:
            check(world)
        if world.topology.is_rank_zero:
            print("passed", len(CHECKS), flush=True)


if __name__ == "__main__":
    main()
