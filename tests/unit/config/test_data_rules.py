"""What a config says of torch Datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.config.toml import parse
from hpctrain.config.validate import load, validate
from hpctrain.config.writing import to_toml
from hpctrain.errors import ConfigError

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
max_steps = 1
[data]
"""


@pytest.fixture(autouse=True)
def _site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def make(): ...\nclass Module: ...\n", encoding="utf-8")


def problems(data: str) -> str:
    Path("c.toml").write_text(CONFIG + data, encoding="utf-8")
    try:
        load("c.toml")
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "data",
    [
        'train = "mine:make"',
        'train = "mine:make"\nvalidation = "mine:make"\nworkers = 0\nseed_samples = false',
        'train = "mine:make"\ntrain_arguments = { split = "train" }',
        'use = "mine:Module"\nbatch_size = 20\nglobal_batch_size = 20',
        'use = "mine:Module"\narguments = { train = 3 }',
    ],
)
def test_objects_in_place_of_files(data: str) -> None:
    assert problems(data) == ""
    config, _ = validate(parse(CONFIG + data, "c.toml"))
    assert config is not None
    assert validate(parse(to_toml(config), "again.toml")) == (config, [])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('train = "mine:mak"', "module 'mine' has no 'mak'; did you mean make?"),
        ('train = "mine:make"\ncache = "memory"', 'data.cache = "memory": is of files'),
        ('train = "mine:make"\nnormalize = { x = "stats" }', "is of files"),
        ('train = "mine:make"\nvalidation = "there"', "and so has data.validation to be"),
        ('use = "mine:Module"\ntrain = "mine:make"', "data.use makes the datasets"),
        ('use = "Module"', "expected an import path"),
        ('train = "."\nglobal_batch_size = 1\ntrain_arguments = { a = 1 }', "no import path in"),
        ('train = "."\nglobal_batch_size = 1\nworkers = 0', "0 is for torch Datasets"),
        ('train = "."', "data.global_batch_size: missing; expected a whole number from 1"),
        ("global_batch_size = 1", "data.train: missing; expected a string"),
        ('train = "mine:make"\nbatch_size = 3', "data.batch_size = 3: unknown key"),
    ],
)
def test_what_does_not_go_together(data: str, expected: str) -> None:
    assert expected in problems(data)
