"""From `[data.normalize]` and `data.transform` to what is done to batches."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomllib
import torch

from hpctrain.config import Config
from hpctrain.config.importing import build_transform
from hpctrain.config.schema import (
    ComponentSection,
    OptimizerSection,
    RunSection,
    TaskSection,
    TrainingSection,
)
from hpctrain.config.schema_data import DataSection, FieldTable
from hpctrain.convert.stats import measure
from hpctrain.data import Writer, open_dataset
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.worker import SampleRunner
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.stats import STATS_NAME, write_stats
from hpctrain.errors import ConfigError, DatasetError
from hpctrain.training.data.recorded import find_normalizations
from hpctrain.training.data.transforms import build_batch_transform

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (300, 2, 3, 3), np.uint8)
IMAGES[:, 1] = 7
KEYS = torch.from_numpy(np.arange(300, dtype=np.uint64))


class Shift:
    def __init__(self, by: float) -> None:
        if by < 0:
            raise ValueError("by is less than 0")
        self.by = by

    def __call__(
        self, fields: dict[str, torch.Tensor], keys: torch.Tensor, *, training: bool
    ) -> dict[str, torch.Tensor]:
        return {**fields, "image": fields["image"] + self.by}


class NoCall:
    pass


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    with Writer(tmp_path / "train", shard_bytes=2000) as writer:
        writer.extend({"image": IMAGES, "label": np.arange(300)})
    return open_dataset(str(tmp_path / "train"))


def config(**data: Any) -> Config:
    return Config(
        run=RunSection(name="x"),
        model=ComponentSection(use="mlp"),
        task=TaskSection(use="classification", inputs=["image"], target="label"),
        data=DataSection(train="train", global_batch_size=8, **data),
        optimizer=OptimizerSection(use="sgd", lr=0.1),
        training=TrainingSection(max_epochs=1),
    )


def finished(dataset: Dataset, config: Config) -> torch.Tensor:
    normalizations = find_normalizations(config, dataset, {})
    batch_transform = build_batch_transform(config, dataset.fields, {}, normalizations, CPU)
    fields = {"image": torch.from_numpy(IMAGES.copy()), "label": torch.arange(300)}
    return batch_transform.apply(fields, KEYS, training=True)["image"]


def test_normalised_by_the_statistics_of_the_training_data(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    for word in ("stats", "channel_stats"):
        with pytest.raises(DatasetError, match="there are no statistics"):
            find_normalizations(config(normalize={"image": word}), dataset, {})
    write_stats(measure(dataset, jobs=1), Path(dataset.shards[0].path).parent / STATS_NAME)
    whole = finished(dataset, config(normalize={"image": "stats"}))
    assert torch.allclose(whole.mean(), torch.tensor(0.0), atol=1e-5)
    assert torch.allclose(whole.std(correction=0), torch.tensor(1.0), atol=1e-5)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    channels = finished(dataset, config(normalize={"image": "channel_stats"}))
    assert torch.allclose(channels[:, 0].std(correction=0), torch.tensor(1.0), atol=1e-5)
    assert (channels[:, 1] == 0).all()
    assert "the same value everywhere in 1 of 2 channels; it becomes 0" in caplog.text


def test_the_statistics_of_windows_are_those_of_the_rows(dataset: Dataset) -> None:
    write_stats(measure(dataset, jobs=1), Path(dataset.shards[0].path).parent / STATS_NAME)
    shown = {"picture": FieldTable(path="image", steps=2)}
    section = DataSection(train=dataset.source, global_batch_size=8, fields=shown)
    train, _ = open_datasets(section, ["picture", "label"])
    found = find_normalizations(config(normalize={"picture": "stats"}), train, {})["picture"]
    assert found.mean == pytest.approx((IMAGES.mean(),))
    assert found.std == pytest.approx((IMAGES.std(),))
    with pytest.raises(ConfigError, match="the first axis of a sample is not an axis of the rows"):
        find_normalizations(config(normalize={"picture": "channel_stats"}), train, {})


def test_a_transform_with_arguments(dataset: Dataset) -> None:
    use, arguments = f"{__name__}:Shift", {"by": 3.0}
    made = config(
        normalize={"image": {"mean": 1, "std": 2}}, transform=use, transform_arguments=arguments
    )
    expected = torch.from_numpy(IMAGES).float().sub(1).div(2) + 3
    assert torch.equal(finished(dataset, made), expected)
    of_double = dataclasses.replace(
        made, training=dataclasses.replace(made.training, precision="64-true")
    )
    assert finished(dataset, of_double).dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Shift", {"by": -1}, "refuses its arguments: by is less than 0"),
        ("Shift", {}, "data.transform_arguments.by: missing"),
        ("NoCall", {}, "its objects cannot be called; give the class a method __call__"),
    ],
)
def test_a_transform_that_is_refused(
    dataset: Dataset, name: str, arguments: dict[str, Any], message: str
) -> None:
    refused = config(transform=f"{__name__}:{name}", transform_arguments=arguments)
    with pytest.raises(ConfigError, match=message):
        build_batch_transform(refused, dataset.fields, {}, {}, CPU)


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[4] / "docs" / "data.md").read_text(encoding="utf-8")
    text = page.partition("## Normalise and transform")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "my_transforms.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_transforms", raising=False)
    section = tomllib.loads(text.partition("```toml\n")[2].partition("```")[0])["data"]
    shift = SampleRunner(
        build_transform("", section["sample_transform"], section["sample_transform_arguments"])
    )
    inputs = {"image": IMAGES.copy()}
    outputs = {"image": np.empty_like(IMAGES)}
    shift.fill(inputs, KEYS.numpy(), outputs, training=True)
    assert (outputs["image"].sum((1, 2, 3)) == IMAGES.sum((1, 2, 3))).all()
    assert 0.5 < (outputs["image"] != IMAGES).any((1, 2, 3)).mean() < 1
    noise = build_transform("", section["transform"], {})
    image = torch.from_numpy(IMAGES).float()
    made = noise(fields={"image": image.clone()}, keys=KEYS, training=True)["image"]
    alone = noise(fields={"image": image[7:8].clone()}, keys=KEYS[7:8], training=True)["image"]
    assert torch.equal(made[7:8], alone)
    assert not torch.equal(made, image)
