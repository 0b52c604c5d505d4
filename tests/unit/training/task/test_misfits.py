"""Shapes and types that do not fit: told with the field, its shape, and the key that mends them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpctrain.config import load
from hpctrain.config.schema import Config
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.training.components import resolve_components
from hpctrain.training.task.misfits import explain_misfit
from hpctrain.training.task.task import Classification

CONFIG = """
[run]
name = "run"
[model]
use = "resnet18"
in_channels = 1
num_classes = 3
[task]
use = "classification"
inputs = ["x"]
target = "y"
[data]
train = "train"
global_batch_size = 4
[optimizer]
use = "adamw"
lr = 1e-3
betas = [0.9, 0.99]
[training]
max_steps = 1
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "train").mkdir()
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.replace('"train"', f'"{tmp_path}/train"'), encoding="utf-8")
    return path


@pytest.fixture
def config(path: Path) -> Config:
    return load(str(path))


def cross_entropy(output: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(output, fields["y"])


BYTES, LABELS = torch.uint8, torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        (
            nn.Conv2d(1, 3, 3),
            {"x": torch.zeros(4, 3, 8, 8)},
            r'"x" is \(4, 3, 8, 8\) float32.* Set model.in_channels = 3',
        ),
        (nn.Conv2d(1, 3, 3), {"x": torch.zeros(4, 8)}, r'"x" is \(4, 8\).* the axis by data.tr'),
        (
            nn.Conv2d(3, 3, 3),
            {"x": torch.zeros(4, 3, 8, 8, dtype=BYTES)},
            r'"x" is \(4, 3, 8, 8\) uint8: say by data\.normalize\.x',
        ),
        (
            nn.Conv2d(3, 3, 3, bias=False),
            {"x": torch.zeros(4, 3, 8, 8, dtype=BYTES)},
            r"uint8: say by data\.normalize\.x",
        ),
        (nn.Linear(3, 3), {"x": torch.zeros(4, 3, dtype=BYTES)}, r"data\.normalize\.x"),
        (nn.Linear(3, 3), {"x": LABELS.view(4, 1).expand(4, 3)}, r"int64: say by data\.norm"),
        (nn.Linear(3, 3), {"x": torch.zeros(4, 5)}, r"3 features and was given 5: .*num_classes"),
        *(
            (
                nn.Sequential(layer),
                {"x": torch.zeros(4, 3, dtype=BYTES)},
                r"say by data\.normalize\.x",
            )
            for layer in (nn.Linear(3, 3, bias=False), nn.LayerNorm(3), nn.BatchNorm1d(3))
        ),
        (nn.Softmax(1), {"x": torch.zeros(4, 3, dtype=BYTES)}, r"uint8: say by data\.normalize\.x"),
        (nn.LayerNorm(3), {"x": torch.zeros(4, 5)}, r"3 features and was given 5.*num_classes = 5"),
        (nn.GRU(3, 3), {"x": torch.zeros(4, 5)}, r"3 features and was given 5.*num_classes = 5"),
        (nn.BatchNorm2d(3), {"x": torch.zeros(4, 5)}, r"4D input \(got 2D input\)"),
        (nn.BatchNorm1d(1), {"x": torch.zeros(4, 5)}, r"1 channels.*5: .* Set model.in_chan"),
        (nn.Embedding(3, 3), {"x": torch.tensor([1, 7, 2, 0])}, r"int64, from 0 to 7\. .*vocab"),
        (nn.Embedding(3, 3), {"x": torch.zeros(4)}, r"whole numbers.* is \(4,\) float32"),
        (nn.Identity(), {"y": LABELS.view(4, 1)}, r'"y" is \(4, 1\) int64.*task\.target'),
        (nn.Identity(), {"y": torch.zeros(4)}, r'"y" is \(4,\) float32.*task.use = "regression"'),
        (nn.Identity(), {"y": LABELS + 7}, r"a class 7, .* int64, from 7 to 7.*task.ignore_index"),
    ],
)
def test_what_torch_says_is_told_with_field_and_key(
    model: nn.Module, fields: dict[str, Tensor], words: str, config: Config
) -> None:
    fields = {"x": torch.zeros(4, 3), "y": LABELS, **fields}
    with pytest.raises((RuntimeError, IndexError, ValueError)) as raised:
        cross_entropy(model(fields["x"]), fields)
    told = explain_misfit(raised.value, fields, config)
    with pytest.raises(ConfigError, match=words):
        raise told or raised.value


def test_what_is_not_known_stays(config: Config) -> None:
    assert explain_misfit(RuntimeError("something else"), {"x": LABELS}, config) is None
    assert explain_misfit(TrainingError("Target 9 is out of bounds"), {}, config) is None


@pytest.mark.parametrize("shape", [(), (5, 6)])
def test_labels_may_have_an_axis_of_channels(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, *shape), torch.randint(3, (4, *shape))
    task = Classification(["x"], "y")
    losses = [
        task.loss(nn.Identity(), {"x": logits, "y": each}) for each in (labels, labels.unsqueeze(1))
    ]
    assert losses[0] == losses[1]
    with pytest.raises(TrainingError, match=r"is \(4, 2.* task\.target"):
        task.loss(nn.Identity(), {"x": logits, "y": torch.zeros(4, 2, *shape).long()})
    with pytest.raises(TrainingError, match=r'float32: take task.use = "regression"'):
        task.loss(nn.Identity(), {"x": logits, "y": labels.float()})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.betas=0.9", r"optimizer.betas = 0.9: adamw refuses it: .* is \(0.9, 0.999\)"),
        ("optimizer.betas=[1.5, 0.9]", "Invalid beta parameter at index 0"),
        ("optimizer.eps=-1.0", "optimizer.eps = -1.0: adamw refuses it"),
    ],
)
def test_what_an_optimizer_refuses_has_its_line(path: Path, override: str, words: str) -> None:
    key, value = override.split("=")
    name = key.removeprefix("optimizer.")
    text = path.read_text(encoding="utf-8").replace("betas = [0.9, 0.99]", f"{name} = {value}")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words) as raised:
        resolve_components(load(str(path)), str(path))
    line = next(i for i, each in enumerate(text.splitlines(), 1) if each.startswith(name))
    assert f"line {line} " in str(raised.value)
