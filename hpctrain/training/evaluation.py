"""Metrics of a whole dataset: sums and counts over ranks, every sample exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hpctrain.data.loading.loader import Batch
from hpctrain.launch.process_group import World
from hpctrain.topology import on_rank_zero
from hpctrain.training.gathering import gather_at_rank_zero
from hpctrain.training.metric_objects import MetricObjects
from hpctrain.training.metrics import Part, Totals, combine
from hpctrain.training.step.broadcast import broadcast_buffers
from hpctrain.training.step.call import Call, call_directly
from hpctrain.training.step.precision import NumberFormat
from hpctrain.training.step.undisturbed import evaluating, kept_generators, kept_tensors
from hpctrain.training.task import Fields, Task


def evaluate(
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    world: World,
    number_format: NumberFormat,
    *,
    rounds: int = 0,
    call: Call | None = None,
    idle_row: Fields | None = None,
    reused: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Return the metrics of a task over a dataset, None if stopped. Collective: all ranks.

    Runs the bare module: DDP's forward would broadcast buffers, and ranks have different numbers
    of batches. Parameters, buffers, generators and train flags are left as they were;
    plain attributes are the module's own.

    Args:
        model: the bare module, its parameters the same on all ranks. Where ranks have buffers of
            their own, such as batch statistics, those of rank 0 count: a checkpoint holds them.
        task: computes the metrics.
        batches: of this rank, none included; over all ranks every sample exactly once.
        world: the ranks.
        number_format: of parameters and arithmetic.
        rounds: the largest number of batches of any rank.
        call: runs a method of the task on the model; None: directly. Under FSDP, where parameters
            have to be gathered around it, collective: all ranks.
        idle_row: where the parameters are spread over the ranks, and a pass needs all of them: one
            row to run, and to forget, while others still have batches.
        reused: whether the model's outputs lie where its next ones will, as under CUDA graphs.
        stopping: asked after every batch, `rounds` times on every rank, so that it may
            communicate; True on all ranks in the same round.

    Raises:
        TrainingError: if the task breaks its contract, or gives other metrics than it declares.
    """
    call = call or call_directly(model)
    objects = MetricObjects(task, world.device)
    totals = Totals(task, objects, reused=reused)
    try:
        with (
            torch.no_grad(),
            kept_generators(world.device),
            _tensors_of_rank_zero(model, world),
            evaluating(model.modules()),
            objects.local(),
        ):
            objects.reset()
            for batch in batches:
                world.pulse.tick()
                fields = number_format.cast(batch.fields, task.inputs)
                with number_format.arithmetic():
                    totals.add(call(task.evaluate, fields))
                rounds -= 1
                if stopping():
                    return None
            # The others may have another batch, and come to another boundary.
            for _ in range(rounds):
                if idle_row is not None:
                    with objects.untouched(), number_format.arithmetic():
                        call(task.evaluate, idle_row)
                if stopping():
                    return None
            return _combined(totals.part(), task, objects, world)
    finally:
        objects.reset()


def _combined(part: Part, task: Task, objects: MetricObjects, world: World) -> dict[str, float]:
    """Return the metrics of all parts, the same on every rank. Collective: all ranks."""
    parts = gather_at_rank_zero(part, world)
    # Not computed by each: in its last bit a number could depend on the host.
    return on_rank_zero(world.communicator, lambda: combine(parts or (), task, objects))


@contextmanager
def _tensors_of_rank_zero(model: nn.Module, world: World) -> Iterator[None]:
    """Have rank 0's buffers on every rank in the body, and all as it was after it.

    Collective: all ranks.
    """
    with kept_tensors(model):
        if world.topology.world_size > 1:
            broadcast_buffers(world, model)
        yield
