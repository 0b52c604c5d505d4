"""The models of the literature: their sizes, their beginnings, and what they map."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.steps import WORLD, make_step
from torch import Tensor, nn

from hpctrain.config import load
from hpctrain.data.loading.loader import Batch
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.models.resnet import ResNet, resnet18, resnet20, resnet50
from hpctrain.models.transformer import Transformer
from hpctrain.training.evaluation import Turn, evaluate
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.task.language_modeling import LanguageModeling
from hpctrain.training.task.runner import TaskRunner

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        # Those that torchvision documents.
        (lambda: resnet18(1000), 11_689_512),
        (lambda: resnet50(1000), 25_557_032),
        # He et al. give 0.27 million; projections are 2,752 more than their padded shortcuts.
        (lambda: resnet20(10), 272_474),
        # Radford et al.: the small one, with the embedding counted once.
        (lambda: Transformer(50257, 1024, depth=12, width=768, heads=12), 124_439_808),
    ],
)
def test_sizes_are_those_of_the_literature(make: Callable[[], nn.Module], numbers: int) -> None:
    with torch.device("meta"):
        model = make()
    assert sum(item.numel() for item in model.parameters()) == numbers


def test_names_are_torchvisions() -> None:
    with torch.device("meta"):
        names = set(resnet50(1000).state_dict())
    expected = {
        *("conv1.weight", "bn1.running_mean", "layer1.0.downsample.0.weight", "fc.bias"),
        *("layer2.0.downsample.1.bias", "layer4.2.conv3.weight", "layer3.5.bn3.weight"),
    }
    assert expected <= names
    assert len(names) == 320


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_residual_network_begins_as_its_shortcuts(norm: Any) -> None:
    torch.manual_seed(0)
    model = resnet20(10, in_channels=1, norm=norm).eval()
    image = torch.randn(4, 1, 32, 32)
    block = model.layer1[0]
    features = torch.randn(4, 16, 8, 8).relu()
    assert torch.equal(block(features), features)
    assert model(image).shape == (4, 10)
    parts = torch.cat([model(image[:1]), model(image[1:])])
    torch.testing.assert_close(model(image), parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: resnet18(0),
        lambda: resnet18(10, norm="layer"),
        lambda: ResNet(10, blocks=[1], widths=[8, 8], bottleneck=False),
        lambda: Transformer(256, 8, width=10, heads=3),
        lambda: Transformer(0, 8),
        lambda: Transformer(256, 8, dropout=1.0),
    ],
)
def test_models_that_are_none(make: Any) -> None:
    with pytest.raises(ConfigError, match="model"):
        make()


def small() -> Transformer:
    torch.manual_seed(0)
    return Transformer(11, 8, depth=2, width=12, heads=3)


def test_a_prediction_knows_nothing_of_what_follows() -> None:
    model, tokens = small(), torch.randint(11, (3, 8))
    before = model(tokens)
    tokens[:, 5:] = (tokens[:, 5:] + 1) % 11
    after = model(tokens)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])
    assert model.head.weight is model.token_embedding.weight
    with pytest.raises(ConfigError, match=r"model.context = 8.*9 tokens"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_it_begins_without_an_opinion() -> None:
    logits = small()(torch.randint(11, (50, 8)))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(11, (400,)))
    assert loss.item() == pytest.approx(math.log(11), rel=0.02)


@pytest.mark.parametrize("ignore_index", [None, 0])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_the_loss_is_the_mean_over_tokens(ignore_index: int | None, dtype: torch.dtype) -> None:
    model = small().double()
    tokens = torch.randint(11, (6, 9), generator=torch.Generator().manual_seed(1)).to(dtype)
    task = LanguageModeling(["tokens"], None, ignore_index=ignore_index)
    loss, weight = task.loss(model, {"tokens": tokens})
    expected = nn.functional.cross_entropy(
        model(tokens[:, :-1].long()).flatten(0, 1),
        tokens[:, 1:].long().flatten(),
        ignore_index=-100 if ignore_index is None else ignore_index,
    )
    assert (loss / weight).item() == pytest.approx(expected.item(), rel=1e-12)
    assert (weight == 6) == (ignore_index is None)
    found = task.evaluate(model, {"tokens": tokens})
    values = {name: (total / count).item() for name, (total, count) in found.items()}
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-12)
    assert values["bits_per_token"] == pytest.approx(expected.item() / math.log(2), rel=1e-12)
    assert 0 <= values["accuracy"] <= 1


def test_a_text_is_learnt() -> None:
    text = b"the quick brown fox jumps over the lazy dog. " * 4
    tokens = torch.tensor(list(text[: 9 * 18]), dtype=torch.uint8).view(9, 18)
    torch.manual_seed(0)
    model = Transformer(256, 17, depth=2, width=32, heads=4)
    task = LanguageModeling(["tokens"], None)
    step = make_step(model, task=task, example={"tokens": tokens[:1]}, largest_share=9)
    step.dry_run()
    batch = Batch(fields={"tokens": tokens}, size=9, global_size=9, epoch=0, start=0)
    for _ in range(120):
        step(batch, 0.01)
    number_format = NumberFormat.of("32-true", torch.device("cpu"))
    metrics = evaluate(TaskRunner(model, task, number_format), [Turn(batches=[batch])], WORLD)
    assert metrics["bits_per_token"] < 1.0
    assert metrics["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LanguageModeling(["a", "b"], None), "has one: tokens"),
        (lambda: LanguageModeling(["a"], "b"), "leave it out"),
    ],
)
def test_tasks_that_are_none(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("tokens", "model"),
    [
        (torch.zeros(3, 4), small()),
        (torch.zeros(3, dtype=torch.int64), small()),
        (torch.zeros(3, 4, dtype=torch.int64), nn.Embedding(5, 1)),
    ],
)
def test_data_and_models_that_do_not_fit(tokens: Tensor, model: nn.Module) -> None:
    if isinstance(model, nn.Embedding):
        model = nn.Sequential(model, nn.Flatten())
    with pytest.raises(TrainingError, match="language_modeling needs"):
        LanguageModeling(["tokens"], None).loss(model, {"tokens": tokens})


def test_the_config_of_the_language_model_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        (tmp_path / "data" / "stdlib" / split).mkdir(parents=True)
    config = load(str(ROOT / "configs" / "lm.toml"))
    with torch.device("meta"):
        model = Transformer(**config.model.arguments)
    assert sum(item.numel() for item in model.parameters()) < 4e6
