"""Logged values: how a name is reduced, its total over an epoch, its forked names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hpctrain.errors import TrainingError
from hpctrain.training.metrics import Gather
from hpctrain.training.task.task import Direction

Reduction = Literal["mean", "sum", "min", "max"]


@dataclass(frozen=True, slots=True)
class Entry:
    """How a name is logged; that of its first call counts.

    Attributes:
        on_step: reduced at log steps.
        on_epoch: reduced at the end of the epoch.
        reduction: over passes and ranks, and over the steps of an epoch.
        shown: on the line of progress.
        written: to the metrics; False: for monitors only.
        on_rank_zero: only rank 0 logs it.
        is_metric: a torchmetrics object, which adds up by itself.
    """

    on_step: bool
    on_epoch: bool
    reduction: Reduction
    shown: bool
    written: bool
    on_rank_zero: bool
    is_metric: bool

    def packed(self) -> tuple[bool, bool, Reduction, bool, bool, bool, bool]:
        """Return its fields in their order, as ranks send them to each other."""
        return (
            *(self.on_step, self.on_epoch, self.reduction, self.shown, self.written),
            *(self.on_rank_zero, self.is_metric),
        )

    def step_name(self, name: str) -> str:
        return forked(name, "_step") if self.on_epoch else name

    def epoch_names(self, name: str) -> list[str]:
        """Return its names at an epoch's end; a monitor may leave out the ending."""
        return [name, forked(name, "_epoch")] if self.on_step else [name]

    def full_names(self, name: str) -> list[str]:
        """Return its names where each value has one: with an ending where it has two values."""
        if self.on_step and self.on_epoch:
            return [forked(name, "_step"), forked(name, "_epoch")]
        return [name]


OF_LOADER = "/dataloader_idx_"
"""Ends the names of what is logged for one of several loaders, with its number."""


def forked(name: str, ending: str) -> str:
    """Return a name with an ending, before that which names the loader, as Lightning has it."""
    base, mark, number = name.partition(OF_LOADER)
    return f"{base}{ending}{mark}{number}"


def unforked(name: str, ending: str) -> str | None:
    """Return the name that was forked by an ending; None: this one has no such ending."""
    base, mark, number = name.partition(OF_LOADER)
    return f"{base.removesuffix(ending)}{mark}{number}" if base.endswith(ending) else None


class Total:
    """One value added up over an epoch, on this rank; numbers stay on the device."""

    __slots__ = ("on_device", "on_host", "reduction", "weight")

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction
        self.on_host = {"min": math.inf, "max": -math.inf}.get(reduction, 0.0)
        self.on_device: Tensor | None = None
        self.weight = 0.0

    def add(self, value: Tensor | float, weight: float) -> None:
        """Add a value that stands for so many samples."""
        factor = weight if self.reduction == "mean" else 1.0
        self.weight += factor if self.reduction == "mean" else bool(weight)
        if not weight:
            return
        if not isinstance(value, Tensor):
            self.on_host = joined(self.reduction, self.on_host, float(value) * factor)
        elif self.on_device is None:
            self.on_device = value.double() * factor
        elif self.reduction in ("mean", "sum"):
            self.on_device.add_(value, alpha=factor)
        else:
            pick = torch.minimum if self.reduction == "min" else torch.maximum
            self.on_device = pick(self.on_device, value.double())

    def value(self) -> tuple[float, float]:
        """Return the total and its weight; waits for the device."""
        if self.on_device is None:
            return self.on_host, self.weight
        return joined(self.reduction, self.on_host, self.on_device.item()), self.weight


def reduction_of(name: str, reduce_fx: Any) -> Reduction:
    """Return a known reduction by its name or torch's function."""
    known: dict[Any, Reduction] = {
        "mean": "mean",
        "sum": "sum",
        "min": "min",
        "max": "max",
        "avg": "mean",
        torch.mean: "mean",
        torch.sum: "sum",
        torch.min: "min",
        torch.max: "max",
        min: "min",
        max: "max",
        sum: "sum",
    }
    found = known.get(reduce_fx) if isinstance(reduce_fx, str) or callable(reduce_fx) else None
    if found is None:
        raise TrainingError(
            f'self.log("{name}", reduce_fx={reduce_fx!r}): known are "mean", "sum", "min" and '
            '"max", which come out the same over any number of ranks: for another, log a '
            "torchmetrics object"
        )
    return found


def loggable(name: str, value: Any) -> Tensor | float:
    """Return a number, or a detached tensor, ()."""
    if isinstance(value, Tensor):
        if not value.ndim and value.is_floating_point():  # most are
            return value.detach()
        if value.numel() != 1 or value.is_complex():
            raise TrainingError(
                f'self.log("{name}"): a tensor {tuple(value.shape)} of {value.dtype}: one number '
                "can be logged; take its mean()"
            )
        return value.detach().reshape(())
    if isinstance(value, bool | int | float) or getattr(value, "shape", None) == ():
        return float(value)
    raise TrainingError(
        f'self.log("{name}"): {type(value).__name__} cannot be logged: give a number, a tensor of '
        "one, or a torchmetrics object; several at once by self.log_dict"
    )


def joined(reduction: Reduction, one: float, other: float) -> float:
    """Return two totals as one."""
    if reduction == "min":
        return min(one, other)
    return max(one, other) if reduction == "max" else one + other


def reduced(reduction: Reduction, pairs: list[tuple[float, float]]) -> float:
    """Return one value of all ranks' totals and weights."""
    there = [value for value, weight in pairs if weight]
    if reduction == "min":
        return min(there)
    if reduction == "max":
        return max(there)
    total = math.fsum(there)
    return total / math.fsum(weight for _, weight in pairs) if reduction == "mean" else total


_MARK = "\n"
"""Separates a reduction from a name that is summed or gathered: no name has it."""


def for_task(
    name: str, reduction: Reduction, values: Sequence[tuple[Tensor | float, float]]
) -> dict[str, Any]:
    """Return what was logged of a batch as `Task.evaluate` returns it; `finish_sums` has the rest.

    Args:
        name: that it was logged under.
        reduction: of that name.
        values: with their weights; those without weight do not count.
    """
    pairs = [(torch.as_tensor(v, dtype=torch.float64), w) for v, w in values if w]
    if not pairs:
        return {}
    if reduction == "mean":
        total = pairs[0][0] * pairs[0][1]
        for value, weight in pairs[1:]:
            total = total + value * weight
        return {name: (total, sum(weight for _, weight in pairs))}
    stacked = torch.stack([value for value, _ in pairs])
    if reduction == "sum":
        return {f"sum{_MARK}{name}": stacked.sum(0)}
    return {f"{reduction}{_MARK}{name}": Gather(stacked)}


def finish_sums(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Return sums, and smallest and largest values, of a whole evaluation."""
    found = {}
    for key, tensor in sums.items():
        reduction, _, name = key.partition(_MARK)
        picks: dict[str, Callable[[Tensor], Tensor]]
        picks = {"sum": torch.sum, "min": torch.min, "max": torch.max}
        found[name] = float(picks[reduction](tensor))
    return found


_SMALLER_IS_BETTER = ("loss", "err", "mse", "mae", "rmse", "nll", "perplexity", "ppl", "bits")
_LARGER_IS_BETTER = ("acc", "f1", "auc", "auroc", "precision", "recall", "iou", "dice", "r2", "map")


def direction_of(name: str) -> Direction | None:
    """Return which direction of a metric is better, as its name says; None: it does not."""
    words = name.lower().replace("/", "_").replace("-", "_")
    if any(word in words for word in _SMALLER_IS_BETTER):
        return "min"
    return "max" if any(word in words for word in _LARGER_IS_BETTER) else None
