"""What is found in HDF5 files, and what is said where something is wrong with them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest

from hpctrain.data.dataset import Field
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.reading.rows import open_rows, read_rows
from hpctrain.errors import DatasetError


def write(path: Path, **arrays: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name.replace("__", "/")] = array
    return path


def test_fields_and_offsets_of_plain_files(tmp_path: Path) -> None:
    first = np.arange(24, dtype=">i2").reshape(4, 2, 3)
    write(tmp_path / "a.h5", group__x=first, y=np.arange(4.0))
    write(tmp_path / "b.h5", group__x=first[:1], y=np.arange(1.0))
    dataset = open_dataset(str(tmp_path / "*.h5"), ["group/x", "y"])
    assert dataset.samples == 5
    assert dataset.fields["group/x"] == Field((2, 3), np.dtype(">i2"))
    assert dataset.bytes_per_sample == 20
    assert [shard.name for shard in dataset.shards] == ["a.h5", "b.h5"]
    content = (tmp_path / "a.h5").read_bytes()
    offset = dataset.shards[0].layouts["group/x"].offset
    assert offset is not None
    assert content[offset : offset + first.nbytes] == first.tobytes()
    again = pickle.loads(pickle.dumps(dataset))
    assert (again, again.fingerprint) == (dataset, dataset.fingerprint)


@pytest.mark.parametrize("pattern", ["", "a.h5", "*.h5", "**/a.h5"])
def test_folder_file_and_patterns(tmp_path: Path, pattern: str) -> None:
    write(tmp_path / "a.h5", x=np.zeros(3))
    (tmp_path / ".hidden.h5").write_text("not yet")
    (tmp_path / "notes.txt").write_text("not HDF5")
    assert open_dataset(str(tmp_path / pattern)).samples == 3


def test_offsets_respect_a_user_block(tmp_path: Path) -> None:
    values = np.arange(10, dtype="<u4")
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=1024) as file:
        file["x"] = values
    shard = open_dataset(str(tmp_path)).shards[0]
    offset = shard.layouts["x"].offset
    assert offset is not None
    assert (tmp_path / "a.h5").read_bytes()[offset : offset + 40] == values.tobytes()


def test_what_only_hdf5_can_read_is_told(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("chunked", data=np.zeros((8, 2)), chunks=(4, 2))
        file.create_dataset("gzip", data=np.zeros(8), chunks=(2,), compression="gzip")
        exact = hdf5plugin.Zfp(reversible=True)
        file.create_dataset("zfp", data=np.zeros(8), chunks=(2,), compression=exact)
        file.create_dataset("empty", (8,), "f4")
        file.create_dataset("odd", (8,), h5py.h5t.NATIVE_INT32)
        odd = h5py.h5t.NATIVE_INT32.copy()
        odd.set_precision(24)
        space = h5py.h5s.create_simple((8,))
        identifier = h5py.h5d.create(file.id, b"precision", odd, space)
        h5py.Dataset(identifier)[...] = np.arange(8, dtype="i4")
    dataset = open_dataset(str(tmp_path))
    reasons = dataset.slow_fields()
    assert reasons["zfp"].startswith("chunked, H5Z-ZFP")
    assert not {"chunked", "gzip"} & reasons.keys()
    assert reasons["empty"].startswith("without storage")
    assert reasons["precision"].startswith("in a number format")
    assert dataset.chunk_rows == 4


def test_virtual_dataset_with_a_missing_source(tmp_path: Path) -> None:
    write(tmp_path / "source.hdf", x=np.arange(4))
    layout = h5py.VirtualLayout((4,), "i8")
    layout[:] = h5py.VirtualSource("source.hdf", "x", (4,))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    assert "virtual" in open_dataset(str(tmp_path)).slow_fields()["x"]
    for damage, what in (
        (
            lambda path: write(path, x=np.arange(3)),
            r'has a "x" of shape \(3,\), which is not 4 val',
        ),
        (lambda path: write(path, y=np.arange(4)), 'has no "x"'),
        (lambda path: path.write_bytes(b"no HDF5"), r"cannot be read \(.*\)"),
        (Path.unlink, "is missing"),
    ):
        damage(tmp_path / "source.hdf")
        message = rf'a\.h5: field "/x" is virtual, and its source source\.hdf {what}'
        with pytest.raises(DatasetError, match=message):
            open_dataset(str(tmp_path))


def test_virtual_dataset_with_a_source_that_is_too_short(tmp_path: Path) -> None:
    write(tmp_path / "source.hdf", x=np.arange(9))
    layout = h5py.VirtualLayout((4,), "i8")
    source = h5py.VirtualSource("source.hdf", "x", (9,))
    layout[:2], layout[2:] = source[1:3], source[5:9:2]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    assert open_dataset(str(tmp_path)).shards[0].sources == (str(tmp_path / "source.hdf"),)
    write(tmp_path / "source.hdf", x=np.arange(7))  # its row 7 is wanted
    with pytest.raises(DatasetError, match=r'has a "x" of shape \(7,\), not \(8,\)'):
        open_dataset(str(tmp_path))


def test_fingerprint(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", x=np.zeros(3), y=np.zeros(3))
    whole = open_dataset(str(tmp_path))
    assert whole.fingerprint == open_dataset(str(tmp_path / "a.h5"), ["x"]).fingerprint
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "a.h5").rename(moved / "a.h5")
    assert open_dataset(str(moved)).fingerprint == whole.fingerprint
    write(moved / "b.h5", x=np.zeros(3), y=np.zeros(3))
    assert open_dataset(str(moved)).fingerprint != whole.fingerprint


@pytest.mark.parametrize(
    ("arrays", "fields", "message"),
    [
        (
            {"image": np.zeros(3)},
            ["imag"],
            r'no field "imag"\. Did you mean "image"\? It has: image',
        ),
        ({"x": np.zeros(3)}, ["label"], r'no field "label"\. It has: x$'),
        ({"x": np.zeros(3), "y": np.zeros(4)}, None, r"different numbers of rows: x 3, y 4"),
        ({"x": np.zeros((0, 3))}, ["x"], r'field "x" has no rows'),
        ({"x": np.zeros((3, 0))}, ["x"], r'field "x" has rows of shape \(0,\), without values'),
        ({"x": np.array([b"ab", b"cd"])}, ["x"], r'field "x" has dtype \|S2'),
        ({"x": np.zeros(3, "i4,f8")}, ["x"], r'field "x" has dtype .*cannot become a tensor'),
        ({"x": np.array(1.0)}, None, r"there is no HDF5 dataset with rows"),
        ({}, ["x"], r"there is no HDF5 dataset with rows"),
    ],
)
def test_bad_file(
    tmp_path: Path, arrays: dict[str, np.ndarray], fields: list[str] | None, message: str
) -> None:
    path = write(tmp_path / "a.h5", **arrays)
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(str(path), fields)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"x": np.zeros((3, 2), "f8")},
            r'b\.h5: field "x" is float64 .* but float32 .* in .*a\.h5',
        ),
        ({"x": np.zeros((3, 3), "f4")}, r"of shape \(3,\), but .* of shape \(2,\)"),
        ({"y": np.zeros((3, 2), "f4")}, r'b\.h5: there is no field "x"'),
    ],
)
def test_files_that_do_not_fit_together(
    tmp_path: Path, second: dict[str, np.ndarray], message: str
) -> None:
    write(tmp_path / "a.h5", x=np.zeros((3, 2), "f4"))
    write(tmp_path / "b.h5", **second)
    with pytest.raises(DatasetError, match=message):
        open_dataset(str(tmp_path), ["x"])


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no HDF5 files in this folder \(\*\.h5"):
        open_dataset(str(tmp_path))
    with pytest.raises(DatasetError, match="no file has such a name"):
        open_dataset(str(tmp_path / "*.h5"))


@pytest.mark.parametrize("content", [b"", b"no HDF5", b"\x89HDF\r\n\x1a\n" + bytes(40)])
def test_not_hdf5(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.h5: HDF5 cannot read this file"):
        open_dataset(str(tmp_path))


def test_truncated_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", x=np.zeros(1000))
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DatasetError, match=r"a\.h5: HDF5 cannot read this file.*truncated"):
        open_dataset(str(path))


def test_files_and_groups_without_rows_are_left_out_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of several, such as that of a day without events; all of them are an error."""
    for number, rows in enumerate([2, 0, 1]):
        write(tmp_path / f"{number}.h5", x=np.full((rows, 3), number), y=np.zeros(rows))
    write(tmp_path / "3.h5")
    for _ in range(2):
        dataset = open_dataset(str(tmp_path / "*.h5"), ["x", "y"])
        assert [shard.samples for shard in dataset.shards] == [2, 1]
    (said,) = [each.getMessage() for each in caplog.records]
    assert said.endswith(f"2 without rows, left out: {tmp_path / '1.h5'}, {tmp_path / '3.h5'}")

    write(tmp_path / "of_groups.hdf", e0__x=np.ones((2, 3)), e1__x=np.ones((0, 3)))
    groups = open_dataset(str(tmp_path / "of_groups.hdf"), ["e*/x"])
    assert [shard.group for shard in groups.shards] == ["e0"]
    assert caplog.records[-1].getMessage().endswith("of_groups.hdf:e1")

    write(tmp_path / "mixed.hdf", x=np.ones((0, 3)), y=np.ones(2))
    for pattern, problem in (("[13].h5", "no HDF5 dataset with rows"), ("mixed.hdf", "no rows")):
        with pytest.raises(DatasetError, match=problem):
            open_dataset(str(tmp_path / pattern), ["x", "y"])


APPENDS = """
import h5py, numpy as np, sys
file = h5py.File(sys.argv[1], "w", libver="latest")
x = file.create_dataset("x", data=np.arange(33).reshape(11, 3), maxshape=(None, 3), chunks=(4, 3),
    compression="gzip")
if sys.argv[2] == "swmr":
    file.swmr_mode = True
file.flush()
print("written", flush=True)
sys.stdin.readline()
x.resize((50, 3))
x[11:] = -1
file.flush()
print("appended", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("mode", ["swmr", "plain"])
def test_a_file_that_a_program_appends_to(tmp_path: Path, mode: str) -> None:
    """In SWMR mode the rows that were there are read, also when there are more; else refused."""
    path, way = tmp_path / "a.h5", subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", APPENDS, path, mode], stdin=way, stdout=way, text=True
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        if mode == "plain":
            with pytest.raises(DatasetError, match=r"has it open for writing.*h5clear -s"):
                open_dataset(str(path))
            writer.kill()
            return
        dataset = open_dataset(str(path))
        rows = np.arange(11)
        with closing(open_rows(dataset)) as reader:
            for said in ("", "appended\n"):
                if said:
                    writer.stdin.write("\n")
                    writer.stdin.flush()
                    assert writer.stdout.readline() == said
                    reader.close()
                out = np.zeros((11, 24), np.uint8)
                reader.read_runs("x", np.zeros(1, int), np.full(1, 11), out, np.zeros(1, int))
                assert np.array_equal(out.view(int), np.arange(33).reshape(11, 3))
                assert np.array_equal(read_rows(dataset, rows)["x"], np.arange(33).reshape(11, 3))
        assert open_dataset(str(path)).samples == 50
        writer.kill()
