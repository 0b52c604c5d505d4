"""Metrics of an evaluation: what a task returns for each batch, reduced over batches and ranks.

A quotient of sums is only one kind of metric. The macro F1 of a dataset, its R2 or its AUROC cannot
be had from those of its batches: they come from counts, moments or predictions of all samples. So a
task hands over what can be added up or gathered, and the metric is computed once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpctrain.errors import TrainingError
from hpctrain.training.metric_objects import MetricObjects, State


class Gather:
    """Rows of one batch that a metric needs of all batches, such as predictions for an AUROC.

    Attributes:
        rows: (samples, ...) of any dtype; `finish` gets those of the whole dataset, in its order.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


@dataclass(slots=True)
class Part:
    """What the batches of one rank have added up to, on the host.

    Attributes:
        quotients: (sum, weight) by metric.
        sums: float64, int64 or complex128 by name, for `finish`.
        rows: gathered rows by name, for `finish`.
        states: of the task's torchmetrics objects, by their path in it.
        results: metrics that such an object computes, and its path.
    """

    quotients: dict[str, tuple[float, float]] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)


class _Sum:
    """Numbers added up where they are: those of the host there, those of a device on it.

    So that no batch waits for the device, neither to fetch a number nor to bring one.
    """

    __slots__ = ("_on_device", "_on_host")

    def __init__(self) -> None:
        self._on_host: float | int = 0
        self._on_device: Tensor | None = None

    def add(self, value: Any) -> None:
        """Add a number, or a tensor of one; exactly, if whole numbers, else in float64."""
        if not isinstance(value, Tensor):
            self._on_host += value.item() if hasattr(value, "item") else value
        elif value.device.type == "cpu":
            self._on_host += value.item()
        else:
            wide = value.detach().to(_wide(value.dtype))
            self._on_device = wide if self._on_device is None else self._on_device + wide

    def value(self) -> float | int:
        """Return the sum; waits for the device."""
        return self._on_host + (0 if self._on_device is None else self._on_device.item())


class Totals:
    """Adds up what a task returns for the batches of this rank; sums stay on the device."""

    def __init__(self, task: Any, objects: MetricObjects, *, reused: bool = False) -> None:
        """Begin.

        Args:
            task: whose metrics.
            objects: the torchmetrics objects that the task holds, reset.
            reused: whether the memory of what a model returns is that of its next outputs too, as
                under CUDA graphs: then what is kept is copied.
        """
        self._task = task
        self._objects = objects
        self._reused = reused
        self._quotients: dict[str, tuple[_Sum, _Sum]] = {}
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._results: dict[str, str] = {}

    def add(self, returned: object) -> None:
        """Take what `evaluate` returned for a batch.

        Raises:
            TrainingError: if it breaks the contract of a task.
        """
        if not isinstance(returned, Mapping):
            raise self._mistake(f"returned {type(returned).__name__}: expected a dict by metric")
        for name, value in returned.items():
            if isinstance(value, tuple):
                self._add_quotient(name, value)
            elif isinstance(value, Gather):
                rows = _checked_rows(value.rows, name, self)
                self._rows.setdefault(name, []).append(rows.clone() if self._reused else rows)
            elif isinstance(value, Tensor):
                self._add_sum(name, value)
            elif (path := self._objects.path_of(value)) is not None:
                self._results[name] = path
            else:
                raise self._mistake(_not_a_metric(name, value))
        if self._reused:
            self._objects.own_newest()

    def part(self) -> Part:
        """Return what has been added up; waits for the device."""
        return Part(
            quotients={
                name: (float(total.value()), weight.value())
                for name, (total, weight) in self._quotients.items()
            },
            sums={name: total.cpu() for name, total in self._sums.items()},
            rows={name: torch.cat(rows).cpu() for name, rows in self._rows.items()},
            states=self._objects.states(),
            results=dict(self._results),
        )

    def _add_quotient(self, name: str, value: tuple[Any, ...]) -> None:
        if len(value) != 2 or any(not _is_number(item) for item in value):
            raise self._mistake(
                f'returned for the metric "{name}" a tuple of {_described(value)}: expected '
                "(sum, weight), one number each"
            )
        sums = self._quotients.setdefault(name, (_Sum(), _Sum()))
        for each, item in zip(sums, value, strict=True):
            each.add(item.clone() if self._reused and isinstance(item, Tensor) else item)

    def _add_sum(self, name: str, value: Tensor) -> None:
        if not callable(getattr(self._task, "finish", None)):
            raise self._mistake(
                f'returned for "{name}" a tensor {tuple(value.shape)}: a metric that is a quotient '
                "is (sum, weight); sums from which another one is computed need a method "
                "finish(sums) of the task"
            )
        wide = value.detach().to(_wide(value.dtype), copy=self._reused)
        before = self._sums.get(name)
        if before is not None and before.shape != wide.shape:
            raise self._mistake(
                f'returned for "{name}" a tensor {tuple(wide.shape)}, and {tuple(before.shape)} for'
                " an earlier batch: sums keep their shape. For rows of samples use "
                "hpctrain.training.metrics.Gather"
            )
        self._sums[name] = wide if before is None else before + wide

    def _mistake(self, text: str) -> TrainingError:
        return TrainingError(f"{type(self._task).__name__}.evaluate {text}")


def combine(parts: Sequence[Part], task: Any, objects: MetricObjects) -> dict[str, float]:
    """Return the metrics of a task from the parts of all ranks, in the order it declares them.

    Args:
        parts: in the order of the samples.
        task: whose metrics; its `finish` computes those that are no quotient.
        objects: the torchmetrics objects that the task holds; they are left with the state of all
            parts.

    Raises:
        TrainingError: if the task gives other metrics than it declares, or none that is a number.
    """
    found: dict[str, float] = {
        name: quotient([part.quotients[name] for part in parts if name in part.quotients])
        for name in _names(part.quotients for part in parts)
    }
    objects.merge([part.states for part in parts])
    results = {name: path for part in parts for name, path in part.results.items()}
    for name, path in results.items():
        found |= _numbers(objects.compute(path), name, task)
    finish = getattr(task, "finish", None)
    if callable(finish):
        finished = finish(_finishable(parts))
        if not isinstance(finished, Mapping):
            raise TrainingError(
                f"{type(task).__name__}.finish returned {type(finished).__name__}: expected a dict "
                "of numbers by metric"
            )
        for name, value in finished.items():
            found |= _numbers(value, name, task)
    if getattr(task, "discovers_metrics", False):
        return found
    if found.keys() != task.metrics.keys():
        raise TrainingError(_other_metrics(found, task))
    return {name: found[name] for name in task.metrics}


def _finishable(parts: Sequence[Part]) -> dict[str, Tensor]:
    """Return what `finish` works on: sums over all parts, and all rows, on the host."""
    ready: dict[str, Tensor] = {}
    for name in _names(part.sums for part in parts):
        ready[name] = torch.stack([part.sums[name] for part in parts if name in part.sums]).sum(0)
    for name in _names(part.rows for part in parts):
        ready[name] = torch.cat([part.rows[name] for part in parts if name in part.rows])
    return ready


def _names(mappings: Any) -> list[str]:
    """Return all keys, each once; ranks without a batch have none."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def quotient(parts: Sequence[tuple[float, float]]) -> float:
    """Return the sum of all sums by that of all weights, not a number where they are 0."""
    # fsum is exact, so that neither number nor order of the ranks matters.
    weight = math.fsum(weight for _, weight in parts)
    return math.fsum(total for total, _ in parts) / weight if weight else math.nan


def _numbers(value: object, name: str, task: Any) -> dict[str, float]:
    """Return a computed metric as a number, or those of a dict under their own names."""
    if isinstance(value, Mapping):
        return {
            inner: number
            for key, item in value.items()
            for inner, number in _numbers(item, str(key), task).items()
        }
    if not _is_number(value):
        raise TrainingError(
            f'{type(task).__name__}: the metric "{name}" came out as {_described((value,))}, but '
            "one number is needed: average it, or give each of its numbers a name in finish(sums)"
        )
    return {name: float(value)}  # type: ignore[arg-type]


def _other_metrics(found: Mapping[str, float], task: Any) -> str:
    name = type(task).__name__
    undeclared = [each for each in found if each not in task.metrics]
    missing = [each for each in task.metrics if each not in found]
    texts = []
    if undeclared:
        texts.append(f"gave {', '.join(undeclared)}, which {name}.metrics does not declare")
    if missing:
        texts.append(f"gave no {', '.join(missing)}, which {name}.metrics declares")
    return f"{name}: an evaluation {' and '.join(texts)} (declared: {', '.join(task.metrics)})"


def _checked_rows(rows: object, name: str, totals: Totals) -> Tensor:
    if not isinstance(rows, Tensor) or rows.ndim == 0:
        raise totals._mistake(
            f'gathers for "{name}" {_described((rows,))}: expected a tensor (samples, ...)'
        )
    if not callable(getattr(totals._task, "finish", None)):
        raise totals._mistake(
            f'gathers "{name}": a method finish(sums) of the task has to compute metrics from it'
        )
    return rows.detach()


def _not_a_metric(name: str, value: object) -> str:
    kind = type(value)
    if all(callable(getattr(value, each, None)) for each in ("update", "compute", "reset")):
        return (
            f'returned for "{name}" a {kind.__module__.split(".")[0]} object {kind.__name__} that '
            "is not an attribute of the task, or none of torchmetrics: make it once, in __init__, "
            "or metrics would forget all batches but the last"
        )
    return (
        f'returned for "{name}" {_described((value,))}: expected (sum, weight); a tensor that is '
        "summed over all batches, or hpctrain.training.metrics.Gather(rows), for finish(sums); or "
        "a torchmetrics object of the task"
    )


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float)) or getattr(value, "shape", None) == ()


def _described(values: Sequence[object]) -> str:
    return " and ".join(
        f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, Tensor)
        else type(value).__name__
        for value in values
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers of another are added up without loss."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else torch.int64
