"""Packing the digits that come with scikit-learn."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpctrain.convert.digits import pack_digits
from hpctrain.data import open_dataset
from hpctrain.errors import DatasetError


def test_digits_are_packed_once(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    assert "packed train 1438 samples in 8 shards" in pack_digits(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "are packed already: train 1438" in pack_digits(folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]

    labels, images = {}, {}
    for split in ("train", "validation"):
        dataset = open_dataset(str(folder / split))
        assert dataset.fields["image"].shape == (1, 8, 8)
        files = [h5py.File(shard.path) for shard in dataset.shards]
        labels[split] = np.concatenate([file["label"][...] for file in files])
        images[split] = np.concatenate([file["image"][...] for file in files])
        for file in files:
            file.close()
    counts = {split: np.bincount(each) for split, each in labels.items()}
    fractions = counts["validation"] / (counts["train"] + counts["validation"])
    assert (np.abs(fractions - 0.2) < 0.01).all()
    everything = np.concatenate(list(images.values()))
    assert (everything.min(), everything.max()) == (0.0, 1.0)
    assert len(np.unique(everything, axis=0)) == 1797

    again = tmp_path / "again"
    pack_digits(again)
    for path in folder.rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes()


def test_digits_notice_damage(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    pack_digits(folder)
    path = folder / "validation" / "shard-000001.h5"
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"shard-000001\.h5: the checksum .* Remove .*digits"):
        pack_digits(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(DatasetError, match=r"train: there is no dataset here, yet .* not empty"):
        pack_digits(tmp_path / "other")
    with pytest.raises(DatasetError, match=r"notes\.txt: Not a directory"):
        pack_digits(tmp_path / "other" / "notes.txt")


def test_digits_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DatasetError, match=r"pip install 'hpctrain\[digits\]'"):
        pack_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []
