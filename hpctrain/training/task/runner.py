"""A task together with the model that it computes its losses and metrics by."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.wrappers import Call, call_directly
from hpctrain.training.task.task import Task


@dataclass(frozen=True, slots=True)
class TaskRunner:
    """What runs a task.

    Attributes:
        model: the bare model.
        task: computes loss and metrics.
        number_format: of parameters and arithmetic.
        call: runs a method of the task on the model, without gradients. Under FSDP, where
            parameters have to be gathered around it, collective: all ranks.
        graphs: whether the model's outputs lie where its next ones will, as under CUDA graphs.
    """

    model: nn.Module
    task: Task
    number_format: NumberFormat
    call: Call = field(default=None, kw_only=True)  # type: ignore[assignment]
    graphs: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        given: object = self.call
        if given is None:
            object.__setattr__(self, "call", call_directly(self.model))
