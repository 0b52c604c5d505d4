"""Encoded images decoded beside the training: the pixels are Pillow's."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.loaders import evaluation_loader, train_loader
from PIL import Image

from hpctrain.config.schema_data import DataSection, FieldTable
from hpctrain.data.loading import images
from hpctrain.data.loading.batch import Batch
from hpctrain.data.loading.images import Decoded, ImagePreparation
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.order.order import Order, sample_keys
from hpctrain.data.view import View
from hpctrain.errors import DatasetError

DRAW = np.random.default_rng(0)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    small = DRAW.integers(0, 255, (height // 4 + 1, width // 4 + 1, 3), "u1")
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, kind)
    return np.frombuffer(file.getvalue(), np.uint8)


def decoded(how: Decoded, content: np.ndarray, key: int = 0, training: bool = False) -> np.ndarray:
    out = np.zeros(how.field.shape, np.uint8)
    how.decode(content, out, key, training=training)
    return out


@pytest.mark.parametrize("library", ["simplejpeg", "Pillow"])
@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
    ],
)
def test_pixels_are_those_of_pillow(
    monkeypatch: pytest.MonkeyPatch, library: str, mode: str, kind: str
) -> None:
    if library == "Pillow":
        monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    content = encoded(picture(61, 47, mode), kind)
    whole = Image.open(io.BytesIO(content)).convert("RGB")
    same = decoded(Decoded(rows=47, columns=61, crop="none"), content)
    np.testing.assert_array_equal(same, np.asarray(whole).transpose(2, 0, 1))
    scaled = decoded(Decoded(rows=8, columns=9, crop="none"), content)
    expected = whole.resize((9, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(scaled, np.asarray(expected).transpose(2, 0, 1))
    middle = decoded(Decoded(rows=14, columns=14), content)
    box = ((61 - 41.125) / 2, (47 - 41.125) / 2, (61 + 41.125) / 2, (47 + 41.125) / 2)
    expected = whole.resize((14, 14), Image.Resampling.BILINEAR, box)
    np.testing.assert_array_equal(middle, np.asarray(expected).transpose(2, 0, 1))
    grey = decoded(Decoded(rows=8, columns=9, crop="none", grey=True), content)
    expected = whole.resize((9, 8), Image.Resampling.BILINEAR).convert("L")
    np.testing.assert_array_equal(grey[0], np.asarray(expected))


def test_crops_belong_to_samples() -> None:
    how = Decoded(rows=16, columns=16, crop="random")
    content = encoded(picture(80, 60), "JPEG")
    first = decoded(how, content, 7, training=True)
    np.testing.assert_array_equal(first, decoded(how, content, 7, training=True))
    assert (first != decoded(how, content, 8, training=True)).any()
    center = decoded(Decoded(rows=16, columns=16), content)
    np.testing.assert_array_equal(decoded(how, content, 7), center)  # in an evaluation
    areas = []
    for key in range(200):
        left, top, right, bottom = how.box(80, 60, key, training=True)
        assert 0 <= left < right <= 80
        assert 0 <= top < bottom <= 60
        areas.append((right - left) * (bottom - top) / 4800)
    assert 0.07 < min(areas) < 0.2
    assert 0.85 < max(areas) <= 1
    # One that is too narrow for any of them.
    left, top, right, bottom = how.box(1000, 3, 0, training=True)
    assert (right - left, bottom - top) == (3, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write what a tool packs: bytes of files one after the other, offsets, and labels."""
    path = tmp_path_factory.mktemp("images")
    number = 0
    for name, count in (("a", 9), ("b", 14)):
        files = []
        for _ in range(count):
            kind = "PNG" if number % 3 == 0 else "JPEG"
            files.append(encoded(picture(30 + number, 50 - number), kind))
            number += 1
        with h5py.File(path / f"{name}.h5", "w") as file:
            file["image"] = np.concatenate(files)
            file["image_offsets"] = np.cumsum([0, *map(len, files)])
            file["label"] = np.arange(number - count, number)
    return path


def section(folder: Path, **table: Any) -> DataSection:
    fields = {"image": FieldTable(offsets="image_offsets", image=(12, 10), **table)}
    return DataSection(train=str(folder / "*.h5"), global_batch_size=6, fields=fields)


def files_of(folder: Path) -> list[np.ndarray]:
    files: list[np.ndarray] = []
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            files += np.split(file["image"][()], file["image_offsets"][1:-1])
    return files


ORDERS = {
    "rows": {"lanes": 8, "window": 4, "block_rows": 1},
    "windows": {"lanes": 4, "window": 2, "block_rows": 3},
}


@pytest.mark.parametrize("kind", ORDERS)
def test_batches_hold_the_same_pixels_at_any_world_size(folder: Path, kind: str) -> None:
    """And from any position on, drawn crops included."""
    files, how = files_of(folder), Decoded(rows=12, columns=10, crop="random")
    dataset = open_datasets(section(folder, crop="random"), ["image", "label"])[0]
    assert isinstance(dataset, View)
    order = Order(samples=23, seed=3, **ORDERS[kind])
    keys = sample_keys(3, 1, np.arange(23))
    for world_size, start in ((1, 0), (2, 0), (3, 8)):
        seen = []
        for rank in range(world_size):
            loader = train_loader(
                dataset,
                order,
                fields=["image", "label"],
                global_batch_size=8,
                rank=rank,
                world_size=world_size,
                preparation=ImagePreparation(dataset, {"image": how}, 2, training=True),
            )
            for batch in loader.epoch(1, start):
                assert isinstance(batch, Batch)
                labels = batch.fields["label"].tolist()
                for label, pixels in zip(labels, batch.fields["image"].numpy(), strict=True):
                    expected = decoded(how, files[label], int(keys[label]), training=True)
                    np.testing.assert_array_equal(pixels, expected)
                    seen.append(label)
            assert loader.example(2)["image"].shape == (2, 3, 12, 10)
            assert "image" in loader.examples(2).part(0, 2)
            loader.close()
        assert len(seen) == len(set(seen)) == 23 - start


def test_an_evaluation_looks_at_the_middle(folder: Path) -> None:
    files, how = files_of(folder), Decoded(rows=12, columns=10, crop="random")
    dataset = open_datasets(section(folder, crop="random"), ["image", "label"])[0]
    assert isinstance(dataset, View)
    loader = evaluation_loader(
        dataset,
        fields=["image", "label"],
        batch_size=5,
        preparation=ImagePreparation(dataset, {"image": how}, 1, training=False),
    )
    row = 0
    for batch in loader:
        for pixels in batch.fields["image"].numpy():
            np.testing.assert_array_equal(pixels, decoded(how, files[row]))
            row += 1
    loader.close()
    assert row == 23


def test_damaged_images_are_named(tmp_path: Path) -> None:
    good = encoded(picture(20, 20), "JPEG")
    bomb = bytearray(encoded(picture(8, 8), "PNG").tobytes())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    for name, wrong in {
        "cut": good[: len(good) // 2],
        "empty": good[:0],
        "text": np.frombuffer(b"not an image", np.uint8),
        "bomb": np.frombuffer(bytes(bomb), np.uint8),
    }.items():
        files = [good, wrong, good]
        (tmp_path / name).mkdir()
        with h5py.File(tmp_path / name / "x.h5", "w") as file:
            file["image"] = np.concatenate(files)
            file["image_offsets"] = np.cumsum([0, *map(len, files)])
        dataset = open_datasets(section(tmp_path / name), ["image"])[0]
        assert isinstance(dataset, View)
        how = {"image": Decoded(rows=4, columns=4)}
        loader = evaluation_loader(
            dataset,
            fields=["image"],
            batch_size=3,
            preparation=ImagePreparation(dataset, how, 2, training=False),
        )
        with pytest.raises(DatasetError, match=r'x\.h5: field "image", row 1: this image cannot'):
            list(loader)
        loader.close()
