"""The task: what a step computes from a batch, its loss, and the metrics of an evaluation.

A task is any class with the attributes and methods of `Task`; "package.module:Name" in the config
brings in your own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpctrain.checkpoint.export import TASK
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.training.task.misfits import check_range
from hpctrain.utils.text import listed

Fields = Mapping[str, Tensor]
Direction = Literal["min", "max"]

# torch ignores the class -100 unless given another: given this one, every class counts.
_NO_CLASS = -(2**63)


class Task(Protocol):
    """The contract of a task.

    Attributes:
        inputs: the fields that the model receives.
        metrics: every metric of an evaluation, and which direction is better.
        counts_samples: True if every sample weighs 1; False if weights depend on the data (masked
            tokens, class weights), which costs one more reduction a step.

    A task whose loss of a sample depends on the others in its pass, as a contrastive one does, says
    so by a further attribute, `batch_dependent_loss = True`: else the header warns of it. One with
    classes may have `checks_ranges` and `index_ranges`, see `hpctrain.training.task.misfits`.

    One that wants to know where the run stands has a method `set_progress(step, epoch, stage)`,
    called before the first step and after each with the steps that are done and "train", and before
    an evaluation with its name, such as "validation". One that logs numbers of its own has a method
    `set_log(log)`, called once: `log(name, value)`, `log.image(name, image)` and
    `log.histogram(name, values)`, see `hpctrain.training.modules.task_log`. Parameters of a task
    that is a module are trained and saved with the model's.
    """

    inputs: Sequence[str]
    metrics: Mapping[str, Direction]
    counts_samples: bool

    def loss(self, model: nn.Module, fields: Fields) -> tuple[Tensor, Tensor | int]:
        """Return the sum of the losses of these samples, and the sum of their weights.

        Args:
            model: to call; in training it reduces gradients over ranks.
            fields: by name, (samples, ...) on the device; at least one sample.

        Returns:
            A number, () float, that the parameters have a part in; and the weight: the number of
            samples if `counts_samples`, else a number, (), of any dtype.
        """
        ...

    def evaluate(self, model: nn.Module, fields: Fields) -> Mapping[str, Any]:
        """Return what the metrics of a dataset are made of, for these samples.

        By name either of:

        - `(sum, weight)`, numbers: the metric is the quotient of both, summed over all batches of
          all ranks;
        - a tensor of any shape that is the same for every batch: `finish` gets the sum;
        - `hpctrain.training.metrics.Gather(rows)`: `finish` gets the rows of the whole dataset;
        - a torchmetrics object that is an attribute of the task, and was updated here.

        A task with tensors or rows has a method `finish(sums)`, which is given these by name, on
        the host, and returns further metrics as numbers. All of `metrics` have to come out, and no
        others; an object that computes a dict gives those names.
        """
        ...


class Supervised(ABC):
    """A task that compares the one output of a model with one field."""

    name: ClassVar[str]

    def __init__(self, inputs: Sequence[str], target: str | None, mask: str | None = None) -> None:
        if target is None:
            raise ConfigError(
                f"task.target: missing; {self.name} compares the model's output with a field"
            )
        self.inputs = tuple(inputs)
        self.target = target
        self.mask = mask

    def _compare(self, model: nn.Module, fields: Fields) -> tuple[Tensor, Tensor]:
        """Return what the model makes of its inputs, and the target, fit to be compared."""
        output = model(*[fields[name] for name in self.inputs])
        if not isinstance(output, Tensor) or not output.is_floating_point():
            what = (
                f"a tensor of {output.dtype}"
                if isinstance(output, Tensor)
                else f"{type(output).__name__}"
            )
            raise TrainingError(
                f"the model returned {what}; {self.name} needs one tensor of floating-point "
                "numbers. For other outputs write a task of your own and name it in task.use"
            )
        if output.dtype in (torch.bfloat16, torch.float16):
            output = output.float()  # a sum of many losses needs more than 8 or 11 bits
        return self._fitted(output, fields[self.target])

    @abstractmethod
    def _fitted(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Check the shapes of output and target against each other, and return both."""

    def _misfit(self, output: Tensor, target: Tensor, expected: str, fix: str) -> TrainingError:
        return TrainingError(
            f"{self.name} needs {expected}; the model gave {tuple(output.shape)}, and the target "
            f'"{self.target}" is {tuple(target.shape)} {_name(target.dtype)}: {fix}'
        )


class Classification(Supervised):
    """One class a sample, or one a pixel or token of it: cross entropy and accuracy.

    The loss is the weighted mean over everything that has a class.
    """

    name = "classification"
    metrics: ClassVar[Mapping[str, Direction]] = {"loss": "min", "accuracy": "max"}

    def __init__(
        self,
        inputs: Sequence[str],
        target: str | None,
        *,
        mask: str | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        """Check the arguments.

        Args:
            inputs: fields that the model receives, in the order of its arguments.
            target: field of class indices, (samples, ...) of any integer type. The model gives
                (samples, classes, ...).
            mask: field of weights of what has a class, 0 where that is missing; none: all 1.
            ignore_index: what has this class counts for nothing.
            label_smoothing: 0 to 1; so much of the probability is spread over all classes.
            class_weights: how much a sample of each class counts; none: all the same.

        Raises:
            ConfigError: if an argument makes no sense.
        """
        super().__init__(inputs, target, mask)
        if not 0 <= label_smoothing <= 1:
            raise ConfigError(f"task.label_smoothing = {label_smoothing}: expected 0 to 1")
        if class_weights is not None and (not class_weights or min(class_weights) < 0):
            raise ConfigError(
                f"task.class_weights = {list(class_weights)}: expected for each class a number "
                "from 0"
            )
        self._label_smoothing = label_smoothing
        self._ignore_index = ignore_index
        self._ignored = _NO_CLASS if ignore_index is None else ignore_index
        self._class_weights = None if class_weights is None else torch.tensor(class_weights)
        self.counts_samples = ignore_index is None and class_weights is None and mask is None
        self.checks_ranges = False
        self._classes = 0

    @property
    def index_ranges(self) -> dict[str, tuple[int, int | None]]:
        """How many classes there are, once that is known, and the one that is none."""
        # Under a mask, what is missing may be any number.
        is_known = self._classes and self.mask is None
        return {self.target: (self._classes, self._ignore_index)} if is_known else {}

    def loss(self, model: nn.Module, fields: Fields) -> tuple[Tensor, Tensor | int]:
        """Return the summed cross entropy and the summed weight."""
        logits, labels = self._compare(model, fields)
        if self.mask is not None:
            mask = mask_of(fields, self.mask, labels)
            labels = self._unmasked(labels, mask)
            losses = self._cross_entropy(logits, labels, "none")
            return masked_sum(losses, mask), self._weights(labels, mask).sum()
        loss_sum = self._cross_entropy(logits, labels, "sum")
        if not self.counts_samples:
            return loss_sum, self._weight(logits, labels)
        samples = labels.shape[0]
        if labels.ndim > 1:
            loss_sum = loss_sum * (samples / labels.numel())
        return loss_sum, samples

    def evaluate(self, model: nn.Module, fields: Fields) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Return sums of cross entropy and of right answers."""
        logits, labels = self._compare(model, fields)
        if self.mask is not None:
            mask = mask_of(fields, self.mask, labels)
            labels = self._unmasked(labels, mask)
            losses = self._cross_entropy(logits, labels, "none").double()
            counts = (mask * (labels != self._ignored)).double()
            return {
                "loss": (masked_sum(losses, mask), self._weights(labels, mask).double().sum()),
                "accuracy": (masked_sum(counts, logits.argmax(1) == labels), counts.sum()),
            }
        losses = self._cross_entropy(logits, labels, "none")
        right = logits.argmax(1) == labels
        counted: Tensor | int = labels.numel()
        if self._ignore_index is not None:
            valid = labels != self._ignore_index
            right, counted = right & valid, valid.sum()
        # The losses in float64 before they are summed: so that their sum does not depend on how
        # the dataset is cut into batches.
        weight = labels.numel() if self.counts_samples else self._weight(logits, labels)
        return {"loss": (losses.double().sum(), weight), "accuracy": (right.sum(), counted)}

    def _fitted(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        samples, rest = output.shape[:1], output.shape[2:]
        if target.shape == (*samples, 1, *rest) and self.mask is None and output.ndim > 1:
            target = target.squeeze(1)  # an axis of channels, as images have one
        if output.ndim < 2 or target.shape != (*samples, *rest):
            raise self._misfit(
                output,
                target,
                "logits (samples, classes, ...) for classes (samples, ...)",
                "name another field by task.target, change what the model returns by [model], or "
                "move axes by data.transform",
            )
        if target.dtype != torch.int64:
            if target.is_floating_point() or target.dtype == torch.bool:
                raise self._misfit(
                    output,
                    target,
                    "classes as integers",
                    'take task.use = "regression" for numbers, or cast them by data.transform',
                )
            target = target.long()
        weights = self._class_weights
        if weights is not None:
            if len(weights) != output.shape[1]:
                raise TrainingError(
                    f"task.class_weights has {len(weights)} numbers, but the model gives "
                    f"{output.shape[1]} classes"
                )
            if weights.device != output.device or weights.dtype != output.dtype:
                self._class_weights = weights.to(output.device, output.dtype)
        return output, target

    def _cross_entropy(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        self._classes = logits.shape[1]
        if self.checks_ranges:
            check_range(self.target, labels, self._classes, self._ignored)
        try:
            return F.cross_entropy(
                logits,
                labels,
                weight=self._class_weights,
                ignore_index=self._ignored,
                label_smoothing=self._label_smoothing,
                reduction=reduction,
            )
        except IndexError as error:  # on the CPU; a GPU ends with a device-side assertion
            check_range(self.target, labels, self._classes, self._ignored)
            raise TrainingError(f"{self.target}: {error}") from error

    def _unmasked(self, labels: Tensor, mask: Tensor) -> Tensor:
        """Return classes, those that are missing ignored: they may be none that there is."""
        return labels.where(mask != 0, self._ignored)

    def _weights(self, labels: Tensor, mask: Tensor) -> Tensor:
        """Return how much each class of `_unmasked` counts."""
        valid = labels != self._ignored
        weights = mask * valid
        if self._class_weights is not None:
            weights = weights * self._class_weights[labels.where(valid, 0)]
        return weights

    def _weight(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weight of what has a class, (): int64, or the dtype of the logits."""
        valid = None if self._ignore_index is None else labels != self._ignore_index
        if self._class_weights is None:
            assert valid is not None
            return valid.sum()
        if valid is None:
            return self._class_weights[labels].sum()
        # An ignored class may be none that has a weight.
        return (self._class_weights[labels.where(valid, 0)] * valid).sum()


def learns_progress(task: object) -> Callable[[int, int, str], None] | None:
    """Return what reports step, epoch and stage to a task; None: it does not want to know."""
    method = getattr(task, "set_progress", None)
    return method if callable(method) else None


def adopt_task(model: nn.Module, task: object, device: torch.device) -> None:
    """Have a model hold a task that has parameters, so that they are trained and saved with it.

    A task whose parameters are frozen, such as a network that judges outputs, is only moved.

    Args:
        model: that the task trains; the task becomes a child of it, `hpctrain_task`.
        task: any.
        device: where it is to be.

    Raises:
        ConfigError: if the model would take the task for one of its layers.
    """
    if not isinstance(task, nn.Module):
        return
    names = [name for name, item in task.named_parameters() if item.requires_grad]
    if not names:
        task.to(device)
        return
    if isinstance(model, nn.Sequential):
        raise ConfigError(
            f"task.use: {type(task).__name__} has the parameters {listed(names, 4)}, which are "
            f"trained as part of the model, but {type(model).__name__} calls all that it holds as "
            "layers: have a module of your own hold it, and call it in its forward"
        )
    model.add_module(TASK.removesuffix("."), task)


def check_task(task: Any) -> None:
    """Check that an object has what a task needs.

    Raises:
        ConfigError: naming what it lacks.
    """
    missing = [name for name in _CONTRACT if not hasattr(task, name)]
    if missing:
        raise ConfigError(
            f"task.use: {type(task).__name__} is not a Task: it lacks {', '.join(missing)}. "
            "See hpctrain.Task"
        )


_CONTRACT = ("inputs", "metrics", "counts_samples", "loss", "evaluate")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def mask_of(fields: Mapping[str, Tensor], name: str, target: Tensor) -> Tensor:
    """Return the weight of every element of a target, of its shape.

    Raises:
        TrainingError: if there is no such field, or it cannot be spread over the target.
    """
    mask = fields.get(name)
    if mask is None:
        raise TrainingError(
            f'task.mask = "{name}": there is no such field; there are {", ".join(fields)}. '
            'Name one by data.fields.NAME.mask = "..."'
        )
    if mask.numel() == target.numel():
        return mask.reshape(target.shape)
    try:
        return mask.expand_as(target)
    except RuntimeError as error:
        raise TrainingError(
            f'task.mask = "{name}" is {tuple(mask.shape)}, and the target {tuple(target.shape)}: '
            "it needs a weight for each element of the target"
        ) from error


def weight_of(fields: Mapping[str, Tensor], name: str, target: Tensor) -> Tensor:
    """Return how much the elements of a target count, fit to be multiplied with them.

    Raises:
        TrainingError: if there is no such field, or it is of another grid than the target.
    """
    weight = fields.get(name)
    if weight is None:
        raise TrainingError(
            f'task.weight = "{name}": there is no such field; there are {", ".join(fields)}. '
            'Name one by data.fields.NAME.weight = "cos_latitude"'
        )
    if weight.ndim == target.ndim + 1 and weight.shape[-1] == 1:
        weight = weight.squeeze(-1)
    sizes = zip(weight.shape, target.shape, strict=False)
    if weight.ndim != target.ndim or any(size not in (1, other) for size, other in sizes):
        raise TrainingError(
            f'"{name}" is {tuple(weight.shape)}, and the target {tuple(target.shape)}: weights of '
            "latitudes are for the grid of the files. Where data.transform moves or cuts axes of "
            "the target, have it do the same to its weight"
        )
    return weight


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of values by their weights, ()."""
    return (values * mask.to(values.dtype)).sum()


def without_missing(target: Tensor, mask: Tensor) -> Tensor:
    """Return a target without what is missing in it: even a weight of 0 times NaN is NaN."""
    return target.where(mask != 0, 0)
