"""Losses and metrics of the built-in tasks, learning rates, built-in models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import nn

import hpctrain
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.models.convnet import ConvNet
from hpctrain.models.mlp import MLP
from hpctrain.training.optim.schedules import cosine, linear
from hpctrain.training.task.regression import Regression
from hpctrain.training.task.task import Classification


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


def masked_fields(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return inputs, a target with NaN where it is missing, and its mask."""
    torch.manual_seed(1)
    target, mask = torch.randn(shape), (torch.rand(shape) < 0.7).float()
    target[mask == 0] = torch.nan
    return {"x": torch.randn(shape[0], 4), "y": target, "y_mask": mask}


@pytest.mark.parametrize(
    ("loss", "function"),
    [("mse", F.mse_loss), ("mae", F.l1_loss), ("torch.nn:SmoothL1Loss", F.smooth_l1_loss)],
)
@pytest.mark.parametrize("shape", [(10,), (10, 1), (10, 2, 3)])
def test_regression_on_what_is_there(loss: str, function: object, shape: tuple[int, ...]) -> None:
    fields = masked_fields(shape)
    features = math.prod(shape[1:])
    model = nn.Sequential(nn.Linear(4, features), nn.Unflatten(1, shape[1:] or (1,)))
    task = Regression(["x"], "y", mask="y_mask", loss=loss)
    assert not task.counts_samples
    total, weight = task.loss(model, fields)
    is_there = fields["y_mask"] != 0
    output = model(fields["x"]).reshape(shape)
    expected = function(output[is_there], fields["y"][is_there])  # type: ignore[operator]
    assert (total / weight).item() == pytest.approx(expected.item(), rel=1e-6)
    (total / weight).backward()
    gradient = model[0].weight.grad
    expected_gradient = torch.autograd.grad(expected, model[0].weight)[0]
    assert torch.allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    errors = (output - fields["y"])[is_there].double()
    for name, value in (("mae", errors.abs().mean()), ("mse", errors.square().mean())):
        found, count = task.evaluate(model, fields)[name]
        assert (found / count).item() == pytest.approx(value.item(), rel=1e-6)
    # A mask is a weight, and may be a half.
    fields["y_mask"] = fields["y_mask"] / 2
    halved = task.loss(model, fields)
    assert halved[1] == weight / 2


@pytest.mark.parametrize("class_weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("ignore_index", [None, 2])
def test_classification_of_what_has_a_class(
    class_weights: list[float] | None, ignore_index: int | None
) -> None:
    torch.manual_seed(1)
    labels = torch.randint(3, (10, 4), dtype=torch.int16)
    mask = (torch.rand(10, 4) < 0.7).float()
    labels[mask == 0] = -99
    fields = {"x": torch.randn(10, 5, 4), "y": labels, "y_mask": mask}
    model = nn.Conv1d(5, 3, 1)
    task = Classification(
        ["x"], "y", mask="y_mask", class_weights=class_weights, ignore_index=ignore_index
    )
    total, weight = task.loss(model, fields)
    kept = labels.long().where(mask != 0, -100)
    kept = kept if ignore_index is None else kept.where(kept != ignore_index, -100)
    weights = None if class_weights is None else torch.tensor(class_weights)
    expected = F.cross_entropy(model(fields["x"]), kept, weight=weights)
    assert (total / weight).item() == pytest.approx(expected.item(), rel=1e-6)
    parts = task.evaluate(model, fields)
    assert (parts["loss"][0] / parts["loss"][1]).item() == pytest.approx(expected.item(), rel=1e-6)
    right = (model(fields["x"]).argmax(1) == kept)[kept != -100].double().mean()
    assert (parts["accuracy"][0] / parts["accuracy"][1]).item() == pytest.approx(right.item())


def without_reduction(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


def too_short(output: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return (output - target).square().mean(-1)


def test_masks_that_do_not_fit() -> None:
    fields = masked_fields((10, 2))
    model = nn.Linear(4, 2)
    with pytest.raises(ConfigError, match='takes no reduction = "none", so a mask cannot'):
        Regression(["x"], "y", mask="m", loss=f"{__name__}:without_reduction")
    task = Regression(["x"], "y", mask="y_mask", loss=f"{__name__}:too_short")
    with pytest.raises(TrainingError, match=r"returned \(10,\) .* a number for each element"):
        task.loss(model, fields)
    with pytest.raises(
        TrainingError, match=r'task\.mask = "m": there is no such field; there are x'
    ):
        Regression(["x"], "y", mask="m").loss(model, fields)
    fields["y_mask"] = torch.ones(3)
    with pytest.raises(TrainingError, match=r"is \(3,\), and the target \(10, 2\)"):
        Regression(["x"], "y", mask="y_mask").loss(model, fields)


def test_tasks_are_found_where_they_stood_in_the_first_release() -> None:
    from hpctrain.training import task

    for name in ("Classification", "LanguageModeling", "Regression", "Task"):
        assert getattr(task, name) is getattr(hpctrain, name)


@pytest.mark.parametrize("loss", ["mse", "mae", "torch.nn:SmoothL1Loss"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_errors_weighted_by_latitude_are_those_of_xarray(loss: str, is_masked: bool) -> None:
    """Losses and metrics of any cut of the samples, missing values left out as xarray does."""
    latitude = np.linspace(-80.0, 80.0, 5)
    generator = np.random.default_rng(0)
    output, target = generator.standard_normal((2, 7, 2, 5, 3)).astype(np.float32)
    if is_masked:
        target[generator.random(target.shape) < 0.3] = np.nan
    cosines = np.cos(np.deg2rad(latitude))
    weights = torch.from_numpy((cosines / cosines.mean()).reshape(1, 5, 1))

    def fields(part: slice) -> dict[str, torch.Tensor]:
        y = torch.from_numpy(target[part])
        mask = (~torch.isnan(y)).float()
        spread = weights.expand(len(y), *weights.shape)
        return {"x": torch.from_numpy(output[part]), "y": y, "m": mask, "y.weight": spread}

    task = Regression(["x"], "y", mask="m" if is_masked else None, weight="y.weight", loss=loss)
    assert set(task.metrics) == {"loss", "mae", "mse", "rmse"}
    parts = [fields(slice(0, 4)), fields(slice(4, 7))]
    evaluated = [task.evaluate(nn.Identity(), part) for part in parts]
    grid = ("sample", "level", "latitude", "longitude")
    error = xr.DataArray(output - target, dims=grid, coords={"latitude": latitude})
    weighing = np.cos(np.deg2rad(error.latitude))
    squared = (error**2).weighted(weighing).mean().item()
    absolute = abs(error).weighted(weighing).mean().item()
    known = {"mse": squared, "mae": absolute}
    wanted = {"mse": squared, "mae": absolute, "loss": known.get(loss)}
    if loss not in known:
        smooth = np.where(abs(error) < 1, error**2 / 2, abs(error) - 0.5)
        smooth = np.where(np.isnan(error), np.nan, smooth)
        wanted["loss"] = error.copy(data=smooth).weighted(weighing).mean().item()
    for name, value in wanted.items():
        total, count = (sum(float(each[name][k]) for each in evaluated) for k in (0, 1))
        assert total / count == pytest.approx(value, rel=1e-6), name
    sums = {"squared": sum(each["squared"] for each in evaluated)}
    assert task.finish(sums) == {"rmse": pytest.approx(squared**0.5, rel=1e-6)}
    losses = [task.loss(nn.Identity(), part) for part in parts]
    total, count = (sum(float(each[k]) for each in losses) for k in (0, 1))
    assert total / count == pytest.approx(wanted["loss"], rel=1e-5)


def test_weights_of_another_grid_are_explained() -> None:
    task = Regression(["x"], "y", weight="y.weight")
    y = torch.zeros(2, 4, 6)
    with pytest.raises(TrainingError, match=r"\(2, 5, 1\), and the target \(2, 4, 6\)"):
        task.loss(nn.Identity(), {"x": y, "y": y, "y.weight": torch.ones(2, 5, 1)})
    with pytest.raises(TrainingError, match=r"there is no such field; there are x, y"):
        task.loss(nn.Identity(), {"x": y, "y": y})
