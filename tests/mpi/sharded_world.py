"""What the checks of spread parameters share: a model of blocks, and a step on it."""

from __future__ import annotations

from typing import Any

import torch
from helpers.one_sample import OneSample
from step_world import CLASSES, FEATURES, samples
from torch import Tensor, nn

from hpctrain.config.schema import TrainingSection
from hpctrain.launch.process_group import World
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.preparation import cast_model, checkpoint_activations
from hpctrain.training.optim.optimizer import build_optimizer
from hpctrain.training.parallel.fsdp import ShardedModel
from hpctrain.training.step import StepOptions, TrainStep
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Classification

SECTION = TrainingSection(max_steps=1, strategy="fsdp")
WIDTH = 14


class Block(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm == "layer" else nn.BatchNorm1d(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = hidden + self.linear(self.norm(hidden)).relu()
        return output


class Tower(nn.Module):
    """Rows that do not divide evenly, fewer than there are ranks, or none; a frozen tensor."""

    def __init__(self, norm: str = "layer", *, number: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(3))
        self.scale = nn.Parameter(torch.full((1,), 1.5))
        self.temperature = nn.Parameter(torch.tensor(0.7)) if number else 1.0
        self.frozen = nn.Parameter(torch.ones(3, WIDTH), requires_grad=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.first(features * self.temperature) * self.scale + self.frozen.mean(dim=0)
        for block in self.blocks:
            hidden = block(hidden)
        output: Tensor = self.head(hidden)
        return output


def build(
    world: World,
    model: nn.Module,
    *,
    sharded: bool,
    precision: Any = "64-true",
    section: TrainingSection = SECTION,
    optimizer: Any = torch.optim.AdamW,
    arguments: dict[str, Any] | None = None,
    task: Any = None,
    micro_batch_size: int | None = None,
    prime: bool = True,
    **training: Any,
) -> TrainStep:
    number_format = NumberFormat.of(precision, world.device)
    cast_model(model, number_format, None)
    number_format = number_format.for_model(model)
    checkpoint_activations(model, section.activation_checkpointing)
    spread = None
    if sharded and world.topology.world_size > 1:
        spread = ShardedModel(model, section, number_format, world)
    step = TrainStep(
        TaskRunner(
            model,
            task if task is not None else Classification(["features"], "label"),
            number_format,
        ),
        build_optimizer(optimizer, spread or model, 0.01, arguments or {}),
        world,
        options=StepOptions(
            training=TrainingSection(clip_norm=0.5, **training), micro_batch_size=micro_batch_size
        ),
        shapes=OneSample(samples(1, seed=99), -(-35 // world.topology.world_size)),
        example=samples(1, seed=99),
        sharded=spread,
    )
    if prime:
        step.dry_run()
    return step


def full(world: World, step: TrainStep) -> dict[str, Tensor]:
    """Return all parameters and buffers, whole, on every rank."""
    parts = world.communicator.all_gather(
        {name: item.detach().clone() for name, item in step.held.named_parameters()}
    )
    tensors = {
        name: torch.cat([part[name] for part in parts])
        if step.sharded and name in step.sharded.shapes
        else item
        for name, item in parts[0].items()
    }
    return tensors | {name: item.clone() for name, item in step.model.named_buffers()}
