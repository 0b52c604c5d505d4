"""Run on every rank: metrics are those of one process, however many ranks and whatever shares."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from metric_tasks import COUNTED, TASKS, BatchF1, Summed
from sharded_world import Tower, build
from step_world import alone, samples
from torch import Tensor

from hpctrain.data.loading.batch import Batch, Rows
from hpctrain.errors import TrainingError
from hpctrain.launch.process_group import World
from hpctrain.training import evaluation
from hpctrain.training.dry_run.evaluation import rehearse
from hpctrain.training.evaluation import Turn, evaluate
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.task.runner import TaskRunner

BATCH = 4


def shares(world: World, fields: dict[str, Tensor], batch_size: int = BATCH) -> Iterator[Batch]:
    """Yield this rank's batches, as the loader cuts them: runs of rows, of unequal length."""
    count, rank, size = len(fields["label"]), world.topology.rank, world.topology.world_size
    first, stop = rank * count // size, (rank + 1) * count // size
    for start in range(first, stop, batch_size):
        rows = slice(start, min(start + batch_size, stop))
        part = {name: item[rows] for name, item in fields.items()}
        length = len(part["label"])
        yield Batch(fields=part, size=length, global_size=length, epoch=0, start=0)


def check_metrics_that_are_no_quotient(world: World) -> None:
    """To the last bit where they follow from counts; also where some ranks have no batch."""
    number_format = NumberFormat.of("64-true", world.device)
    size = world.topology.world_size
    for sharded in {False, size > 1}:
        step = build(world, Tower(), sharded=sharded)
        reference = Tower().double()
        for make in TASKS:
            task, other = make(), make()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchmetrics: few samples have not all classes
                rehearse(
                    TaskRunner(step.model, task, number_format, call=step.runner.call),
                    Rows(samples(8, seed=3)),
                    world,
                )
                step.settle()
                for count in (38, 2):
                    fields = samples(count, seed=6)
                    fields["label"][0], fields["label"][1] = 0, 1
                    ours = evaluate(
                        TaskRunner(step.model, task, number_format, call=step.runner.call),
                        [
                            Turn(
                                batches=shares(world, fields),
                                rounds=math.ceil(math.ceil(count / size) / BATCH),
                                idle_row=(lambda row=step.idle_row: row) if sharded else None,
                            )
                        ],
                        world,
                    )
                    step.settle()
                    whole = shares(alone(), fields, count)
                    theirs = evaluate(
                        TaskRunner(reference, other, number_format), [Turn(batches=whole)], alone()
                    )
                    assert ours is not None
                    assert theirs is not None
                    assert list(ours) == list(theirs) == list(task.metrics)
                    for name, value in theirs.items():
                        # torchmetrics makes no correlation of parts of one sample each.
                        if name != "pearson" or count > 2:
                            _compare(name, ours[name], value)


def _compare(name: str, ours: float, theirs: float) -> None:
    same = ours == theirs or (ours != ours and theirs != theirs)
    close = abs(ours - theirs) <= 1e-12 * max(1.0, abs(theirs))
    assert same or (close and name not in COUNTED), (name, ours, theirs)


def check_a_metric_of_batches_is_refused(world: World) -> None:
    rows = samples(9, seed=world.topology.rank)
    number_format = NumberFormat.of("32-true", world.device)
    try:
        rehearse(TaskRunner(Tower(), BatchF1(), number_format), Rows(rows), world)
    except TrainingError as error:
        assert error.everywhere
        assert 'BatchF1.evaluate: the metric "f1" depends on how the data are cut' in str(error)
        assert "finish(sums)" in str(error)
    else:
        raise AssertionError("not found")


def check_rows_are_gathered(world: World) -> None:
    """More than the control plane carries, in several pieces, of any dtype."""
    rank, size = world.topology.rank, world.topology.world_size
    buffer, evaluation._BUFFER_BYTES = evaluation._BUFFER_BYTES, 100_000 * size
    try:
        value: dict[str, Any] = {
            "large": torch.arange(70_000 * rank, dtype=torch.float64),
            "views": torch.arange(6).to(torch.bfloat16).view(2, 3)[:, 1:],
            "scalar": torch.tensor(rank == 1),
        }
        everyone = evaluation.gather_at_rank_zero(value, world)
    finally:
        evaluation._BUFFER_BYTES = buffer
    assert (everyone is None) == (rank > 0)
    for number, found in enumerate(everyone or []):
        assert torch.equal(found["large"], torch.arange(70_000 * number, dtype=torch.float64))
        assert torch.equal(found["views"], value["views"])
        assert found["scalar"].item() == (number == 1)


def check_a_mistake_at_the_end_is_told_by_all(world: World) -> None:
    """Only rank 0 computes, and all learn of what it found."""

    class Undeclared(Summed):
        def finish(self, sums: Any) -> dict[str, Any]:
            return {**super().finish(sums), "extra": 1.0}

    try:
        evaluate(
            TaskRunner(Tower().double(), Undeclared(), NumberFormat.of("64-true", world.device)),
            [Turn(batches=shares(world, samples(20)))],
            world,
        )
    except TrainingError as error:
        assert error.everywhere
        assert "gave extra, which Undeclared.metrics does not declare" in str(error)
    else:
        raise AssertionError("not found")


CHECKS = [
    check_metrics_that_are_no_quotient,
    check_a_metric_of_batches_is_refused,
    check_rows_are_gathered,
    check_a_mistake_at_the_end_is_told_by_all,
]
