"""Losses that are no sums over samples are told from those that are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.steps import make_step
from torch import Tensor, nn

from hpctrain.data.loading.batch import Rows
from hpctrain.models.transformer import Transformer
from hpctrain.training.task.language_modeling import LanguageModeling
from hpctrain.training.task.regression import Regression
from hpctrain.training.task.task import Classification


def rows(count: int = 8) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(count, 6, generator=draw),
        "y": torch.randint(3, (count,), generator=draw),
        "t": torch.randint(11, (count, 5), generator=draw),
        "z": torch.randn(count, 3, generator=draw),
    }


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))


class Mine:
    """A task whose loss is a function of (model, fields)."""

    inputs = ("x",)
    metrics = {"loss": "min"}  # noqa: RUF012
    counts_samples = True

    def __init__(self, loss: Any) -> None:
        self._loss = loss

    def loss(self, model: nn.Module, fields: Any) -> tuple[Tensor, Any]:
        return self._loss(model(fields["x"]), fields), len(fields["x"])

    def evaluate(self, model: nn.Module, fields: Any) -> dict[str, Any]:
        return {"loss": self.loss(model, fields)}


def mean_of(**options: Any) -> Mine:
    return Mine(lambda out, f: F.cross_entropy(out, f["y"], **options) * len(f["y"]))


def contrastive(out: Tensor, fields: Any) -> Tensor:
    a, b = F.normalize(out, dim=1), F.normalize(fields["z"], dim=1)
    return F.cross_entropy(a @ b.T, torch.arange(len(a)), reduction="sum")


def wants_four(out: Tensor, fields: Any) -> Tensor:
    return out.reshape(8, -1).square().sum()


class Slope(Mine):
    """A loss made of gradients by the input, as physics-informed losses and penalties are."""

    def __init__(self) -> None:
        super().__init__(None)

    def loss(self, model: nn.Module, fields: Any) -> tuple[Tensor, Any]:
        x = fields["x"].clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).square().sum(), len(x)


def said(task: Any, model: nn.Module | None = None, precision: Any = "32-true") -> str | None:
    step = make_step(model or network(), task=task, example=rows(1), precision=precision)
    return step.find_coupling(Rows(rows()))


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    "task",
    [
        Classification(["x"], "y"),
        Classification(["x"], "y", ignore_index=1),
        Classification(["x"], "y", class_weights=[1.0, 5.0, 2.0], label_smoothing=0.1),
        Regression(["x"], "z", loss="mae"),
        mean_of(),
        Mine(lambda out, f: (out + torch.randn_like(out)).square().sum()),  # cannot be told
        Slope(),
    ],
)
def test_sums_over_samples(task: Any, precision: Any) -> None:
    """Whatever dropout and batch statistics do."""
    assert said(task, precision=precision) is None


def test_tokens() -> None:
    model = Transformer(vocabulary=11, context=5, width=8, depth=1, heads=2)
    assert said(LanguageModeling(["t"], None, ignore_index=3), model) is None


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "task",
    [
        mean_of(ignore_index=1),
        mean_of(weight=torch.tensor([1.0, 5.0, 2.0])),
        Mine(contrastive),
        Mine(lambda out, f: F.cross_entropy(out, f["y"])),  # a mean taken for a sum
    ],
)
def test_means_that_are_none_over_samples(task: Any, precision: Any) -> None:
    task.batch_dependent_loss = False
    text = said(task, precision=precision)
    assert text is not None
    assert "it sees the 8 samples of one pass of one rank" in text
    assert "counts_samples = False" in text
    task.batch_dependent_loss = True
    assert said(task, precision=precision) is None


def test_a_loss_that_half_a_batch_does_not_fit() -> None:
    text = said(Mine(wants_four), nn.Linear(6, 3))
    assert text is not None
    assert "cannot be computed for half of 8 rows" in text
