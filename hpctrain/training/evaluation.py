"""Metrics of a whole dataset: sums and counts over ranks, every sample exactly once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hpctrain.data.loader import EvaluationLoader
from hpctrain.launch.world import World
from hpctrain.training.precision import NumberFormat
from hpctrain.training.task import Task
from hpctrain.training.undisturbed import evaluating, kept_generators


def evaluate(
    model: nn.Module,
    task: Task,
    loader: EvaluationLoader,
    world: World,
    number_format: NumberFormat,
) -> dict[str, float]:
    """Return the metrics of a task over a dataset. Collective: all ranks.

    Runs the bare module: DDP's forward would broadcast buffers, and ranks have different numbers
    of batches. Leaves generators and train flags as they were.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    with kept_generators(), evaluating(model), torch.no_grad():
        for batch in loader:
            fields = number_format.cast(batch.fields)
            with number_format.arithmetic():
                parts = task.evaluate(model, fields)
            for name, (value, count) in parts.items():
                zero = value.new_zeros((), dtype=torch.float64)
                sums[name] = sums.get(name, zero) + value.double()
                counts[name] = counts.get(name, zero.long()) + count
    mine = {name: (sums[name].item(), int(counts[name].item())) for name in sums}
    everyone = world.communicator.all_gather(mine)
    return {
        name: _ratio([rank[name] for rank in everyone if name in rank]) for name in task.metrics
    }


def _ratio(parts: list[tuple[float, int]]) -> float:
    count = sum(part[1] for part in parts)
    # fsum is exact, so the order of the ranks does not matter.
    return math.fsum(part[0] for part in parts) / count if count else math.nan
