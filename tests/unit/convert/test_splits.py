"""`data info` on a folder of splits: one table for all of them, and what differs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.made_files import numbers

from hpctrain.cli import main
from hpctrain.config.schema_data import DataSection, FieldTable
from hpctrain.data.dataset import Dataset
from hpctrain.data.opening.open_datasets import open_datasets

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def told_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """Return what `data info` says of a folder of splits, as text and as JSON."""
    assert main(["data", "info", str(folder)]) == 0
    text = capsys.readouterr().out
    assert main(["data", "info", str(folder), "--json"]) == 0
    return text, json.loads(capsys.readouterr().out)["joint"]


def trains_as_told(text: str, names: list[str]) -> tuple[Dataset, Dataset]:
    """Open both splits by the tables that are told."""
    lines = text.partition("train on these splits together")[2].splitlines()[1:]
    config = [line for line in lines if line.startswith("  ")]
    stop = next((i for i, line in enumerate(lines) if not line.startswith("  ")), len(lines))
    data = tomllib.loads("\n".join(config[:stop]))["data"]
    section = DataSection(
        train=data["train"],
        validation=data["validation"],
        global_batch_size=1,
        evaluations=data.get("evaluations", {}),
        fields={
            name: FieldTable(**{k: tuple(v) if isinstance(v, list) else v for k, v in keys.items()})
            for name, keys in data["fields"].items()
        },
    )
    train, validation = open_datasets(section, names)
    assert validation is not None
    return train, validation


def test_splits_get_one_table_and_their_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only one has, or has otherwise, is named, and trains in none of the tables."""
    animals = {"train": ["cat", "dog"], "validation": ["dog", "fox"], "test": ["cat", "dog"]}
    for name, known in animals.items():
        (tmp_path / name).mkdir()
        with h5py.File(tmp_path / name / "a.h5", "w") as file:
            file["x"] = numbers(12, 3)
            file["x"].attrs["units"] = "K" if name != "validation" else "degC"
            file["animal"] = np.array(known * 6, dtype=object)
            file["y"] = numbers(12, 2 if name == "test" else 4)
            if name == "train":
                file["extra"] = numbers(12)
    (tmp_path / "logs").mkdir()
    text, facts = told_of(tmp_path, capsys)
    assert facts["data"] == {key: f"{tmp_path}/{key}" for key in ("train", "validation")}
    assert facts["evaluations"] == {"test": f"{tmp_path}/test"}
    assert facts["fields"] == {
        "x": {"path": "x"},
        "animal": {"path": "animal", "classes": ["cat", "dog", "fox"]},
    }
    for said in (
        "validation does not have extra",
        "test does not have extra",
        'test: "y" is float32 of shape (2,), and float32 of shape (4,) in train',
        'validation: "animal" has classes that train lacks: fox',
        'validation: "animal" has none of these classes: cat',
        'validation: the units of "x" are degC, and K in train: the same number is another value',
    ):
        assert said in text
        assert said in "\n".join(facts["differences"])
    assert len(facts["differences"]) == 7  # "extra" is not a field of the others, either
    train, validation = trains_as_told(text, ["x", "animal"])
    assert (train.samples, validation.samples) == (12, 12)


def test_splits_of_packed_files_of_images_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image")
    for number in range(20):
        folder = tmp_path / "photos" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (30 + number, 20), (number, 0, 0)).save(folder / f"{number}.jpg")
    splits = "train=0.7,validation=0.3"
    pack = ["data", "pack", str(tmp_path / "photos"), str(tmp_path / "out"), "--encoded"]
    assert main([*pack, "--split", splits]) == 0
    text, facts = told_of(tmp_path / "out", capsys)
    assert facts["fields"] == {
        "image": {"path": "image", "counts": "image_counts", "image": [224, 224]},
        "label": {"path": "label"},
    }
    assert facts["differences"] == []
    assert "the splits hold the same fields" in text
    train, validation = trains_as_told(text, ["image", "label"])
    assert (train.samples, validation.samples) == (14, 6)

    # A split alone, too, tells what its index does not list.
    assert main(["data", "info", str(tmp_path / "out" / "train")]) == 0
    told = capsys.readouterr().out
    assert 'image = {path = "image", counts = "image_counts", image = [224, 224]}' in told

    # Classes are numbers in what is packed: packed apart, they may be other ones.
    (tmp_path / "out" / "validation").rename(tmp_path / "gone")
    (tmp_path / "photos" / "ant").mkdir()
    image.new("RGB", (9, 9)).save(tmp_path / "photos" / "ant" / "0.png")
    assert main([*pack[:3], str(tmp_path / "out" / "val"), "--encoded"]) == 0
    text, facts = told_of(tmp_path / "out", capsys)
    assert facts["data"]["validation"] == f"{tmp_path}/out/val"
    (said,) = facts["differences"]
    assert 'val: the classes of "label" are ["ant", "cat", "dog"], and ["cat", "dog"] in tr' in said


def test_splits_of_plain_shards_are_told_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", numbers(20, 3))
    pack = ["data", "pack", str(tmp_path / "x.npy"), str(tmp_path / "out"), "--split"]
    assert main([*pack, "train=0.5,validation=0.5"]) == 0
    text, facts = told_of(tmp_path / "out", capsys)
    assert facts["fields"] == {"x": {"path": "x"}}
    assert f"{tmp_path}/out/train: 10 samples in 1 shard" in text
    assert trains_as_told(text, ["x"])[1].samples == 10

    # Where no folder is called so that it would be for training, each is told alone.
    for name in ("train", "validation"):
        with h5py.File(tmp_path / "out" / name / "shard-000000.h5") as file:
            (tmp_path / "parts" / f"{name}-a").mkdir(parents=True)
            with h5py.File(tmp_path / "parts" / f"{name}-a" / "a.h5", "w") as other:
                other["x"] = file["x"][()]
    assert main(["data", "info", str(tmp_path / "parts")]) == 0
    assert capsys.readouterr().out.count("[data.fields]") == 2
