"""Optimizers and generators come back bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from hpctrain.checkpoint.optimizer_state import SLOTS, OptimizerState, SavedOptimizer
from hpctrain.checkpoint.state import restore_rng, rng_to_tensors
from hpctrain.errors import CheckpointError

CPU = torch.device("cpu")


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        loss = model(torch.randn(8, 4)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (AdamW, {"lr": 0.1, "fused": True}),
        (AdamW, {"lr": 0.1, "amsgrad": True}),
        (Adam, {"lr": 0.1, "foreach": True}),
        (SGD, {"lr": 0.1}),
        (SGD, {"lr": 0.1, "momentum": 0.9}),
        (RMSprop, {"lr": 0.1, "centered": True}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_optimizer_goes_on_to_the_bit(
    optimizer: type[Optimizer], arguments: dict[str, object], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        first = optimizer(model.parameters(), **arguments)
        train(model, first, 5)
        captured = OptimizerState(first).capture(model)
        tensors = {key: tensor.clone() for key, tensor in captured.tensors.items()}
        saved = SavedOptimizer(tensors, captured.values)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        generators = rng_to_tensors(CPU)
        train(model, first, 5)

        other = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        second = optimizer(other.parameters(), **arguments)
        other.load_state_dict(weights)
        OptimizerState(second).restore(other, saved)
        restore_rng(*generators, CPU)
        train(other, second, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_state_of_another_model_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = OptimizerState(SGD(model.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match=r"state of 'other\.weight'"):
        optimizer.restore(model, SavedOptimizer({f"{SLOTS}other.weight/x": torch.ones(1)}, None))


def test_generators_go_on_to_the_bit() -> None:
    def draw() -> tuple[object, ...]:
        numbers = np.random.standard_normal(3).tolist()  # noqa: NPY002
        return torch.rand(3).tolist(), numbers, random.random(), random.gauss(0, 1)

    draw()
    saved = rng_to_tensors(CPU)
    expected = [draw() for _ in range(3)]
    restore_rng(*saved, CPU)
    assert [draw() for _ in range(3)] == expected
