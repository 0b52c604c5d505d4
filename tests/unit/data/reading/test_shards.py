"""Reading rows: by offset and through HDF5, over shards, and what can go wrong."""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpctrain.data import open_dataset
from hpctrain.data.reading import handles
from hpctrain.data.reading.shards import ShardReader
from hpctrain.errors import DatasetError

VALUES = np.arange(60).reshape(20, 3)
SHARDS = ((0, 7), (7, 9), (9, 20))


def write(folder: Path, dtype: str = "i4", **options: object) -> None:
    for start, stop in SHARDS:
        with h5py.File(folder / f"{start:02}.h5", "w") as file:
            file.create_dataset("x", data=VALUES[start:stop].astype(dtype), **options)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def read(reader: ShardReader, runs: list[tuple[int, int]]) -> np.ndarray:
    """Read runs of (row, count), one after the other."""
    field = reader.dataset.fields["x"]
    rows, counts = np.array(runs).T
    out = np.full((counts.sum(), field.row_bytes), 0xAA, np.uint8)
    reader.read_runs("x", rows, counts, out, np.cumsum(counts) - counts)
    return out.view(field.dtype.newbyteorder("=")).reshape(-1, *field.shape)


@pytest.mark.parametrize("dtype", ["i4", "<f8", ">f4", ">i2", "u1", "f2", ">c8", "bool"])
@pytest.mark.parametrize(
    "options",
    [{}, {"chunks": (2, 2)}, {"chunks": (2, 3), "compression": "gzip", "shuffle": True}],
    ids=["contiguous", "chunked", "gzip"],
)
def test_rows_of_any_shard(tmp_path: Path, dtype: str, options: dict[str, object]) -> None:
    write(tmp_path, dtype, **options)
    reader = ShardReader(open_dataset(str(tmp_path)))
    runs = [(0, 20), (19, 1), (6, 4), (7, 2), (0, 7), (9, 11)]
    expected = np.concatenate([VALUES[row : row + count] for row, count in runs])
    assert (read(reader, runs) == expected.astype(np.dtype(dtype).newbyteorder("="))).all()
    assert reader.files_opened == 3
    reader.close()
    assert (read(reader, [(3, 2)]) == VALUES[3:5].astype(dtype)).all()
    reader.close()


def test_runs_go_to_their_places(tmp_path: Path) -> None:
    write(tmp_path)
    reader = ShardReader(open_dataset(str(tmp_path)))
    out = np.zeros((5, 12), np.uint8)
    reader.read_runs("x", np.array([6, 0]), np.array([2, 1]), out, np.array([3, 1]))
    assert out.view("i4").tolist() == [[0, 0, 0], [0, 1, 2], [0, 0, 0], [18, 19, 20], [21, 22, 23]]
    reader.close()


def test_contiguous_data_never_meet_hdf5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    dataset = open_dataset(str(tmp_path))
    monkeypatch.setattr(handles.h5py, "File", type("NoFile", (), {"close": None}))
    reader = ShardReader(dataset)
    assert (read(reader, [(0, 20)]) == VALUES).all()
    reader.close()


@pytest.mark.parametrize("options", [{}, {"chunks": (2, 2)}], ids=["contiguous", "chunked"])
def test_open_files_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    write(tmp_path, **options)
    monkeypatch.setattr(handles, "MOST_OPEN_FILES", 2)
    reader = ShardReader(open_dataset(str(tmp_path)))
    before = open_descriptors()
    for row in (0, 7, 0, 9, 0, 7):
        assert (read(reader, [(row, 1)]) == VALUES[row]).all()
    # Longest unused were 07 when 09 came, and 09 when 07 came again.
    assert reader.files_opened == 4
    assert open_descriptors() <= before + 2
    reader.close()
    assert open_descriptors() == before


def test_the_system_bounds_open_files_too(tmp_path: Path) -> None:
    write(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, hard))
    try:
        assert handles.most_open_files() == 100
        assert ShardReader(open_dataset(str(tmp_path)))._files.shards.most == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_dropped_reader_closes_its_files(tmp_path: Path) -> None:
    write(tmp_path)
    dataset = open_dataset(str(tmp_path))
    gc.collect()  # what others have left would go in between
    before = open_descriptors()
    reader = ShardReader(dataset)
    read(reader, [(0, 20)])
    assert open_descriptors() == before + 3
    del reader
    gc.collect()
    assert open_descriptors() == before


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: original(fd, [into[0][:5]], at))
    reader = ShardReader(open_dataset(str(tmp_path)))
    assert (read(reader, [(0, 20), (5, 3)]) == VALUES[[*range(20), 5, 6, 7]]).all()
    reader.close()


def test_file_that_ends_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is right when it is opened, and not any more when it is read."""
    write(tmp_path)
    dataset = open_dataset(str(tmp_path))
    reader = ShardReader(dataset)
    read(reader, [(9, 1)])
    offset = dataset.shards[2].layouts["x"].offset
    assert offset is not None
    os.truncate(tmp_path / "09.h5", offset + 4 * 12 + 5)
    with pytest.raises(DatasetError, match=r'09\.h5: field "x", row 4: .*it was truncated'):
        read(reader, [(0, 20)])
    reader.close()


@pytest.mark.parametrize("options", [{}, {"chunks": (2, 2)}], ids=["contiguous", "chunked"])
def test_file_that_is_gone_or_changed(tmp_path: Path, options: dict[str, object]) -> None:
    write(tmp_path, **options)
    reader = ShardReader(open_dataset(str(tmp_path)))
    (tmp_path / "07.h5").unlink()
    with pytest.raises(DatasetError, match=r'07\.h5: field "x", row 0: No such file'):
        read(reader, [(0, 20)])
    reader.close()
    with (tmp_path / "09.h5").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DatasetError, match=r"09\.h5: \d+ bytes, but \d+ when .* was opened"):
        read(reader, [(9, 1)])
    reader.close()


def test_read_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    reader = ShardReader(open_dataset(str(tmp_path)))
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(DatasetError, match=r'09\.h5: field "x", row 2: Input/output error'):
        read(reader, [(11, 2)])
    reader.close()


def test_damaged_chunk(tmp_path: Path) -> None:
    write(tmp_path, chunks=(2, 3), maxshape=(None, 3), compression="gzip")
    path = tmp_path / "09.h5"
    with h5py.File(path) as file:
        chunk = file["x"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + 8] = bytes(8)
    path.write_bytes(content)
    reader = ShardReader(open_dataset(str(tmp_path)))
    with pytest.raises(DatasetError, match=r'09\.h5: field "x", row 1: .*filter'):
        read(reader, [(10, 2)])
    reader.close()
