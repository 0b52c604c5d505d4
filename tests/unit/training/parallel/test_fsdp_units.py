"""Which modules can be gathered as one, found by a trial of the model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.steps import WORLD
from torch import Tensor, nn

from hpctrain.errors import ConfigError
from hpctrain.models.resnet import resnet18
from hpctrain.models.transformer import Transformer
from hpctrain.training.parallel.fsdp_units import find_units, try_out
from hpctrain.training.task.language_modeling import LanguageModeling
from hpctrain.training.task.regression import Regression
from hpctrain.training.task.task import Classification

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
    unfit = try_out(WORLD, model, task, ROW).unfit
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


class Follower(nn.Module):
    """A teacher that follows in one of the ways that people write."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.teacher.requires_grad_(False)
        self.how = how

    @torch.no_grad()
    def follow(self) -> None:
        mine, theirs = list(self.teacher.parameters()), list(self.student.parameters())
        if self.how == "foreach":
            torch._foreach_lerp_(mine, theirs, 0.5)
        elif self.how == "load":
            self.teacher.load_state_dict(self.student.state_dict())
        elif self.how == "out":
            for ours, other in zip(mine, theirs, strict=True):
                torch.lerp(ours, other, 0.5, out=ours)
        else:
            for ours, other in zip(mine, theirs, strict=True):
                if self.how == "lerp_":
                    ours.lerp_(other, 0.5)
                elif self.how == "data":
                    ours.data = ours.data * 0.5 + other.data * 0.5
                elif self.how == "data in place":
                    ours.data.mul_(0.5).add_(other.data, alpha=0.5)
                elif self.how == "detached":
                    ours.detach().copy_(other)
                elif self.how == "items":
                    ours[:] = 0.5 * ours + 0.5 * other
                else:
                    ours *= 0.5  # noqa: PLW2901

    def forward(self, x: Tensor) -> Tensor:
        if self.how != "not at all":
            self.follow()
        output: Tensor = self.student(x) + self.teacher(x)
        return output


WAYS = ("lerp_", "data", "data in place", "detached", "items", "operator", "foreach", "load", "out")


@pytest.mark.parametrize("how", [*WAYS, "not at all"])
def test_parameters_that_a_forward_pass_changes_are_found(how: str) -> None:
    found = try_out(WORLD, Follower(how), TASK, ROW)
    assert found.moved == (["teacher.bias", "teacher.weight"] if how in WAYS else [])


def test_an_embedding_that_bounds_its_rows_changes_them() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(11, WIDTH, max_norm=0.1)

        def forward(self, t: Tensor) -> Tensor:
            output: Tensor = self.words(t).mean(1)
            return output

    found = try_out(WORLD, Words(), Classification(["t"], "y"), ROW)
    assert found.moved == ["words.weight"]
