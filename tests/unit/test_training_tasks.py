"""Losses and metrics of the built-in tasks, learning rates, built-in models."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpctrain.errors import ConfigError, TrainingError
from hpctrain.models.convnet import ConvNet
from hpctrain.models.mlp import MLP
from hpctrain.training.optimization.schedules import cosine, linear
from hpctrain.training.task import Classification, Regression


def test_classification_sums_what_torch_averages() -> None:
    torch.manual_seed(0)
    model, image = nn.Linear(4, 3), torch.randn(10, 4)
    label = torch.randint(3, (10,), dtype=torch.uint8)
    task = Classification(["image"], "label", label_smoothing=0.1)
    fields = {"image": image, "label": label}
    loss, weight = task.loss(model, fields)
    expected = F.cross_entropy(model(image), label.long(), label_smoothing=0.1)
    assert (loss / weight).item() == pytest.approx(expected.item(), rel=1e-6)
    parts = task.evaluate(model, fields)
    right = (model(image).argmax(1) == label).float().mean()
    assert (parts["accuracy"][0] / parts["accuracy"][1]).item() == pytest.approx(right.item())
    assert set(parts) == set(task.metrics)


def test_ignored_samples_count_for_nothing() -> None:
    torch.manual_seed(0)
    model, image = nn.Linear(4, 3), torch.randn(10, 4)
    label = torch.tensor([0, 1, 2, 9, 9, 0, 1, 2, 9, 0])
    task = Classification(["image"], "label", ignore_index=9)
    assert not task.counts_samples
    loss, weight = task.loss(model, {"image": image, "label": label})
    assert weight == 7
    expected = F.cross_entropy(model(image), label, ignore_index=9)
    assert (loss / weight).item() == pytest.approx(expected.item(), rel=1e-6)
    correct, counted = task.evaluate(model, {"image": image, "label": label})["accuracy"]
    assert counted == 7
    assert correct == (model(image).argmax(1) == label).sum()


@pytest.mark.parametrize(("loss", "function"), [("mse", F.mse_loss), ("mae", F.l1_loss)])
@pytest.mark.parametrize("shape", [(10,), (10, 1), (10, 2, 3)])
def test_regression(loss: str, function: object, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    features = math.prod(shape[1:])
    model = nn.Sequential(nn.Linear(4, features), nn.Unflatten(1, shape[1:] or (1,)))
    fields = {"x": torch.randn(10, 4), "y": torch.randn(shape)}
    total, weight = Regression(["x"], "y", loss=loss).loss(model, fields)
    expected = function(model(fields["x"]).reshape(shape), fields["y"])  # type: ignore[operator]
    assert (total / weight).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    "make", [lambda: Classification(["x"], None), lambda: Regression(["x"], None)]
)
def test_a_target_is_needed(make: object) -> None:
    with pytest.raises(ConfigError, match=r"task\.target: missing"):
        make()  # type: ignore[operator]


def test_outputs_of_the_wrong_shape_are_explained() -> None:
    fields = {"x": torch.randn(10, 4), "y": torch.zeros(10, 5)}
    with pytest.raises(TrainingError, match=r"gave \(10, 3\), and the target .y. is \(10, 5\)"):
        Classification(["x"], "y").loss(nn.Linear(4, 3), fields)
    with pytest.raises(TrainingError, match=r"gave \(10, 3\), and the target .y. is \(10, 5\)"):
        Regression(["x"], "y").loss(nn.Linear(4, 3), fields)


def test_schedules_end_where_they_are_told() -> None:
    for factor in (linear, cosine):
        assert factor(100, 100, final=0.25) == pytest.approx(0.25)
        assert factor(50, 100, final=0.5) == pytest.approx(0.75)


def test_models_map_samples_one_by_one() -> None:
    """No statistics over the batch: what a sample gives does not depend on its company."""
    torch.manual_seed(0)
    image = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    for model in (ConvNet(1, 10).double(), MLP(64, 10).double()):
        whole = model(image)
        assert whole.shape == (6, 10)
        parts = torch.cat([model(image[:2]), model(image[2:])])
        assert torch.allclose(whole, parts, rtol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConvNet(1, 10, widths=[12]),
        lambda: ConvNet(0, 10),
        lambda: ConvNet(1, 10, widths=[]),
        lambda: MLP(0, 10),
    ],
)
def test_models_that_are_none(make: object) -> None:
    with pytest.raises(ConfigError, match="model"):
        make()  # type: ignore[operator]
