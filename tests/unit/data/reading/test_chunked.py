"""Chunks read and decoded outside HDF5 hold what HDF5 reads from them."""

from __future__ import annotations

import logging
import re
import zlib
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest

from hpctrain.data import open_dataset
from hpctrain.data.reading import filters, handles, shards
from hpctrain.data.reading.chunk_index import ChunkedField
from hpctrain.data.reading.damage import UndecodableError
from hpctrain.data.reading.filter_libraries import zstd_frames
from hpctrain.data.reading.filters import Filter, Pipeline
from hpctrain.data.reading.shards import ShardReader
from hpctrain.data.reading.threads import Helpers, ThreadMemory
from hpctrain.errors import DatasetError

SHARDS = ((0, 37), (37, 40), (40, 101))
SHAPE = (6, 5)

FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "gzip": {"compression": "gzip"},
    "shuffle+gzip": {"compression": "gzip", "shuffle": True},
    "zstd": {"compression": hdf5plugin.Zstd(clevel=3)},
    "shuffle+zstd": {"compression": hdf5plugin.Zstd(), "shuffle": True},
    "lz4": {"compression": hdf5plugin.LZ4()},
    "bitshuffle": {"compression": hdf5plugin.Bitshuffle(cname="lz4")},
    "bitshuffle-zstd": {"compression": hdf5plugin.Bitshuffle(cname="zstd")},
    "blosc": {"compression": hdf5plugin.Blosc(cname="lz4")},
    "blosc2": {"compression": hdf5plugin.Blosc2(cname="zstd", clevel=5)},
    "lzf": {"compression": "lzf"},
    "fletcher32": {"fletcher32": True},
    "shuffle+gzip+fletcher32": {"compression": "gzip", "shuffle": True, "fletcher32": True},
    "scale-offset": {"scaleoffset": 0},
    "scale-offset+shuffle+lzf": {"scaleoffset": 0, "shuffle": True, "compression": "lzf"},
    "szip": {"compression": "szip"},
    "bzip2": {"compression": hdf5plugin.BZip2()},
}
SLOW: dict[str, tuple[dict[str, Any], str]] = {
    "sz3": ({"compression": hdf5plugin.SZ3(absolute=0.1)}, "chunked, .*SZ3.* in 000.h5"),
}


def values_of(dtype: str) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 100, (101, *SHAPE)).astype(dtype)


def write(folder: Path, dtype: str = "i4", chunks: Any = (8, *SHAPE), **options: Any) -> None:
    values = values_of(dtype)
    for start, stop in SHARDS:
        # Chunks may be larger than the data only where these may grow.
        keywords = {"chunks": chunks, "maxshape": (None,) * 3, **options}
        with h5py.File(folder / f"{start:03}.h5", "w") as file:
            file.create_dataset("x", data=values[start:stop], **keywords)


def read(reader: ShardReader, runs: list[tuple[int, int]]) -> np.ndarray[Any, Any]:
    field = reader.dataset.fields["x"]
    rows, counts = np.array(runs).T
    out = np.full((counts.sum(), field.row_bytes), 0xAA, np.uint8)
    reader.read_runs("x", rows, counts, out, np.cumsum(counts) - counts)
    return out.view(field.dtype.newbyteorder("=")).reshape(-1, *field.shape)


RUNS = [(0, 101), (100, 1), (35, 7), (3, 2), (4, 20), (40, 61), (7, 1), (8, 1)]


def of_runs(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([values[row : row + count] for row, count in RUNS])


@pytest.fixture
def no_hdf5_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("read through HDF5")

    monkeypatch.setattr(shards.ShardReader, "_read_by_hdf5", refuse)


@pytest.mark.usefixtures("no_hdf5_reads")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_every_filter(tmp_path: Path, options: dict[str, Any], threads: int) -> None:
    write(tmp_path, **options)
    dataset = open_dataset(str(tmp_path))
    assert dataset.slow_fields() == {}
    reader = ShardReader(dataset, helpers=Helpers(threads))
    assert (read(reader, RUNS) == of_runs(values_of("i4"))).all()
    assert reader.files_opened == len(SHARDS)
    reader.close()


@pytest.mark.usefixtures("no_hdf5_reads")
@pytest.mark.parametrize("library", ["zlib", "isal"])
def test_gzip_by_either_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    pytest.importorskip(library)
    inflate = filters.inflate if library == "zlib" else filters.inflate_by_isal
    monkeypatch.setattr(filters, "best_inflater", lambda: inflate)
    write(tmp_path, compression="gzip")
    reader = ShardReader(open_dataset(str(tmp_path)))
    assert (read(reader, [(0, 101)]) == values_of("i4")).all()
    reader.close()
    whole = np.frombuffer(zlib.compress(b"abc" * 1000), np.uint8)
    pipeline = Pipeline([Filter(1, (), "gzip")], 3000)
    for damaged in (whole[:-3], whole[:-1], np.roll(whole, 1), whole[:0]):
        with pytest.raises(UndecodableError):
            pipeline.decode(damaged, [len(damaged)], [0], ThreadMemory())


@pytest.mark.usefixtures("no_hdf5_reads")
@pytest.mark.parametrize("dtype", ["u1", "bool", "f2", ">i2", "i4", "<f8", ">f4", ">c16"])
@pytest.mark.parametrize("chunks", [(8, *SHAPE), (3, 4, 2), (1, 6, 3), (200, 7, 9)])
@pytest.mark.parametrize("options", [{}, {"compression": "gzip", "shuffle": True}], ids=str)
def test_every_shape_of_chunks_and_number(
    tmp_path: Path, dtype: str, chunks: tuple[int, ...], options: dict[str, Any]
) -> None:
    write(tmp_path, dtype, chunks, **options)
    reader = ShardReader(open_dataset(str(tmp_path)), helpers=Helpers(2))
    native = values_of(np.dtype(dtype).newbyteorder("=").str)
    assert (read(reader, RUNS) == of_runs(native)).all()
    reader.close()


@pytest.mark.parametrize(("options", "reason"), SLOW.values(), ids=SLOW)
def test_what_only_hdf5_reads(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    write(tmp_path, **options)
    dataset = open_dataset(str(tmp_path))
    assert re.fullmatch(reason, dataset.slow_fields()["x"])
    reader = ShardReader(dataset)
    assert (read(reader, [(30, 50)]) == values_of("i4")[30:80]).all()
    reader.close()


def test_what_turns_out_slow_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, compression="gzip")
    monkeypatch.setattr("hpctrain.data.reading.chunk_index.MOST_CHUNKS", 3)
    reader = ShardReader(open_dataset(str(tmp_path)))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert (read(reader, RUNS[:1]) == values_of("i4")).all()
    told = f'field "x" is read through HDF5, which is slower: {tmp_path}/000.h5: in 5 chunks'
    assert [record.getMessage() for record in caplog.records] == [told + "; `data repack` helps"]
    reader.close()


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}], ids=["chunked", "gzip"])
def test_chunks_that_were_never_written(tmp_path: Path, options: dict[str, Any]) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset(
            "x", (20, *SHAPE), "i4", chunks=(4, *SHAPE), fillvalue=7, **options
        )
        data[5:9] = 1
    reader = ShardReader(open_dataset(str(tmp_path)))
    values = read(reader, [(0, 20)])
    assert (values[5:9] == 1).all()
    assert (values[:5] == 7).all()
    assert (values[9:] == 7).all()
    reader.close()


def test_chunks_that_skipped_a_filter(tmp_path: Path) -> None:
    values = values_of("i4")[:8]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset(
            "x", values.shape, "i4", chunks=(4, *SHAPE), shuffle=True, compression="gzip"
        )
        data[:4] = values[:4]
        data.id.write_direct_chunk((4, 0, 0), values[4:].tobytes(), filter_mask=0b11)
    reader = ShardReader(open_dataset(str(tmp_path)))
    assert (read(reader, [(0, 8)]) == values).all()
    reader.close()


def test_file_with_a_user_block(tmp_path: Path) -> None:
    values = values_of("i4")
    for name, options in {"a": {}, "b": {"chunks": (4, *SHAPE), "compression": "gzip"}}.items():
        (tmp_path / name).mkdir()
        with h5py.File(tmp_path / name / "a.h5", "w", userblock_size=512) as file:
            file.create_dataset("x", data=values, **options)
        reader = ShardReader(open_dataset(str(tmp_path / name)))
        assert (read(reader, [(0, 101)]) == values).all()
        reader.close()


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_damage_is_named_or_harmless(tmp_path: Path, options: dict[str, Any]) -> None:
    """Compressed bytes are overwritten: an error that names the place, or what HDF5 reads too."""
    write(tmp_path, **options)
    path = tmp_path / "040.h5"
    with h5py.File(path) as file:
        info = file["x"].id.get_chunk_info(2)
    content = bytearray(path.read_bytes())
    content[info.byte_offset : info.byte_offset + info.size] = b"\xff" * info.size
    path.write_bytes(content)
    reader = ShardReader(open_dataset(str(tmp_path)), helpers=Helpers(2))
    values = None
    try:
        values = read(reader, [(0, 101)])
    except DatasetError as error:
        assert str(error).startswith(f'{path}: field "x", row ')  # noqa: PT017 - either is right
    if values is not None:
        with h5py.File(path) as file:
            assert (values[40:] == file["x"][:]).all()
    assert (read(reader, [(0, 40)]) == values_of("i4")[:40]).all()
    reader.close()


def test_truncated_chunks(tmp_path: Path) -> None:
    write(tmp_path, compression="gzip")
    reader = ShardReader(open_dataset(str(tmp_path)))
    read(reader, [(40, 1)])
    path = tmp_path / "040.h5"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 3000)
    with pytest.raises(DatasetError, match=r"040\.h5"):
        read(reader, [(40, 61)])
    reader.close()


@pytest.mark.usefixtures("no_hdf5_reads")
def test_one_open_and_one_undoing_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows one by one, as small windows ask for them, still decode a chunk once for all."""
    write(tmp_path, compression="gzip")
    opened: list[object] = []
    decoded: list[int] = []
    open_, decode = handles.open_hdf5, Pipeline.decode

    def counted(self: Pipeline, raw: Any, sizes: list[int], skipped: list[int], memory: Any) -> Any:
        decoded.extend(sizes)
        return decode(self, raw, sizes, skipped, memory)

    monkeypatch.setattr(handles, "open_hdf5", lambda *a: opened.append(a) or open_(*a))
    monkeypatch.setattr(Pipeline, "decode", counted)
    reader = ShardReader(open_dataset(str(tmp_path)))
    order = np.random.default_rng(1).permutation(101).tolist()
    assert (read(reader, [(row, 1) for row in order]) == values_of("i4")[order]).all()
    assert len(opened) == len(SHARDS)
    assert len(decoded) == sum(-(-(stop - start) // 8) for start, stop in SHARDS)
    reader.close()


@pytest.mark.usefixtures("no_hdf5_reads")
@pytest.mark.parametrize("chunks", [(8, *SHAPE), (8, 3, 5)], ids=["whole rows", "parts of rows"])
@pytest.mark.parametrize("name", ["none", "gzip", "shuffle+zstd"])
def test_chunks_in_any_order_in_the_file(
    tmp_path: Path, name: str, chunks: tuple[int, ...]
) -> None:
    values = values_of("i4")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("x", values.shape, "i4", chunks=chunks, **FILTERS[name])
        for first in (16, 24, 96, 0, 8, 88, 32, 80, 40, 48, 72, 56, 64):
            data[first : first + 8] = values[first : first + 8]
    reader = ShardReader(open_dataset(str(tmp_path)), helpers=Helpers(2))
    assert (read(reader, RUNS) == of_runs(values)).all()
    reader.close()


@pytest.mark.usefixtures("no_hdf5_reads")
@pytest.mark.parametrize("name", ["zstd", "shuffle+zstd"])
def test_neighbours_of_zstd_are_decoded_in_one_go_or_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write(tmp_path, **FILTERS[name])
    decoded: list[int] = []
    frames = zstd_frames()
    assert frames is not None
    decode = frames.decode
    monkeypatch.setattr(frames, "decode", lambda *a: decoded.append(len(a[1])) or decode(*a))

    def one_by_one(*_: object) -> None:
        raise UndecodableError("not one frame a chunk")

    for decode_frames, calls in (
        (Pipeline._decode_frames, [5, 1, 8]),
        (one_by_one, [960] * 14),
    ):
        monkeypatch.setattr(Pipeline, "_decode_frames", decode_frames)
        reader = ShardReader(open_dataset(str(tmp_path)))
        assert (read(reader, [(0, 101)]) == values_of("i4")).all()
        reader.close()
        assert decoded == calls
        decoded.clear()


def test_few_bytes_that_become_many_are_decoded_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a thread decodes at once is counted in decoded bytes: zeros take no room in a file."""
    write(tmp_path, compression="gzip")
    with h5py.File(tmp_path / "040.h5") as file:
        field = ChunkedField(file["x"])
    chunk_bytes = 8 * 6 * 5 * 4
    monkeypatch.setattr("hpctrain.data.reading.chunk_index.DECODED_BYTES", 3 * chunk_bytes)
    groups = field.groups(np.array([0, 9, 10, 33, 60]))
    assert [group.chunks.tolist() for group in groups] == [[0, 1, 4], [7]]
    assert [len(group.extents) for group in groups] == [2, 1]
    assert [field.rows_of(group) for group in groups] == [(0, 40), (56, 64)]


def test_unknown_filters_are_refused() -> None:
    with pytest.raises(UndecodableError, match=r"filter 32013 \(zfp\) is decoded by HDF5 alone"):
        Pipeline([Filter(32013, (), "zfp")], 100)


def test_no_threads_are_left(tmp_path: Path) -> None:
    import threading

    before = set(threading.enumerate())
    write(tmp_path, compression="gzip")
    reader = ShardReader(open_dataset(str(tmp_path)), helpers=Helpers(3))
    read(reader, RUNS)
    reader.close()
    assert not set(threading.enumerate()) - before
