"""What the checks of a step share: a small model, and the share of a rank."""

from __future__ import annotations

from typing import Any

import torch
from helpers.one_sample import OneSample
from torch import Tensor, nn

from hpctrain.config.schema import TrainingSection
from hpctrain.data.loading.loader import Batch
from hpctrain.launch.communicators import SingleCommunicator
from hpctrain.launch.process_group import World
from hpctrain.topology import Topology
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.preparation import cast_model
from hpctrain.training.optim.optimizer import build_optimizer
from hpctrain.training.step import StepOptions, TrainStep
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Classification

FEATURES, CLASSES = 12, 5


def alone() -> World:
    """Return a world of one process, beside the one that this process is in."""
    topology = Topology(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        node_rank=0,
        num_nodes=1,
        hosts=("here",),
        launcher="test",
    )
    device = torch.device("cpu")
    return World(topology=topology, communicator=SingleCommunicator(), device=device, backend=None)


class Net(nn.Module):
    """Several layers of different sizes: several buckets, if these are small."""

    def __init__(self, seed: int = 0, normalisation: str = "none") -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(FEATURES, 24)
        self.norm = nn.BatchNorm1d(24) if normalisation == "batch" else nn.Identity()
        self.second = nn.Linear(24, 16)
        self.third = nn.Linear(16, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.norm(self.first(features)).relu()
        output: Tensor = self.third(self.second(hidden).relu())
        return output


def samples(count: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randn(count, FEATURES, generator=generator),
        "label": torch.randint(CLASSES, (count,), generator=generator),
    }


def batch_of(world: World, fields: dict[str, Tensor], *, by_lanes: int = 7) -> Batch:
    """Return this rank's share of a global batch, unequal as lanes deal it."""
    rank, world_size = world.topology.rank, world.topology.world_size
    lanes = range(rank * by_lanes // world_size, (rank + 1) * by_lanes // world_size)
    count = len(fields["label"])
    rows = torch.tensor([row for row in range(count) if row % by_lanes in lanes], dtype=torch.int64)
    return Batch(
        fields={name: tensor[rows] for name, tensor in fields.items()},
        size=len(rows),
        global_size=count,
        epoch=0,
        start=0,
    )


def step_of(
    world: World,
    model: nn.Module,
    *,
    precision: Any = "64-true",
    optimizer: Any = torch.optim.SGD,
    lr: float = 0.1,
    arguments: dict[str, Any] | None = None,
    task: Any = None,
    clip_norm: float | None = None,
    micro_batch_size: int | None = None,
    largest_share: int = 32,
    bucket_mb: float | None = None,
    compress_gradients: str = "none",
    static_graph: bool = False,
    prime: bool = True,
) -> TrainStep:
    number_format = NumberFormat.of(precision, world.device)
    cast_model(model, number_format, None)
    number_format = number_format.for_model(model)
    step = TrainStep(
        TaskRunner(
            model,
            task if task is not None else Classification(["features"], "label"),
            number_format,
        ),
        build_optimizer(optimizer, model, lr, arguments or {}),
        world,
        options=StepOptions(
            training=TrainingSection(
                clip_norm=clip_norm,
                bucket_mb=bucket_mb,
                compress_gradients=compress_gradients,
                static_graph=static_graph,
            ),
            micro_batch_size=micro_batch_size,
        ),
        shapes=OneSample(samples(1, seed=99 + world.topology.rank), largest_share),
        example=samples(1, seed=99 + world.topology.rank),
    )
    if prime:
        step.dry_run()
    return step
