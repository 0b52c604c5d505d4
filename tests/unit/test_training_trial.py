"""Which modules can be gathered as one, found by a trial of the model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training_step import WORLD
from torch import Tensor, nn

from hpctrain.errors import ConfigError
from hpctrain.models.resnet import resnet18
from hpctrain.models.transformer import Transformer
from hpctrain.training.language_modeling import LanguageModeling
from hpctrain.training.regression import Regression
from hpctrain.training.step.sharding import find_units
from hpctrain.training.step.trial import find_unfit
from hpctrain.training.task import Classification

WIDTH = 6
ROW = {
    "x": torch.randn(1, WIDTH),
    "image": torch.randn(1, 3, 8, 8),
    "t": torch.randint(11, (1, 5)),
    "y": torch.zeros(1, dtype=torch.int64),
    "z": torch.randn(1, WIDTH),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class Stack(nn.Module):
    """A list of blocks, and a way to go through them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Dropping(Stack):
    """LayerDrop, as fairseq has it."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if not self.training or random.random() > 0.2:
                x = block(x)
        return x


class DroppingByTensors(Stack):
    """LayerDrop, as transformers has it: what torch draws decides."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if not self.training or torch.rand([]) > 0.3:
                x = block(x)
        return x


class Experts(Stack):
    """Those to which no sample is sent do not run."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        chosen = x[:, :4].argmax(1)
        for index, block in enumerate(self.blocks):
            (rows,) = torch.where(chosen == index)
            if rows.numel():
                out = out.index_add(0, rows, block(x[rows]))
        return out


class Reading(Stack):
    """Reads a weight of its first block besides calling it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.blocks[0].linear.weight


class Named(nn.Module):
    """Two encoders, called by a method of theirs, with layers in them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Encoder(), Encoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.left.encode(x) * self.right.encode(x)


class Encoder(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def encode(self, x: Tensor) -> Tensor:
        return F.linear(super().forward(x), self.out)


class Describing(Stack):
    """Asks its parameters where and what they are, which reads none of their numbers."""

    def forward(self, x: Tensor) -> Tensor:
        parameter = next(self.parameters())
        assert parameter.requires_grad
        assert parameter.dim() == len(parameter.shape) == 2
        return super().forward(x.to(parameter.device, parameter.dtype))


ALL = [f"blocks.{index}" for index in range(4)]
LAYERS = [f"{side}.blocks.{index}" for side in ("left", "right") for index in range(4)]
TASK = Regression(["x"], "z")


def units(model: nn.Module, task: Any, *patterns: str) -> list[str]:
    before = {name: item.clone() for name, item in model.state_dict().items()}
    generator = torch.get_rng_state()
    unfit = find_unfit(WORLD, model, task, ROW)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(before[name], item) for name, item in model.state_dict().items())
    return find_units(model, patterns, unfit)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Stack(), ALL),
        (Describing(), ALL),
        (Dropping(), []),
        (DroppingByTensors(), []),
        (Experts(), []),
        (Reading(), ["blocks.1", "blocks.2", "blocks.3"]),
        (Named(), LAYERS),
        (nn.Sequential(nn.Linear(WIDTH, WIDTH), Stack()), [f"1.{name}" for name in ALL]),
        (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True), 2),
            ["layers.0", "layers.1"],
        ),
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, nn.Module) else None,
)
def test_units_are_what_every_pass_calls(model: nn.Module, expected: list[str]) -> None:
    random.seed(0)
    torch.manual_seed(0)
    assert units(model, TASK) == expected


def test_the_models_of_the_house() -> None:
    transformer = Transformer(vocabulary=11, context=5, width=8, depth=3, heads=2)
    assert len(units(transformer, LanguageModeling(["t"], None))) == 3
    assert len(units(resnet18(num_classes=3), Classification(["image"], "y"))) == 8


@pytest.mark.parametrize(
    ("model", "pattern", "text"),
    [
        (Experts(), "Block", r"blocks\.\d cannot .*: it is not called in every pass"),
        (Reading(), "blocks.0", r"blocks\.0 .* its parameter blocks\.0\.linear\.weight read out"),
        (Named(), "left", r"left cannot be gathered as one: it .* or in another method"),
    ],
)
def test_units_that_are_named_are_refused(model: nn.Module, pattern: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        units(model, TASK, pattern)


def test_a_model_that_cannot_be_tried_is_taken_as_it_is() -> None:
    class Broken(Stack):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("not on this device")

    assert units(Broken(), TASK) == ALL
