"""What files say of sizes bounds nothing; what they call things is escaped where it is shown."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpctrain.cli import main
from hpctrain.convert.sources.opening import Reading, open_source
from hpctrain.data import Writer, open_dataset
from hpctrain.data.files import walking
from hpctrain.data.files.contents import datasets_with_rows
from hpctrain.data.files.index import sealed
from hpctrain.errors import DatasetError
from hpctrain.observe import log
from hpctrain.utils.text import table

EVIL = 'a\x1b[2Jb\nhpctrain: error: "fake"\r\u202ec'
SHOWN = r"a\x1b[2Jb\nhpctrain: error: \"fake\"\r\u202ec".replace(r"\"", '"')
LATE = h5py.h5d.ALLOC_TIME_LATE


def create(
    file: h5py.File, shape: tuple[int, ...], chunks: tuple[int, ...] | None, written: int = 0
) -> None:
    """Make a dataset of which nothing, or some of the first rows are ever written."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(LATE)
    if chunks is not None:
        properties.set_chunk(chunks)
        properties.set_deflate(1)
    space = h5py.h5s.create_simple(shape)
    made = h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, properties)
    if written:
        h5py.Dataset(made)[:written] = 1


CLAIMS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "rows": ((2**60,), None),
    "a row": ((4, 2**58), None),
    "rows in chunks": ((2**60, 4), (1024, 4)),
    "a row in chunks": ((4, 2**50), (1, 1024)),
    "axes": ((3, *(2**10,) * 4), (1, *(2**4,) * 4)),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_values_that_no_file_holds(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "a.h5")
    with h5py.File(path, "w") as file:
        create(file, *CLAIMS[name])
    for fields in (None, ["x"]):
        with pytest.raises(DatasetError, match=r'a\.h5: field "x" is said to have .* (stored|row)'):
            open_dataset(path, fields)
    for tool in ("verify", "stats", "index"):
        assert main(["data", tool, path if tool != "index" else str(tmp_path)]) == 65


def test_rows_that_no_memory_holds(tmp_path: Path) -> None:
    """A TB of fill values may be, but not in a few rows."""
    path = str(tmp_path / "a.h5")
    with h5py.File(path, "w") as file:
        create(file, (4, 2**36), (1, 2**20))
    with pytest.raises(DatasetError, match=r'a\.h5: field "x" is said to have 275 GB in a row'):
        open_dataset(path)


def test_tools_tell_that_memory_is_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "a.h5")
    with h5py.File(path, "w") as file:
        create(file, (4, 2**33), (1, 2**20))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**34, limits[1]))
    try:
        assert main(["data", "verify", path, "--jobs", "1"]) == 65
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "out of memory: Unable to allocate 32.0 GiB" in capsys.readouterr().err


def test_data_of_which_little_is_written(tmp_path: Path) -> None:
    """As long as they could be read: simulations lay out what they will write."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        create(file, (2**20, 64), (1024, 64), written=1024)
    assert open_dataset(str(tmp_path / "a.h5")).samples == 2**20


def test_rows_past_the_end_of_the_file(tmp_path: Path) -> None:
    """HDF5 looks at the file's length as the file itself has it."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(5, dtype="<i4")
    sizes = [(count).to_bytes(8, "little") for count in (5, 2**50)]
    path.write_bytes(path.read_bytes().replace(*sizes))
    with pytest.raises(DatasetError):
        open_dataset(str(path))


def change(document: dict[str, object], **values: object) -> None:
    document.update(values)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: change(d["fields"]["x"], shape=[2**50]),
        lambda d: change(d["fields"]["x"], shape=[2**31, 2**31, 2**31]),
        lambda d: (change(d, samples=2**60), change(d["shards"][0], samples=2**60)),
        lambda d: change(d["shards"][0], xxh3="../../../etc/passwd"),
        lambda d: change(d["shards"][0]["layouts"]["x"], chunk_rows=2**62),
    ],
)
def test_what_an_index_claims(tmp_path: Path, edit: Callable[[dict[str, object]], object]) -> None:
    """It has a checksum, which who writes one can make right."""
    folder = tmp_path / "data"
    folder.mkdir()
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("x", data=np.ones((8, 4), "f4"), chunks=(2, 4), compression="gzip")
    assert main(["data", "index", str(folder)]) == 0
    path = folder / "index.json"
    document = json.loads(path.read_bytes())
    document.pop("checksum")
    edit(document)
    path.write_bytes(sealed(document))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = main(["data", "verify", str(folder), "--jobs", "1"])
    assert code == 65
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_what_the_header_in_an_archive_claims(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    header = io.BytesIO()
    about = {"descr": "<f8", "fortran_order": False, "shape": (2**58,)}
    np.lib.format.write_array_header_1_0(header, about)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(80))
    with pytest.raises(DatasetError, match=r"a\.npz: 80 bytes of values in x\.npy, too few"):
        open_source([str(path)], Reading())


def test_files_of_very_many_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "MOST_OBJECTS", 1000)
    path = str(tmp_path / "a.h5")
    with h5py.File(path, "w", libver="latest") as file:
        file["wanted"] = np.arange(4)
        group = file.create_group("links")
        for number in range(1000):
            group[str(number)] = h5py.SoftLink("/wanted")
    assert open_dataset(path, ["wanted"]).samples == 4
    with pytest.raises(DatasetError, match=r"more than 1,000 objects.*name the fields"):
        open_dataset(path)
    with pytest.raises(DatasetError, match="more than 1,000 objects"):
        open_dataset(path, ["other"])


def test_groups_in_groups_without_an_end(tmp_path: Path) -> None:
    path = str(tmp_path / "a.h5")
    with h5py.File(path, "w", libver="latest") as file:
        group = file
        for _ in range(300):
            group = group.create_group("g")
        group["x"] = np.arange(4)
    with pytest.raises(DatasetError, match="nested more than 100 deep"):
        open_dataset(path)
    assert open_dataset(path, ["g/" * 300 + "x"]).samples == 4


def test_objects_are_found_as_hdf5_finds_them(tmp_path: Path) -> None:
    """In its order, each by its first path, whatever links and circles there are."""
    with h5py.File(tmp_path / "a.h5", "w", track_order=True) as file:
        for name in ("z", "b/deep/x", "b/y", "a", "B", "b.x", "b/a"):
            file[name] = np.arange(3)
        file["a first"] = file["z"]
        file["c"] = file["b"]
        file["b/loop"] = file["/"]
        file["kind"] = np.dtype("f4")
        file["scalar"] = 1
        file[b"\xff"] = np.arange(3)
        found: list[str] = []

        def note(name: str | bytes, item: object) -> None:
            if isinstance(name, str) and isinstance(item, h5py.Dataset) and item.ndim:
                found.append(name)

        file.visititems(note)
        assert list(datasets_with_rows(file)) == found


def test_attributes_that_are_too_large(tmp_path: Path) -> None:
    path = str(tmp_path / "a.h5")
    with h5py.File(path, "w", libver="latest") as file:
        made = file.create_dataset("x", data=np.arange(8, dtype="i4"))
        made.attrs["notes"] = np.zeros(2**20)
        made.attrs["units"] = "K" * 2**20
    assert main(["data", "info", path]) == 0
    with h5py.File(path, "r+") as file:
        file["x"].attrs["missing_value"] = np.arange(5000)
    assert main(["data", "verify", path]) == 65
    with h5py.File(path, "r+") as file:
        del file["x"].attrs["missing_value"]
        file["x"].attrs["scale_factor"] = np.zeros(2**20)
    assert main(["data", "verify", path]) == 65


def test_names_are_escaped_where_they_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / EVIL.replace("/", "")
    folder.mkdir()
    path = folder / "a.h5"
    with h5py.File(path, "w") as file:
        file[EVIL] = np.arange(8.0)
        file[EVIL].attrs[EVIL] = EVIL
        file[EVIL].attrs["_FillValue"] = EVIL
    assert main(["data", "info", str(path)]) == 0
    assert main(["data", "stats", str(path), "--out", str(tmp_path / "stats.json")]) == 0
    with h5py.File(path, "r+") as file:
        file[EVIL][3] = np.nan
    assert main(["data", "verify", str(path)]) == 65
    with h5py.File(path, "r+") as file:
        file[f"{EVIL}2"] = np.arange(9.0)
    assert main(["data", "info", str(path)]) == 0
    assert main(["data", "verify", str(path), "--fields", "other"]) == 65
    assert main(["data", "info", str(folder / EVIL)]) == 65
    told = capsys.readouterr()
    for text in (told.out, told.err):
        assert SHOWN in text
        assert all(line.isprintable() for line in text.splitlines())
        assert not any(line.startswith('hpctrain: error: "fake"') for line in text.splitlines())
    assert main(["data", "info", str(path), "--json", "--fields", EVIL]) == 0
    assert list(json.loads(capsys.readouterr().out)["fields"]) == [EVIL]


def test_errors_of_data_are_lines_that_can_be_printed() -> None:
    error = DatasetError(f"{EVIL}: problems", f"  {EVIL}", "  two")
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    for each in (error, again):
        assert str(each).split("\n") == [f"{SHOWN}: problems", f"  {SHOWN}", "  two"]
    assert table([[EVIL, "x"]]) == [f"{SHOWN}  x"]


def test_the_log_is_made_of_lines_that_can_be_printed(tmp_path: Path) -> None:
    with log.start(tmp_path, is_reporter=True):
        logging.getLogger("hpctrain.data").warning("%s", EVIL)
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.split("\n"))


def test_samples_that_cannot_be_put_in_an_order(tmp_path: Path) -> None:
    with Writer(tmp_path / "data") as out:
        out.extend({"x": np.arange(4, dtype="u1")})
    dataset = open_dataset(str(tmp_path / "data"))
    shard = dataclasses.replace(dataset.shards[0], samples=2**41)
    from hpctrain.data.files.discovery import fitted

    with pytest.raises(DatasetError, match="can be put in an order"):
        fitted("many", [(shard, dataset.fields)] * 3)
