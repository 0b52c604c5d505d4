"""The check of the numbers: a step on real data, real rows of an evaluation; are they finite?"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpctrain.config import Config
from hpctrain.data.loading.batch import Samples, ShareOfBatch, named_tensors
from hpctrain.launch.process_group import World
from hpctrain.preflight.checks import Checks, failing_together
from hpctrain.preflight.report import Finding
from hpctrain.training.build import Parts, build_parts
from hpctrain.training.components import Components
from hpctrain.training.data.run_data import Data
from hpctrain.training.dry_run.evaluation import MOST_ROWS, rehearse
from hpctrain.training.metric_objects import MetricObjects
from hpctrain.training.metrics import Part, Totals
from hpctrain.training.model.undisturbed import evaluating, kept_generators
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.nonfinite import listed_rows
from hpctrain.training.task.misfits import explain_misfit, look_at_ranges
from hpctrain.training.task.task import Task
from hpctrain.utils.text import metric

STEP_FIX = "the same happens in training: start one process on a small config to see its traceback"


def check_numbers(checks: Checks, world: World, components: Components, opened: Data) -> None:
    """Take a step on real data, each rank by itself or all together. Collective: all ranks."""
    gc.collect()
    facts = checks.gather(
        "numbers",
        STEP_FIX,
        failing_together(
            "numbers",
            world.topology,
            lambda: try_real_data(checks.config, world, components, opened),
        ),
    )
    if facts is not None:
        checks.add(judge_numbers(facts, checks.hosts))


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFacts:
    """What real data have led to, on one rank.

    Attributes:
        samples: of the step; 0: this rank has none of the first batch.
        loss: their mean.
        grad_norm: norm of the gradient, at loss scale 1.
        trouble: what was not finite, with field, file and row; empty where all was.
    """

    samples: int
    loss: float
    grad_norm: float
    trouble: str


def try_real_data(
    config: Config, world: World, components: Components, opened: Data
) -> NumberFacts:
    """Take one step on this rank's share of the first batch, and evaluate some rows.

    Args:
        config: names the parts.
        world: of this rank alone; of all where the parameters are spread over them, and the step
            is that of the whole batch. Then collective: all ranks.
        components: as resolved.
        opened: the data.

    Raises:
        TrainingError: if the task breaks its contract, in training or in an evaluation.
    """
    validates = opened.validation_loader is not None
    parts = build_parts(
        config,
        world,
        components,
        opened.train_loader,
        opened.stop_at,
        semantics=opened.semantics,
        validation_batches=opened.validation_batches,
        brought=opened.brought,
    )
    try:
        look_at_ranges(parts.task, looks=True)
        share = next(iter(islice(opened.train_loader.epoch(0), 1)))
        # Evaluated before the step: with the weights that a run begins with.
        trouble = _trouble_of_evaluation(config, parts, opened, world) if validates else ""
        loss = norm = 0.0
        if share.size or world.topology.world_size > 1:
            loss, norm = _step(parts, share, config.optimizer.lr)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                trouble = _trouble_of_step(share, opened, loss)
    finally:
        opened.train_loader.close()
    return NumberFacts(samples=share.size, loss=loss, grad_norm=norm, trouble=trouble)


def _step(parts: Parts, share: Any, lr: float | None) -> tuple[float, float]:
    """Return loss and norm of the gradient of a step, at loss scale 1."""
    step = parts.step
    step.scaler.scale.fill_(1.0)
    step(share if step.sharded is not None else replace(share, global_size=share.size), lr)
    numbers = step.read()
    return numbers["loss"], numbers["grad_norm"]


def _trouble_of_step(share: ShareOfBatch, opened: Data, loss: float) -> str:
    loader = opened.train_loader
    rows = loader.rows(0, share.start, share.start + share.global_size)
    what = "the gradient" if math.isfinite(loss) else "the loss"
    fields = dict(named_tensors(share.fields))
    for name, values in fields.items():
        if (bad := _rows_that_are_not_finite(values)).any():
            return f'{what} of the first batch is not finite: "{name}" of ' + listed_rows(
                loader, rows[bad]
            )
    return (
        f"{what} of the first batch is not finite, though all its values are: "
        f"{', '.join(fields)} of {listed_rows(loader, rows)}"
    )


def _trouble_of_evaluation(config: Config, parts: Parts, opened: Data, world: World) -> str:
    """Rehearse an evaluation, and return which row led to a metric that is not finite."""
    first, *others = [each.loader.examples(MOST_ROWS) for each in opened.validations]
    rehearse(
        parts.step.runner,
        first,
        world,
        further=others,
        explain=lambda error, given: explain_misfit(error, given, config),
    )
    found = [
        _trouble_of_rows(parts, rows, opened, number, world)
        for number, rows in enumerate((first, *others))
    ]
    return next(filter(None, found), "")


def _trouble_of_rows(parts: Parts, rows: Samples, opened: Data, number: int, world: World) -> str:
    """Evaluate rows of one of the loaders singly, and return which metric was not finite."""
    validation = opened.validations[number]
    each = [rows.part(index, index + 1) for index in range(rows.size)]
    # All of them on every rank: the others may wait for this one's part of the parameters.
    with _evaluation_of_module(parts.task, number, len(opened.validations)):
        problems = [_not_finite(_evaluated(parts, one, world)) for one in each]
    parts.step.settle()
    read = validation.loader.example_rows(MOST_ROWS)
    for row, one, found in zip(read, each, problems, strict=True):
        if not found:
            continue
        [(shard, inside)] = validation.dataset.places(np.array([row]))
        held = dict(named_tensors(one))
        bad = [name for name, each in held.items() if _rows_that_are_not_finite(each).any()]
        whose = f'"{bad[0]}"' if bad else f"{', '.join(held)}, whose values are finite,"
        return f"the metric {found[0]} is not finite: {whose} of {shard.name} row {inside}"
    return ""


@contextmanager
def _evaluation_of_module(task: Task, number: int, loaders: int) -> Iterator[None]:
    """Have a module evaluate single samples of a loader in the body, with its hooks."""
    if not isinstance(task, ModuleTask):
        yield
        return
    with torch.no_grad():
        task.begin_evaluation(loaders=loaders)
        task.begin_loader(number)
        task.samples = 1
        try:
            yield
        finally:
            task.leave_evaluation()


def _evaluated(parts: Parts, rows: Mapping[str, Tensor], world: World) -> Part:
    objects = MetricObjects(parts.task, world.device)
    totals = Totals(parts.task, objects)
    with (
        torch.no_grad(),
        kept_generators(world.device),
        evaluating(parts.model.modules()),
        objects.untouched(),
        objects.local(),
        parts.number_format.arithmetic(),
    ):
        fields = parts.number_format.cast(rows, parts.task.inputs)
        totals.add(parts.step.runner.call(parts.task.evaluate, fields))
    return totals.part()


def _not_finite(part: Part) -> list[str]:
    """Return what is not finite of the sums that metrics come from."""
    return [
        *(name for name, pair in part.quotients.items() if not all(map(math.isfinite, pair))),
        *(name for name, total in part.sums.items() if not torch.isfinite(total).all()),
        *(name for name, rows in part.rows.items() if not torch.isfinite(rows).all()),
    ]


def _rows_that_are_not_finite(values: Tensor) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    bad = ~torch.isfinite(values.reshape(len(values), -1)).all(dim=1)
    return bad.cpu().numpy()


def judge_numbers(facts: Sequence[NumberFacts], hosts: Sequence[str]) -> Finding:
    """Tell what a step on real data and real rows of an evaluation have led to."""
    bad = [(rank, each.trouble) for rank, each in enumerate(facts) if each.trouble]
    values = {
        "loss": [each.loss for each in facts],
        "grad_norm": [each.grad_norm for each in facts],
        "ranks": [rank for rank, _ in bad],
    }
    if bad:
        rank, trouble = bad[0]
        more = f" (and {len(bad) - 1} more of {len(facts)})" if bad[1:] else ""
        return Finding(
            name="numbers",
            status="fail",
            fact=f"rank {rank} on {hosts[rank]}{more}: {trouble}",
            fix="mend the data or mask what is missing there; where the data are right, look for "
            "logarithms, divisions and the scale of initial weights and of data.normalize",
            values=values,
        )
    stepped = [each for each in facts if each.samples]
    samples = sum(each.samples for each in stepped)
    loss = sum(each.loss * each.samples for each in stepped) / max(1, samples)
    fact = f"the first batch has the loss {metric(loss)}; gradients and metrics are finite"
    return Finding(name="numbers", status="pass", fact=fact, values=values)
