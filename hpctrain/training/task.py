"""What a step computes from a batch: the loss, and the metrics of an evaluation.

A task is any class with these methods; "package.module:Name" in the config brings in your own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpctrain.errors import ConfigError, TrainingError

Fields = Mapping[str, Tensor]
Direction = Literal["min", "max"]


class Task(Protocol):
    """The contract of a task.

    Attributes:
        metrics: every metric of an evaluation, and which direction is better.
        counts_samples: True if a sample always weighs 1; False if weights depend on the data
            (masked tokens, class weights), which costs one more reduction a step.
    """

    metrics: Mapping[str, Direction]
    counts_samples: bool

    def loss(self, model: nn.Module, fields: Fields) -> tuple[Tensor, Tensor | int]:
        """Return the sum of the losses of these samples, and the sum of their weights."""
        ...

    def evaluate(self, model: nn.Module, fields: Fields) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Return, by metric, a sum over these samples and what to divide the whole sum by."""
        ...


class Classification:
    """One class a sample: cross entropy and accuracy.

    Args:
        inputs: fields that the model receives, in the order of its arguments.
        target: field of class indices, (samples,) or (samples, ...) of any integer type.
        label_smoothing: 0 to 1.
        ignore_index: samples of this class count for nothing.
    """

    metrics: ClassVar[Mapping[str, Direction]] = {"loss": "min", "accuracy": "max"}

    def __init__(
        self,
        inputs: Sequence[str],
        target: str | None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
    ) -> None:
        self._inputs, self._target = tuple(inputs), _required(target, "classification")
        self._label_smoothing = label_smoothing
        self._ignore_index = ignore_index
        self.counts_samples = ignore_index is None

    def loss(self, model: nn.Module, fields: Fields) -> tuple[Tensor, Tensor | int]:
        """Return the summed cross entropy and the number of samples that count."""
        loss, _, labels = self._forward(model, fields)
        return loss, self._weight(labels)

    def evaluate(self, model: nn.Module, fields: Fields) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Return sums of cross entropy and of right answers."""
        loss, logits, labels = self._forward(model, fields)
        weight = self._weight(labels)
        # An ignored label is no class, so no answer equals it.
        return {"loss": (loss, weight), "accuracy": ((logits.argmax(1) == labels).sum(), weight)}

    def _forward(self, model: nn.Module, fields: Fields) -> tuple[Tensor, Tensor, Tensor]:
        logits = model(*(fields[name] for name in self._inputs))
        labels = fields[self._target].long()
        if logits.ndim < 2 or (logits.shape[0], *logits.shape[2:]) != tuple(labels.shape):
            raise TrainingError(
                f"classification needs logits (samples, classes, ...) for its target "
                f"{self._target!r} (samples, ...); the model gave {tuple(logits.shape)} for "
                f"{tuple(labels.shape)}"
            )
        loss = F.cross_entropy(
            logits,
            labels,
            reduction="sum",
            label_smoothing=self._label_smoothing,
            ignore_index=-100 if self._ignore_index is None else self._ignore_index,
        )
        return loss, logits, labels

    def _weight(self, labels: Tensor) -> Tensor | int:
        if self._ignore_index is None:
            return labels.numel()
        return (labels != self._ignore_index).sum()


class Regression:
    """Numbers: the mean over the elements of a sample of squared (or absolute) errors.

    Args:
        inputs: fields that the model receives, in the order of its arguments.
        target: field of the same shape as the model's output.
        loss: "mse" or "mae".
    """

    metrics: ClassVar[Mapping[str, Direction]] = {"loss": "min", "mae": "min"}
    counts_samples = True

    def __init__(self, inputs: Sequence[str], target: str | None, loss: str = "mse") -> None:
        self._inputs, self._target = tuple(inputs), _required(target, "regression")
        if loss not in ("mse", "mae"):
            raise ConfigError(f'task.loss = "{loss}": expected one of "mse", "mae"')
        self._squared = loss == "mse"

    def loss(self, model: nn.Module, fields: Fields) -> tuple[Tensor, Tensor | int]:
        """Return the summed error and the number of samples."""
        difference = self._difference(model, fields)
        errors = difference.square() if self._squared else difference.abs()
        return errors.flatten(1).mean(1).sum(), len(errors)

    def evaluate(self, model: nn.Module, fields: Fields) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Return sums of the loss and of absolute errors."""
        difference = self._difference(model, fields)
        errors = difference.square() if self._squared else difference.abs()
        count = len(errors)
        return {
            "loss": (errors.flatten(1).mean(1).sum(), count),
            "mae": (difference.abs().flatten(1).mean(1).sum(), count),
        }

    def _difference(self, model: nn.Module, fields: Fields) -> Tensor:
        output = model(*(fields[name] for name in self._inputs))
        target = fields[self._target]
        if target.ndim == 1 and output.ndim == 2 and output.shape[1] == 1:
            target = target[:, None]
        if output.shape != target.shape:
            raise TrainingError(
                f"regression needs an output of the shape of its target {self._target!r} "
                f"{tuple(target.shape)}; the model gave {tuple(output.shape)}"
            )
        difference: Tensor = output.to(torch.promote_types(output.dtype, torch.float32)) - target
        return difference if difference.ndim > 1 else difference[:, None]


def _required(target: str | None, task: str) -> str:
    if target is None:
        raise ConfigError(f"task.target: missing; {task} compares the model's output with a field")
    return target
