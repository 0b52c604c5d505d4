"""Classes and tokens that are out of range are named, also where a device would not say it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.loaders import train_loader
from torch import Tensor, nn

from hpctrain.data import Writer, open_dataset
from hpctrain.data.loading.loader import TrainLoader
from hpctrain.data.order.order import Order
from hpctrain.errors import TrainingError
from hpctrain.models.transformer import Transformer
from hpctrain.training.task.language_modeling import LanguageModeling
from hpctrain.training.task.misfits import Batch, explained_indices, ranges_checked
from hpctrain.training.task.task import Classification

ASSERTION = "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later"
SAMPLES, CLASSES = 40, 3


@pytest.fixture
def loader(tmp_path: Path) -> TrainLoader:
    labels = np.arange(SAMPLES) % CLASSES
    labels[17], labels[18] = 7, -1
    with Writer(tmp_path / "data") as writer:
        writer.extend({"x": np.zeros((SAMPLES, 2), np.float32), "y": labels})
    return train_loader(
        open_dataset(str(tmp_path / "data")),
        Order(samples=SAMPLES, seed=0, lanes=4, window=2, block_rows=1),
        fields=["x", "y"],
        global_batch_size=8,
        buffer_mb=1.0,
    )


def classified(**arguments: object) -> Classification:
    """Return a task that knows how many classes there are."""
    task = Classification(["x"], "y", **arguments)  # type: ignore[arg-type]
    task.loss(nn.Linear(2, CLASSES), {"x": torch.zeros(4, 2), "y": torch.zeros(4).long()})
    return task


def batches() -> list[Batch]:
    return [(0, start, 8) for start in range(0, SAMPLES, 8)]


def test_an_assertion_is_explained_by_what_is_stored(loader: TrainLoader) -> None:
    with (
        pytest.raises(TrainingError) as caught,
        explained_indices(classified(), loader, batches),
    ):
        raise RuntimeError(ASSERTION)
    text = str(caught.value)
    assert 'the field "y" holds ' in text
    assert "the model has 3" in text
    assert any(f"row {row}:" in text for row in (17, 18)) or "rows 17-18" in text
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_what_is_ignored_is_none(loader: TrainLoader) -> None:
    with (
        pytest.raises(TrainingError, match="holds 7, and the model has 3"),
        explained_indices(classified(ignore_index=-1), loader, batches),
    ):
        raise RuntimeError(ASSERTION)


def test_an_assertion_about_something_else_says_what_to_do(loader: TrainLoader) -> None:
    with (
        pytest.raises(TrainingError, match=r'"y" as stored is not it\. CUDA_LAUNCH_BLOCKING=1'),
        explained_indices(classified(), loader, lambda: [(0, 0, 0)]),
    ):
        raise RuntimeError(ASSERTION)
    with (
        pytest.raises(TrainingError, match="most often a class or a token"),
        explained_indices(object(), loader, batches),
    ):
        raise RuntimeError(ASSERTION)


@pytest.mark.parametrize("error", [IndexError("list index out of range"), RuntimeError("other")])
def test_errors_of_code_stay_what_they_are(loader: TrainLoader, error: Exception) -> None:
    task = object()
    with pytest.raises(type(error)) as caught, explained_indices(task, loader, batches):
        raise error
    assert caught.value is error


def test_classes_are_looked_at_before_the_device_meets_them() -> None:
    task = Classification(["x"], "y")
    fields = {"x": torch.zeros(3, 2), "y": torch.tensor([0, 2, 5])}
    model = nn.Linear(2, CLASSES)
    with ranges_checked(task), pytest.raises(TrainingError, match='field "y" holds 5, and the'):
        task.loss(model, fields)
    ignoring = Classification(["x"], "y", ignore_index=5)
    with ranges_checked(ignoring):
        ignoring.loss(model, fields)
        ignoring.evaluate(model, fields)
    assert not ignoring.checks_ranges


def test_masked_classes_may_be_any() -> None:
    task = Classification(["x"], "y", mask="there")
    fields = {
        "x": torch.zeros(2, 2),
        "y": torch.tensor([0, 99]),
        "there": torch.tensor([1.0, 0.0]),
    }
    with ranges_checked(task):
        task.loss(nn.Linear(2, CLASSES), fields)
    assert task.index_ranges == {}


class Meeting(nn.Module):
    """Stands for a device: does not come back from a token that it has no place for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        assert int(tokens.max()) < 16, "the device has met it"
        output: Tensor = self.inner(tokens)
        return output


def test_tokens_are_looked_at_before_they_are_looked_up() -> None:
    task = LanguageModeling(["tokens"], None)
    model = Meeting(Transformer(16, 4, depth=1, width=8, heads=2))
    task.loss(model, {"tokens": torch.tensor([[1, 2, 3, 4, 5]])})
    assert task.index_ranges == {"tokens": (16, -1)}
    with ranges_checked(task):
        with pytest.raises(TrainingError, match='field "tokens" holds 16, and the model has 16'):
            task.loss(model, {"tokens": torch.tensor([[1, 2, 16, 4, 5]])})
        with pytest.raises(TrainingError, match="holds 99"):  # it is predicted, not looked up
            task.loss(model, {"tokens": torch.tensor([[1, 2, 3, 4, 99]])})
