"""Images packed as their files are: byte by byte, and trained on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.loaders import evaluation_loader
from PIL import Image

from hpctrain.cli import main
from hpctrain.config.schema_data import DataSection, FieldTable
from hpctrain.convert import pack as packing
from hpctrain.convert.pack import Packing, pack
from hpctrain.convert.sources.opening import Reading, open_source
from hpctrain.data import Storage, open_dataset
from hpctrain.data.loading.images import Decoded, ImagePreparation
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.view import View
from hpctrain.errors import DatasetError
from hpctrain.launch.communicators import SingleCommunicator

DRAW = np.random.default_rng(0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos of two animals, of any size, as cameras and screens save them."""
    for number in range(11):
        folder = tmp_path / "photos" / ("dog" if number % 2 else "cat")
        folder.mkdir(parents=True, exist_ok=True)
        small = DRAW.integers(0, 255, (7 + number, 20 - number, 3), "u1")
        kind = "png" if number % 3 == 0 else "jpg"
        Image.fromarray(small).resize((40 + number, 30)).save(folder / f"{number}.{kind}")
    return tmp_path / "photos"


def pack_encoded(source: Path | str, folder: Path, **options: Any) -> str:
    reading = Reading(encoded=True)
    return pack(
        lambda: open_source([str(source)], reading),
        folder,
        Packing(**options),
        SingleCommunicator(),
    )


def packed(folder: Path) -> list[tuple[bytes, int]]:
    """Return bytes and label of every sample, as h5py reads them."""
    found = []
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            stops = np.cumsum(file["image_counts"][()])
            each = np.split(file["image"][()], stops[:-1])
            found += zip([one.tobytes() for one in each], file["label"][()].tolist(), strict=True)
    return found


def files_in(photos: Path) -> list[tuple[bytes, int]]:
    names = [*(f"cat/{i}" for i in range(0, 11, 2)), *(f"dog/{i}" for i in range(1, 11, 2))]
    paths = [next(photos.glob(f"{name}.*")) for name in names]
    return [(path.read_bytes(), int(path.parent.name == "dog")) for path in paths]


@pytest.mark.parametrize("storage", ["none", "gzip"])
def test_bytes_are_those_of_the_files(photos: Path, tmp_path: Path, storage: str) -> None:
    stored = {"shard_rows": 4, "storage": Storage.parse(storage)}
    assert pack_encoded(photos, tmp_path / "out", **stored).endswith("11 samples in 3 shards")
    assert packed(tmp_path / "out") == files_in(photos)
    with h5py.File(tmp_path / "out" / "shard-000000.h5") as file:
        assert json.loads(file["label"].attrs["classes"]) == ["cat", "dog"]
    parts = {"splits": {"train": 0.7, "validation": 0.3}, "shuffle": True, "shard_bytes": 4000}
    pack_encoded(photos, tmp_path / "parts", **parts)
    train, validation = (packed(tmp_path / "parts" / name) for name in parts["splits"])
    assert len(train) == 8
    assert sorted([*train, *validation]) == sorted(files_in(photos))
    assert len(list((tmp_path / "parts" / "train").glob("*.h5"))) > 1


def test_a_run_decodes_what_was_packed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the line that packing ends with, and to what Pillow makes of the files."""
    out = tmp_path / "out"
    assert main(["data", "pack", str(photos), str(out), "--encoded", "--shard-rows", "4"]) == 0
    line = 'image = {counts = "image_counts", image = [224, 224]}'
    assert line in capsys.readouterr().out
    table = FieldTable(counts="image_counts", image=(12, 10))
    section = DataSection(train=str(out), global_batch_size=4, fields={"image": table})
    for has_index in (True, False):
        if not has_index:
            (out / "index.json").unlink()
        dataset = open_datasets(section, ["image", "label"])[0]
        assert isinstance(dataset, View)
        how = {"image": Decoded(rows=12, columns=10, crop="none")}
        loader = evaluation_loader(
            dataset,
            fields=["image", "label"],
            batch_size=4,
            preparation=ImagePreparation(dataset, how, 2, training=False),
        )
        seen = 0
        files = files_in(photos)
        for batch in loader:
            images, labels = batch.fields["image"].numpy(), batch.fields["label"].tolist()
            for pixels, label in zip(images, labels, strict=True):
                content, expected = files[seen]
                image = Image.open(io.BytesIO(content)).convert("RGB")
                scaled = image.resize((10, 12), Image.Resampling.BILINEAR)
                np.testing.assert_array_equal(pixels, np.asarray(scaled).transpose(2, 0, 1))
                assert label == expected
                seen += 1
        loader.close()
        assert seen == len(files)


def test_interrupted_and_resumed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_encoded(photos, tmp_path / "whole", shard_rows=3)
    original, made = packing.write_shard, 0

    def write(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_shard", write)
        with pytest.raises(KeyboardInterrupt):
            pack_encoded(photos, tmp_path / "out", shard_rows=3)
    damaged = tmp_path / "out" / "shard-000001.h5"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert "(1 of them were there)" in pack_encoded(photos, tmp_path / "out", shard_rows=3)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert "packed already" in pack_encoded(photos, tmp_path / "out", shard_rows=3)


def test_files_without_classes(photos: Path, tmp_path: Path) -> None:
    for number, source in enumerate([photos / "cat", photos / "cat" / "*"]):
        pack_encoded(source, tmp_path / f"{number}")
        assert list(open_dataset(str(tmp_path / f"{number}")).fields) == ["image_counts"]
        with h5py.File(tmp_path / f"{number}" / "shard-000000.h5") as file:
            assert file["image"][()].tobytes() == b"".join(
                content for content, label in files_in(photos) if not label
            )


def test_what_is_no_image_is_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cat" / "3.jpg").write_bytes(b"not an image")
    with pytest.raises(DatasetError, match=r"cat/3\.jpg: this file cannot be read"):
        pack_encoded(photos, tmp_path / "bad")
    (photos / "cat" / "3.jpg").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"cat/3\.jpg: this file cannot be read"):
        pack_encoded(photos, tmp_path / "empty")
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(DatasetError, match=r"x\.npy: --encoded packs files of images"):
        pack_encoded(tmp_path / "x.npy", tmp_path / "other")
    with pytest.raises(DatasetError, match="one folder, or one pattern of files, of images"):
        pack_encoded(f"image={photos}", tmp_path / "named")
    for options in (["--size", "8x8"], ["--grey"], ["--tokens", "9"], ["--dtype", "label=uint8"]):
        code = main(["data", "pack", str(photos), str(tmp_path / "o"), "--encoded", *options])
        assert code == 64
        assert "--encoded keeps files of images as they are" in capsys.readouterr().err
