"""A step of a small model on one process, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hpctrain.config.schema import TrainingSection
from hpctrain.data.loading.loader import Batch
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.preparation import cast_model
from hpctrain.training.optim.optimizer import build_optimizer
from hpctrain.training.step import StepOptions, TrainStep
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Classification

from .one_sample import OneSample
from .worlds import world_of_one

CPU = torch.device("cpu")
WORLD = world_of_one("test")


def fields(count: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {
        "x": torch.randn(count, 6, generator=generator, dtype=dtype),
        "y": torch.randint(3, (count,), generator=generator),
    }


def batch(count: int = 8, **kwargs: Any) -> Batch:
    return Batch(fields=fields(count, **kwargs), size=count, global_size=count, epoch=0, start=0)


def make_step(
    model: nn.Module,
    *,
    precision: Any = "32-true",
    task: Any = None,
    optimizer: Any = torch.optim.AdamW,
    arguments: dict[str, Any] | None = None,
    example: dict[str, Tensor] | None = None,
    largest_share: int = 8,
    smallest_share: int = 0,
    micro_batch_size: int | None = None,
    **training: Any,
) -> TrainStep:
    number_format = NumberFormat.of(precision, CPU)
    cast_model(model, number_format, None)
    number_format = number_format.for_model(model)
    example = example or fields(1)
    return TrainStep(
        TaskRunner(model, task or Classification(["x"], "y"), number_format),
        build_optimizer(optimizer, model, 0.02, arguments or {}),
        WORLD,
        options=StepOptions(
            training=TrainingSection(**training), micro_batch_size=micro_batch_size
        ),
        shapes=OneSample(example, largest_share, smallest_share),
        example=example,
    )
