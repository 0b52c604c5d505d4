"""Chunks that become other than their shape and dtype say: an error, and never their memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.filter_chains import CHAINS, properties_of

from hpctrain.convert.sources.opening import Reading, open_source
from hpctrain.data import open_dataset
from hpctrain.data.reading.other_axis import OtherAxisReader
from hpctrain.data.reading.rows import read_rows
from hpctrain.data.view import Part
from hpctrain.errors import DatasetError

ROWS, WIDTH = 4, 1024
LARGE = 2**21
"""Values of a chunk that is too large: 16 MB. It takes a few KB in a file."""
SPARE_BYTES = 8 * 2**20
SOUND = "scale-offset"
"""Its chunks say nothing of their size: HDF5 takes that from the dataset."""


def chunk_of(path: Path, chain: str, values: int) -> bytes:
    """Return what a chunk of so many zeros is in a file."""
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((values,))
        made = h5py.h5d.create(
            file.id, b"x", h5py.h5t.STD_I64LE, space, properties_of(chain, (values,))
        )
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.zeros(values, np.int64))
        file.flush()
        _, content = made.read_direct_chunk((0,))
    path.unlink()
    return bytes(content)


def write(path: Path, chain: str, chunk: bytes) -> None:
    """Write rows of which the third is another chunk than it is to be."""
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((ROWS, WIDTH))
        made = h5py.h5d.create(
            file.id, b"x", h5py.h5t.STD_I64LE, space, properties_of(chain, (1, WIDTH))
        )
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ones((ROWS, WIDTH), np.int64))
        made.write_direct_chunk((2, 0), chunk)


def peak_bytes() -> int:
    """Return the most memory that this process has had since it was last reset."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@contextmanager
def few_bytes() -> Iterator[None]:
    """Check that the body takes little memory, whatever comes of it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = peak_bytes()
    try:
        yield
    finally:
        assert peak_bytes() - before < SPARE_BYTES


def read_bounded(path: Path) -> dict[str, Any]:
    """Return all rows, if that takes little memory whatever comes of it."""
    dataset = open_dataset(str(path))
    with suppress(DatasetError):
        read_rows(dataset, np.arange(2))  # what is loaded once
    with few_bytes():
        return read_rows(dataset, np.arange(ROWS))


def read_columns(path: Path) -> None:
    """Read samples along the second axis, if that takes little memory whatever comes of it."""
    dataset = open_dataset(str(path), ["x"], axis=1)
    out = np.zeros((2, dataset.fields["x"].row_bytes), np.uint8)
    with closing(OtherAxisReader(Part(dataset, 1))) as reader, few_bytes():
        reader.read_runs("x", np.array([5]), np.array([2]), out, np.array([0]))


@pytest.mark.parametrize("chain", sorted(CHAINS.keys() - {SOUND, "shuffle", "bitshuffle"}))
def test_chunks_of_other_sizes(tmp_path: Path, chain: str) -> None:
    path = tmp_path / "a.h5"
    for values in (LARGE, WIDTH + 8, WIDTH - 8):
        write(path, chain, chunk_of(tmp_path / "chunk.h5", chain, values))
        with pytest.raises(DatasetError) as caught:
            read_bounded(path)
        place = f'{path}: field "x", row 2: a chunk of the rows up to 2 is damaged: it '
        assert str(caught.value).startswith(place)
        with pytest.raises(DatasetError, match=r'"x", row 5: a chunk .* is damaged: it '):
            read_columns(path)


@pytest.mark.parametrize("chain", ["shuffle", "bitshuffle", SOUND, "fletcher32"])
def test_chunks_that_are_too_large_in_the_file(tmp_path: Path, chain: str) -> None:
    path = tmp_path / "a.h5"
    write(path, chain, bytes(8 * LARGE))
    with pytest.raises(DatasetError, match=r'field "x", row 2: a chunk .* is damaged: it is 16,'):
        read_bounded(path)


def test_a_large_chunk_beside_one_that_was_never_written(tmp_path: Path) -> None:
    """HDF5 reads such rows, but only once the chunks that are there are known to be sound."""
    path = tmp_path / "a.h5"
    chunk = chunk_of(tmp_path / "chunk.h5", "gzip", LARGE)
    with h5py.File(path, "w") as file:
        made = file.create_dataset(
            "x", (ROWS, 2 * WIDTH), "i8", chunks=(1, WIDTH), compression="gzip", fillvalue=7
        )
        made[0] = 1
        made[1:3, :WIDTH] = 2
    content = read_rows(open_dataset(str(path)), np.arange(ROWS))["x"]
    assert content.reshape(-1, WIDTH)[:, 0].tolist() == [1, 1, 2, 7, 2, 7, 7, 7]
    with h5py.File(path, "r+") as file:
        file["x"].id.write_direct_chunk((2, 0), chunk)
    with pytest.raises(DatasetError, match=r'field "x", row 2: a chunk .* is damaged: it'):
        read_bounded(path)


@pytest.mark.parametrize("chain", ["zstd", "shuffle+zstd"])
def test_two_chunks_that_make_up_for_each_other(tmp_path: Path, chain: str) -> None:
    """Neighbours are undone in one call: their sum is right, and neither of them."""
    path = tmp_path / "a.h5"
    write(path, chain, b"0")
    sizes = (WIDTH + 8, WIDTH - 8, WIDTH, WIDTH)
    with h5py.File(path, "r+") as file:
        for row, size in enumerate(sizes):
            chunk = chunk_of(tmp_path / "chunk.h5", chain, size)
            file["x"].id.write_direct_chunk((row, 0), chunk)
    with pytest.raises(DatasetError, match=r'field "x", row 0: a chunk .* is damaged: it becom'):
        read_rows(open_dataset(str(path)), np.arange(ROWS))


def test_a_filter_whose_values_ask_for_more(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path, SOUND, chunk_of(tmp_path / "chunk.h5", SOUND, WIDTH))
    assert read_rows(open_dataset(str(path)), np.arange(ROWS))["x"][:, 0].tolist() == [1, 1, 0, 1]
    content = path.read_bytes()
    values = np.array([2, 0, WIDTH, 0, 8], "<u4").tobytes()
    assert content.count(values) == 1
    damaged = np.array([2, 0, LARGE, 0, 8], "<u4").tobytes()
    path.write_bytes(content.replace(values, damaged))
    with pytest.raises(DatasetError, match=r'field "x", row 0: .* it asks for 16,777,216 bytes'):
        read_bounded(path)


@pytest.mark.parametrize("way", ["user block", "many chunks", "numbers to convert"])
def test_what_hdf5_reads_is_checked_before(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "many chunks":
        monkeypatch.setattr("hpctrain.data.reading.chunk_index.MOST_CHUNKS", 2)
    kind = h5py.h5t.STD_I64LE.copy()
    if way == "numbers to convert":
        kind.set_precision(48)
    path = tmp_path / "a.h5"
    chunk = chunk_of(tmp_path / "chunk.h5", "gzip", LARGE)
    with h5py.File(path, "w", userblock_size=512 if way == "user block" else 0) as file:
        space = h5py.h5s.create_simple((ROWS, WIDTH))
        made = h5py.h5d.create(file.id, b"x", kind, space, properties_of("gzip", (1, WIDTH)))
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ones((ROWS, WIDTH), np.int64))
    assert (read_rows(open_dataset(str(path)), np.arange(ROWS))["x"] == 1).all()
    with h5py.File(path, "r+") as file:
        file["x"].id.write_direct_chunk((2, 0), chunk)
    with pytest.raises(DatasetError, match=r'field "x", row \d: a chunk .* is damaged: it becomes'):
        read_bounded(path)


def test_what_is_packed_is_checked_before(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path, "shuffle+gzip", chunk_of(tmp_path / "chunk.h5", "shuffle+gzip", WIDTH))
    source = open_source([f"x={path}:x"], Reading())
    assert source.read(np.arange(ROWS))["x"][:, 0].tolist() == [1, 1, 0, 1]
    source.close()
    write(path, "shuffle+gzip", chunk_of(tmp_path / "chunk.h5", "shuffle+gzip", LARGE))
    source = open_source([f"x={path}:x"], Reading())
    with few_bytes(), pytest.raises(DatasetError, match=r'"x", row 0: this file .*: it becomes mo'):
        source.read(np.arange(ROWS))
    source.close()
