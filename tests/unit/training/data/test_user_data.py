"""Datasets, DataLoaders and datamodules in place of files."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import user_data
from helpers.worlds import world_of_one
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from hpctrain.config import Config
from hpctrain.config.semantics import semantics_of
from hpctrain.config.toml import parse
from hpctrain.config.validate import validate
from hpctrain.errors import ConfigError, DatasetError
from hpctrain.training.components import Brought
from hpctrain.training.data.run_data import Data, open_data
from hpctrain.training.data.user_data import _require_equal, own_hook

CONFIG = """
[run]
name = "r"
[model]
use = "mlp"
[task]
use = "classification"
inputs = ["x"]
target = "y"
[optimizer]
use = "sgd"
lr = 1.0
[training]
max_epochs = 1
[data]
workers = 0
"""


def config(data: str) -> Config:
    found, mistakes = validate(parse(CONFIG + data, "c.toml"))
    assert found is not None, mistakes
    return found


def opened(data: str, **brought: Any) -> Data:
    chosen = config(data)
    world = world_of_one("test")
    return open_data(chosen, world, semantics_of(chosen), None, Brought(**brought))


class Module(LightningDataModule):
    calls: list[str]

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size, self.calls = batch_size, []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)
        self.data = TensorDataset(torch.rand(20, 2), torch.arange(20) % 3)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=self.batch_size, shuffle=True, drop_last=True)


def make() -> Dataset[Any]:
    return TensorDataset(torch.rand(20, 2), torch.arange(20) % 3)


def test_a_datamodule_makes_the_data() -> None:
    module = Module(6)
    data = opened('use = "helpers.user_data:Texts"', datamodule=module)
    assert module.calls == ["prepare_data", "fit"]
    assert (data.config.data.global_batch_size, data.config.data.drop_last) == (6, True)
    assert (data.train.samples, data.validation) == (20, None)
    assert data.train_loader.epoch_size == 18
    batch = next(iter(data.train_loader.epoch(0, 0)))
    assert batch.fields["x"].shape == (6, 2)  # of a tuple, in the order that the task names
    assert batch.fields["y"].dtype == torch.int64
    assert own_hook(module, "val_dataloader") is None
    of_datasets = LightningDataModule.from_datasets(make(), make(), batch_size=5)
    data = opened('use = "helpers.user_data:Texts"', datamodule=of_datasets)
    assert data.validation is not None
    assert data.config.data.shuffle


def test_what_a_data_loader_says_is_in_the_config_of_the_job() -> None:
    data = opened('train = "a:b"', train=DataLoader(make(), batch_size=4))
    assert (data.config.data.global_batch_size, data.config.data.shuffle) == (4, False)
    assert any("data.shuffle = false" in note for note in data.notes)
    data = opened('train = "a:b"\nglobal_batch_size = 10', train=DataLoader(make(), batch_size=4))
    assert data.config.data.global_batch_size == 10
    assert data.notes[0] == "data.global_batch_size = 10, not the 4 of the DataLoader"
    sampler = WeightedRandomSampler([0.0] * 19 + [1.0], 40)
    data = opened('train = "a:b"', train=DataLoader(make(), batch_size=8, sampler=sampler))
    assert data.train_loader.epoch_size == 40
    rows = data.train_loader.rows(0, 0, 8)
    assert set(rows.tolist()) == {19}


@pytest.mark.parametrize(
    ("data", "brought", "expected"),
    [
        ('train = "a:b"', {"train": make()}, "data.global_batch_size: missing"),
        ('train = "no_such:make"', {}, "no module 'no_such'"),
        ('train = "helpers.user_data:Bad"', {}, "refuses its arguments: missing a required"),
        ('use = "helpers.user_data:Texts"', {}, "nothing to train with"),
        ('train = "a:b"\nglobal_batch_size = 3', {"train": user_data.Stream()}, "is a stream"),
        ('train = "a:b"\nglobal_batch_size = 3', {"train": user_data.Texts()}, None),
    ],
)
def test_what_cannot_be_served(
    data: str, brought: Any, expected: str | None, tmp_path: Path
) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match=r'gives no "x"; its samples have name, ids, score'):
            opened(data, **brought).train_loader.example()
        return
    with pytest.raises(ConfigError, match=expected):
        opened(data, **brought)


@pytest.mark.parametrize(
    ("seeded", "who"),
    [("true", "read by the rank itself between steps"), ("false", "read by 2 threads of the rank")],
)
def test_what_cannot_be_sent_is_read_in_the_process(seeded: str, who: str) -> None:
    """By the rank itself where samples are seeded, by threads where they are not: it is said."""
    chosen = CONFIG.replace("workers = 0", "workers = 2").replace('"x"', '"ids"')
    chosen = chosen.replace('target = "y"', 'target = "score"')
    text = f'train = "helpers.user_data:Locked"\nglobal_batch_size = 5\nseed_samples = {seeded}'
    found, mistakes = validate(parse(chosen + text, "c.toml"))
    assert found is not None, mistakes
    data = open_data(found, world_of_one("test"), semantics_of(found), None)
    assert who in data.notes[0]
    assert "cannot pickle '_thread.lock' object" in data.notes[0]
    rows = [name for each in data.train_loader.epoch(0, 0) for name in each.fields["name"]]
    assert sorted(rows) == sorted(f"text {index}" for index in range(23))
    data.close()


class Drawing(TensorDataset):
    """Augments by a generator that it has made, as one inside its transform does."""

    def __init__(self) -> None:
        super().__init__(torch.rand(9, 2), torch.rand(9, 1))
        self.transform = SimpleNamespace(steps=[SimpleNamespace(rng=np.random.default_rng(0))])
        self.random = random.Random(1)


def test_generators_that_a_dataset_holds_are_named() -> None:
    def notes(made_by: str, seeded: str = "true") -> str:
        train = f'train = "unit.training.data.test_user_data:{made_by}"'
        data = opened(f"{train}\nglobal_batch_size = 5\nseed_samples = {seeded}")
        data.close()
        return "\n".join(data.notes)

    assert "Drawing holds generators of its own, transform.steps.0.rng, random," in notes("Drawing")
    assert "generators of its own" not in notes("Drawing", "false")
    assert "generators of its own" not in notes("make")


def test_ranks_with_other_datasets_are_told() -> None:
    facts = [["Subset of 9 samples", "sample 0 aa"], ["Subset of 9 samples", "sample 0 bb"]]
    with pytest.raises(DatasetError, match=r"m:f is not the same on all ranks: sample 0 bb on"):
        _require_equal("m:f", facts)
    _require_equal("m:f", [facts[0], facts[0]])
