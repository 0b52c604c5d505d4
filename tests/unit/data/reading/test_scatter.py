"""Rows that are read to places of their own: every layout, every reader, and what can go wrong."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpctrain.data import open_dataset
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.prefetch import BufferPool, new_bytes
from hpctrain.data.reading import scatter as scattering
from hpctrain.data.reading.rows import open_rows
from hpctrain.data.reading.scatter import Destinations
from hpctrain.data.reading.threads import Helpers
from hpctrain.errors import DatasetError

SHARDS = ((0, 17), (17, 20), (20, 60))
LAYOUTS = {
    "contiguous": {},
    "chunked": {"chunks": (3, 300)},
    "parts of rows": {"chunks": (3, 128)},
    "gzip": {"chunks": (3, 300), "compression": "gzip", "shuffle": True},
    "gzip of parts": {"chunks": (3, 128), "compression": "gzip"},
    "through HDF5": {"chunks": (3, 300), "compression": "gzip", "userblock_size": 512},
}
"""Rows of 300 numbers: 1,200 bytes as float32, which go straight to their place, 600 as int16."""


def values(dtype: str) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, (60, 300)).astype(dtype)


def write(folder: Path, dtype: str, options: dict[str, object]) -> Dataset:
    own = {"userblock_size": options.get("userblock_size", 0)}
    keywords = {key: value for key, value in options.items() if key not in own}
    for start, stop in SHARDS:
        with h5py.File(folder / f"{start:02}.h5", "w", **own) as file:
            file.create_dataset("x", data=values(dtype)[start:stop], **keywords)
    return open_dataset(str(folder))


def scatter(
    dataset: Dataset,
    runs: list[tuple[int, int]],
    places: np.ndarray,
    buffers: list[np.ndarray],
    threads: int = 1,
) -> None:
    rows, counts = np.array(runs).T
    sizes = np.array([len(buffer) for buffer in buffers])
    into = Destinations(buffers, np.cumsum(sizes) - sizes)
    with closing(open_rows(dataset, retries=0, helpers=Helpers(threads))) as reader:
        reader.scatter_runs("x", rows, counts, into, places)


def separate(row_bytes: int) -> list[np.ndarray]:
    return [np.zeros((size, row_bytes), np.uint8) for size in (25, 5, 40)]


def of_one_pool(row_bytes: int, dataset: Dataset) -> list[np.ndarray]:
    pool = BufferPool(dataset.fields, 30, 2, new_bytes)
    return [pool.take(size)["x"] for size in (25, 5, 30, 10)]  # the last two have their own memory


@pytest.mark.parametrize("dtype", ["f4", ">f4", "i2"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_row_goes_to_its_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    layout: str,
    pooled: bool,
    threads: int,
) -> None:
    monkeypatch.setattr("hpctrain.data.reading.contiguous.LEAST_SHARED_BYTES", 1)
    dataset = write(tmp_path, dtype, LAYOUTS[layout])
    row_bytes = dataset.fields["x"].row_bytes
    buffers = of_one_pool(row_bytes, dataset) if pooled else separate(row_bytes)
    runs = [(0, 10), (10, 9), (25, 30), (58, 2)]
    places = np.random.default_rng(1).permutation(70)[:51]
    places[[3, 20, 50]] = -1
    scatter(dataset, runs, places, buffers, threads)
    rows = np.concatenate([np.arange(first, first + count) for first, count in runs])
    native = values(dtype).astype(np.dtype(dtype).newbyteorder("="))
    expected = np.zeros((70, 300), native.dtype)
    expected[places[places >= 0]] = native[rows[places >= 0]]
    found = np.concatenate([buffer.view(native.dtype) for buffer in buffers])
    found[np.setdiff1d(np.arange(70), places)] = 0  # memory of a pool may hold anything
    assert (found == expected).all()


def test_long_rows_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write(tmp_path, "f4", {})
    monkeypatch.setattr(os, "preadv", None)
    monkeypatch.setattr(scattering, "Staged", None)
    buffer = np.zeros((60, 1200), np.uint8)
    scatter(dataset, [(0, 60)], np.arange(60)[::-1], [buffer])
    assert (buffer.view("f4") == values("f4")[::-1]).all()


def test_a_system_without_vectors_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write(tmp_path, "f4", {})
    monkeypatch.setattr(scattering, "can_read_vectors", lambda: False)
    buffer = np.zeros((60, 1200), np.uint8)
    scatter(dataset, [(0, 60)], np.arange(60)[::-1], [buffer])
    assert (buffer.view("f4") == values("f4")[::-1]).all()


def test_an_unreadable_row_is_named(tmp_path: Path) -> None:
    dataset = write(tmp_path, "f4", LAYOUTS["gzip"])
    path = tmp_path / "20.h5"
    size = path.stat().st_size
    os.truncate(path, size // 2)
    os.truncate(path, size)  # as large as it was, but without what it held
    buffer = np.ones((60, 1200), np.uint8)
    with pytest.raises(DatasetError, match=r'20\.h5: field "x", row'):
        scatter(dataset, [(20, 40)], np.arange(40), [buffer])


def test_a_short_file_is_named(tmp_path: Path) -> None:
    dataset = write(tmp_path, "f4", {})
    buffer = np.ones((60, 1200), np.uint8)
    rows, counts = np.array([[20], [40]])
    into = Destinations([buffer], np.array([0]))
    with closing(open_rows(dataset, retries=0)) as reader:
        reader.scatter_runs("x", rows, counts, into, np.arange(40))
        path = tmp_path / "20.h5"
        os.truncate(path, path.stat().st_size - 1300)
        with pytest.raises(DatasetError, match=r"20\.h5: this file was truncated from"):
            reader.scatter_runs("x", rows, counts, into, np.arange(40))
