"""Variable-length HDF5 datasets: delivered as h5py reads them, and read without it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.loaders import evaluation_loader, train_loader
from PIL import Image

from hpctrain.config.schema_data import DataSection, FieldTable
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.images import Decoded, ImagePreparation
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.order.order import Order
from hpctrain.data.reading.heaps import HeapReader
from hpctrain.data.view import View
from hpctrain.errors import DatasetError

DRAW = np.random.default_rng(3)
ORDERS: list[dict[str, Any]] = [
    {"lanes": 4, "window": 2, "block_rows": 3},
    {"lanes": 8, "window": 4, "block_rows": 1},
]
LENGTHS = (0, 1, 7, 300, 0, 2, 40_000, 3, 5, 0, 11, 64, 1, 9, 30_000, 2)
"""Some are larger than a collection of the heap, and many share one."""


def rows_of(dtype: Any, lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    if np.dtype(dtype).kind == "b":
        return [DRAW.integers(0, 2, length).astype(bool) for length in lengths]
    return [DRAW.integers(0, 100, length).astype(dtype) for length in lengths]


def write(path: Path, kind: str, dtype: Any, **stored: Any) -> None:
    """Write a file as its kind of user would."""
    rows, others = rows_of(dtype), rows_of("f8", LENGTHS[::-1])
    library: dict[str, Any] = {"latest": {"libver": "latest"}, "block": {"userblock_size": 512}}
    with h5py.File(path, "w", **library.get(kind, {})) as file:
        file["odd"] = np.zeros(13, np.uint8)  # what follows begins anywhere
        shape = {"shape": (len(rows),), "maxshape": (None,)} if stored else {"shape": (len(rows),)}
        jets = file.create_dataset(
            "jets", dtype=h5py.vlen_dtype(np.dtype(dtype)), **shape, **stored
        )
        other = file.create_dataset("other", (len(rows),), h5py.vlen_dtype("f8"))
        for row in DRAW.permutation(len(rows)):
            other[row] = others[row]  # between those of the first
            if len(rows[row]) or kind != "sparse":
                jets[row] = rows[row]
        for row in (2, 5, 6):
            jets[row] = rows[row][: len(rows[row]) // 2]  # the places of the old are free then
        texts = file.create_dataset("text", (len(rows),), h5py.string_dtype())
        texts[:] = ["", "a", "Größe", *["molecule " * number for number in range(len(rows) - 3)]]
        file["label"] = np.arange(len(rows), dtype=np.int32)


KINDS: dict[str, dict[str, Any]] = {
    "contiguous": {"dtype": "u2"},
    "sparse": {"dtype": ">f4"},
    "latest": {"dtype": "i8", "chunks": (5,)},
    "gzip": {"dtype": "f4", "chunks": (5,), "compression": "gzip", "shuffle": True},
    "bool": {"dtype": "?", "chunks": (3,), "compression": "lzf"},
    "complex": {"dtype": "c8"},
    "block": {"dtype": "u1"},
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(str(request.param))
    for name in ("a", "b"):
        write(path / f"{name}.h5", request.param, **KINDS[request.param])
    return path


def stored_in(folder: Path, name: str) -> list[np.ndarray]:
    rows: list[np.ndarray] = []
    for path in sorted(folder.iterdir()):
        with h5py.File(path) as file:
            rows += list(file[name][()])
    if name == "jets" and folder.name.startswith("sparse"):
        # h5py hands on the bytes of the file, and calls them native.
        return [row.view(">f4").astype("f4") for row in rows]
    return [np.frombuffer(row, np.uint8) if isinstance(row, bytes) else row for row in rows]


def opened(folder: Path, **tables: dict[str, Any]) -> Dataset:
    fields = {name: FieldTable(**table) for name, table in tables.items()}
    section = DataSection(train=str(folder / "*.h5"), global_batch_size=6, fields=fields)
    return open_datasets(section, list(fields))[0]


def require_rows(fields: dict[str, torch.Tensor], name: str, rows: list[np.ndarray]) -> None:
    values, offsets = fields[name].numpy(), fields[f"{name}.offsets"].tolist()
    assert len(offsets) == len(rows) + 1
    for first, stop, row in zip(offsets[:-1], offsets[1:], rows, strict=True):
        assert values.dtype == row.dtype.newbyteorder("=")
        np.testing.assert_array_equal(values[first:stop], row)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("kind", ORDERS)
def test_rows_of_variable_length(folder: Path, kind: dict[str, Any], world_size: int) -> None:
    """Of every number format, layout and writer, what h5py reads; texts as their bytes."""
    names = ("jets", "other", "text")
    dataset = opened(folder, **{name: {"batch": "concat"} for name in names}, label={})
    rows = {name: stored_in(folder, name) for name in names}
    seen: list[int] = []
    for rank in range(world_size):
        loader = train_loader(
            dataset,
            Order(samples=dataset.samples, seed=1, **kind),
            fields=[*names, "label"],
            global_batch_size=6,
            rank=rank,
            world_size=world_size,
        )
        for batch in loader.epoch(0):
            own = loader.rows(0, batch.start, batch.start + batch.global_size).tolist()
            for name in names:
                require_rows(batch.fields, name, [rows[name][row] for row in own])
            assert batch.fields["label"].tolist() == [row % len(LENGTHS) for row in own]
            seen += own
        loader.close()
    assert sorted(seen) == list(range(2 * len(LENGTHS)))


def test_rows_are_read_without_hdf5(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But those of files that begin with something else."""
    if folder.name.startswith("block"):
        pytest.skip("HDF5 reads files with a user block")
    monkeypatch.setattr(HeapReader, "_read_by_hdf5", None)
    dataset = opened(folder, jets={"batch": "pad", "max_length": 5, "mask": "there"})
    rows = stored_in(folder, "jets")
    loader = evaluation_loader(dataset, fields=["jets"], batch_size=7)
    for _ in range(2):
        start = 0
        for batch in loader:
            fields = batch.fields
            for number in range(batch.size):
                row = rows[start + number][:5]
                assert fields["there"][number].sum() == len(row)
                np.testing.assert_array_equal(fields["jets"][number, : len(row)], row)
            start += batch.size
        assert start == len(rows)
    assert loader._delivery.access.files_opened == 2
    loader.close()


def test_documents_of_variable_length_are_one_stream(folder: Path) -> None:
    dataset = opened(folder, jets={"batch": "pack", "max_length": 100, "sample": "document"})
    rows = stored_in(folder, "jets")
    stream = np.concatenate(rows)
    owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    loader = evaluation_loader(dataset, fields=["jets"], batch_size=64)
    got = [(batch.fields["jets"], batch.fields["document"]) for batch in loader]
    loader.close()
    tokens, documents = (torch.cat(each).numpy() for each in zip(*got, strict=True))
    assert len(tokens) == len(stream) // 100
    np.testing.assert_array_equal(tokens.ravel(), stream[: tokens.size])
    changes = owners[: tokens.size].reshape(tokens.shape)
    np.testing.assert_array_equal(np.diff(documents, axis=1) > 0, np.diff(changes, axis=1) > 0)


def test_images_of_variable_length(tmp_path: Path) -> None:
    """As ALOHA and others keep camera images: JPEG bytes in rows of variable length."""
    images = [Image.fromarray(DRAW.integers(0, 255, (20 + i, 30, 3), "u1")) for i in range(5)]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        camera = file.create_dataset("cam", (5,), h5py.vlen_dtype("u1"))
        for number, image in enumerate(images):
            content = io.BytesIO()
            image.save(content, "PNG")
            camera[number] = np.frombuffer(content.getvalue(), "u1")
    dataset = opened(tmp_path, cam={"image": (16, 12)})
    assert isinstance(dataset, View)
    made = {"cam": Decoded(rows=16, columns=12)}
    preparation = ImagePreparation(dataset, made, 1, training=False)
    loader = evaluation_loader(dataset, fields=["cam"], batch_size=5, preparation=preparation)
    (batch,) = loader
    expected = np.zeros((3, 16, 12), np.uint8)
    content = io.BytesIO()
    images[3].save(content, "PNG")
    made["cam"].decode(np.frombuffer(content.getvalue(), "u1"), expected, 0, training=False)
    np.testing.assert_array_equal(batch.fields["cam"][3], expected)
    loader.close()


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path, "contiguous", "u2")
    with h5py.File(path) as file:
        place = file["jets"].id.get_offset() + 3 * 16
    whole = bytearray(path.read_bytes())
    heap = int.from_bytes(whole[place + 52 : place + 60], "little")

    for at, content, match in (
        (place, b"\xff\xff\xff\x7f", r"row 3: it is said to have 2,147,483,647 values"),
        (place + 10, b"\x7f", r"row 3: it is said to have 300 values, at byte"),
        (heap, b"LOCG", "global heap"),
        (place + 12, b"\xf0\x7f", r"row 3: its values are not where"),
    ):
        path.write_bytes(whole[:at] + content + whole[at + len(content) :])
        with pytest.raises(DatasetError, match=rf'a\.h5: field "jets".*{match}'):
            read_all(tmp_path)
    path.write_bytes(whole)
    dataset = opened(tmp_path, jets={"batch": "concat"})
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"a\.h5: .* bytes, but .* when the dataset was opened"):
        read_all(tmp_path, dataset)


def read_all(folder: Path, dataset: Dataset | None = None) -> None:
    dataset = dataset or opened(folder, jets={"batch": "concat"})
    loader = evaluation_loader(dataset, fields=["jets"], batch_size=16)
    try:
        list(loader)
    finally:
        loader.close()


def test_what_is_no_sequence_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["plain"] = np.zeros(4)
        file.create_dataset("grid", (4, 2), h5py.vlen_dtype("u1"))
        file.create_dataset("empty", (4,), h5py.vlen_dtype("u1"))
        file.create_dataset("nested", (4,), h5py.vlen_dtype(h5py.string_dtype()))
    for name, match in {
        "plain": "nothing says where samples begin",
        "grid": r"of shape \(4, 2\)",
        "empty": "has no values in any row",
        "nested": "sequences can be of numbers",
        "absent": 'there is no field "absent"',
    }.items():
        with pytest.raises(DatasetError, match=match):
            opened(tmp_path, **{name: {"batch": "pad"}})
    with pytest.raises(DatasetError, match="leave dtype, squeeze, select and classes out"):
        opened(tmp_path, empty={"batch": "pad", "dtype": "float32"})
