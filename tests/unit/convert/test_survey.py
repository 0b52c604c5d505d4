"""`data info` on files of other makers: nothing is refused, and what can train is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from h5py import h5d, h5s, h5t

from hpctrain.cli import main
from hpctrain.convert.survey import Item, survey
from hpctrain.data import open_dataset, walking
from hpctrain.errors import DatasetError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROWS = 6


def every_type(path: Path) -> None:
    """One array of each class of types that HDF5 has."""
    with h5py.File(path, "w") as file:
        file["number"] = np.arange(3 * ROWS, dtype=">f4").reshape(ROWS, 3)
        file["bool"] = np.zeros(ROWS, bool)
        file["complex"] = np.zeros(ROWS, "c8")
        file["text"] = np.array(["a"] * ROWS, dtype=object)
        file["letters"] = np.array([b"abc"] * ROWS)
        file["record"] = np.zeros(
            ROWS, [("pt", "f4"), ("hits", "i4", (2, 3)), ("n", [("x", "u1")])]
        )
        file.create_dataset("jets", (ROWS,), h5py.vlen_dtype("f4"))
        file.create_dataset("kind", (ROWS,), h5py.enum_dtype({"A": 1, "B": 2}, basetype="i2"))
        file["opaque"] = np.zeros(ROWS, "V7")
        file["date"] = np.zeros(ROWS, "M8[s]").astype(h5py.opaque_dtype("M8[s]"))
        file.create_dataset("object", (ROWS,), h5py.ref_dtype)
        file.create_dataset("region", (ROWS,), h5py.regionref_dtype)
        file.create_dataset("array", (ROWS,), "(2,3)f4")
        file.create_dataset("long", (ROWS,), "g")
        rows = h5s.create_simple((ROWS,))
        h5d.create(file.id, b"bits", h5t.STD_B16LE, rows)
        h5d.create(file.id, b"time", h5t.UNIX_D32LE, rows)
        h5d.create(file.id, b"caf\xe9", h5t.IEEE_F32LE, rows)
        file["one"], file["null"], file["none"] = 3.0, h5py.Empty("f4"), np.zeros((0, 3))
        file["link"], file["dead"] = h5py.SoftLink("/number"), h5py.SoftLink("/gone")
        file["far"] = h5py.ExternalLink("gone.h5", "/x")
        file["esc\x1b[31m"] = np.zeros(ROWS)


def era5(path: Path) -> None:
    """As the Climate Data Store delivers it: packed, with times, a scalar and a text."""
    with netCDF4.Dataset(path, "w") as file:
        for name, length in (("valid_time", 48), ("latitude", 9), ("longitude", 18), ("bnds", 2)):
            file.createDimension(name, length)
            if name != "bnds":
                file.createVariable(name, "f8", (name,))[:] = np.arange(length)
        file["valid_time"].setncatts({"units": "hours since 1990-1-1", "calendar": "standard"})
        field = file.createVariable(
            "t2m", "i2", ("valid_time", "latitude", "longitude"), fill_value=-32767
        )
        field.setncatts({"scale_factor": 0.01, "add_offset": 270.0, "units": "K"})
        field[:] = 270 + np.random.default_rng(0).random((48, 9, 18))
        file.createVariable("number", "i8", ())[...] = 0
        file.createVariable("expver", str, ("valid_time",))[:] = np.array(["0001"] * 48, object)


def cmip(path: Path) -> None:
    """Months of a calendar without leap days, with their bounds."""
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("time", None)
        file.createDimension("bnds", 2)
        file.createDimension("lat", 4)
        time = file.createVariable("time", "f8", ("time",))
        time.setncatts({"units": "days since 1850-01-01", "calendar": "noleap"})
        time[:] = np.arange(12) * 30 + 15.5
        file.createVariable("time_bnds", "f8", ("time", "bnds"))[:] = 0
        file.createVariable("tas", "f4", ("time", "lat"))[:] = 1


def reanalysis(path: Path) -> None:
    times = pd.date_range("2001-02-03", periods=ROWS, freq="6h")
    data = {"u": (("time", "x"), np.ones((ROWS, 5), "f4")), "mask": (("x",), np.ones(5, "i1"))}
    xr.Dataset(data, {"time": times}).to_netcdf(path, engine="h5netcdf")


# PyTables brings filters of its own, which would take the place of h5py's in this process.
FRAME = f"""
import sys, warnings
import numpy as np, pandas as pd

warnings.simplefilter("ignore")  # of names that are no identifiers
table = pd.DataFrame({{"a": np.arange({ROWS}, dtype="f8"), "b": ["x"] * {ROWS}}})
table.to_hdf(sys.argv[1], key="table", format="table", mode="w")
table[["a"]].to_hdf(sys.argv[1], key="fixed", format="fixed")
"""
TABLES = f"""
import sys
import numpy as np, tables

with tables.open_file(sys.argv[1], "w") as file:
    file.create_array("/", "image", np.zeros(({ROWS}, 4, 4), "u1"))
    file.create_vlarray("/", "tokens", tables.Int32Atom()).append([1, 2, 3])
    file.create_earray("/", "grown", tables.Float32Atom(), (0, 2)).append(np.ones(({ROWS}, 2)))
"""


def frame(path: Path) -> None:
    """A pandas table: a compound array, and its axes pickled or as text."""
    subprocess.run([sys.executable, "-c", FRAME, str(path)], check=True)


def pytables(path: Path) -> None:
    subprocess.run([sys.executable, "-c", TABLES, str(path)], check=True)


def matlab(path: Path) -> None:
    """Version 7.3: a block of text before HDF5 begins, references to cells."""
    with h5py.File(path, "w", userblock_size=512) as file:
        file["X"] = np.zeros((ROWS, 8))
        file["X"].attrs["MATLAB_class"] = np.bytes_("double")
        cell = file.create_dataset("#refs#/a", data=np.array([[65]], "u2"))
        file["names"] = np.array([[cell.ref]], h5py.ref_dtype)
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file")


def episodes(path: Path) -> None:
    """A group a demonstration, of its own length, as robomimic writes them."""
    with h5py.File(path, "w") as file:
        for number in range(12):
            group = file.create_group(f"data/demo_{number}")
            group["actions"] = np.zeros((number + 3, 7), "f4")
            group["obs/image"] = np.zeros((number + 3, 4, 4, 3), "u1")
        file["mask/train"] = np.array([b"demo_0", b"demo_1"])


def sparse(path: Path) -> None:
    """As anndata writes a matrix by rows: values, columns, and where rows begin."""
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"] = "csr_matrix"
        group["data"], group["indices"] = np.ones(20, "f4"), np.zeros(20, "i4")
        group["indptr"] = np.arange(ROWS + 1)
        file["obs/_index"] = np.array(["cell"] * ROWS, object)


@pytest.mark.parametrize(
    ("make", "trains", "texts"),
    [
        (every_type, {ROWS: ["bits", "bool", "complex", "esc\x1b[31m", "kind", "number"]}, [
            "int16, one of A, B", "compound {pt: float32, hits: arrays 2", "no: it cannot become",
            "sequences of float32", "bitfield of 16 bits", "time of 4 bytes", "caf\\xe9",
            "to gone.h5:/x, where there is nothing", "esc\\x1b[31m", "opaque of 7 bytes",
        ]),
        (era5, {48: ["t2m"]}, [
            "1990-01-01 00:00 to 1990-01-02 23:00, standard calendar",
            "decoded: x 0.01, + 270, some stand for missing values", "--fields t2m",
            "the length of an axis of netCDF", "one value, and no axis of samples",
        ]),
        (cmip, {12: ["tas", "time_bnds"]}, [
            "15.5 days since 1850-01-01 to 345.5 days since 1850-01-01, noleap calendar",
        ]),
        (reanalysis, {ROWS: ["u"], 5: ["mask"]}, ["2001-02-03 00:00 to 2001-02-04 06:00"]),
        (frame, {ROWS: None}, ["compound {index: int64"]),
        (pytables, {ROWS: ["grown", "image"]}, ["sequences of int32"]),
        (matlab, {ROWS: ["X"], 1: ["#refs#/a"]}, ["reference"]),
        (episodes, {}, ["data/*/actions", "12 times, such as 3 x 7", "groups that hold the same"]),
        (sparse, {20: ["X/data", "X/indices"], ROWS + 1: ["X/indptr"]}, ["no: it cannot become"]),
    ],
)  # fmt: skip
def test_files_of_other_makers_are_told_whole(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
    trains: dict[int, list[str] | None],
    texts: list[str],
) -> None:
    path = tmp_path / "a.h5"
    make(path)
    sets = {
        rows: [item.path for item in items] for rows, items in survey(str(path)).trainable().items()
    }
    for rows, names in trains.items():
        assert names is None or sorted(sets[rows]) == names
        # What is said to train together opens as one dataset.
        assert open_dataset(str(path), sets[rows]).samples == rows
    assert None in trains.values() or not set(sets) - set(trains)
    assert main(["data", "info", str(path)]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    for text in texts:
        assert text in told
    if "[data.fields]" in told:
        lines = [line[2:] for line in told.splitlines() if line.startswith("  ")]
        said = tomllib.loads("\n".join(lines[lines.index("[data]") :]))
        assert {each["path"] for each in said["data"]["fields"].values()} == set(
            next(iter(sets.values()))
        )
    assert main(["data", "info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts.get("arrays") or facts["fields"]


def test_the_tools_name_their_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    era5(tmp_path / "era5.nc")
    for tool in ("verify", "stats", "index"):
        assert main(["data", tool, str(tmp_path / "era5.nc")]) == 65
        assert "--fields" in capsys.readouterr().err
    assert main(["data", "verify", str(tmp_path / "era5.nc"), "--fields", "t2m"]) == 0


def test_lengths_of_axes_are_no_fields(tmp_path: Path) -> None:
    with netCDF4.Dataset(tmp_path / "a.nc", "w") as file:
        file.createDimension("sample", 5)
        file.createDimension("x", 3)
        file.createVariable("field", "f4", ("sample", "x"))[:] = 1
    assert list(open_dataset(str(tmp_path / "a.nc")).fields) == ["field"]


def test_a_folder_of_splits_is_told_split_by_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        with h5py.File(tmp_path / name / "a.h5", "w") as file:
            file["x"] = np.zeros((4, 2))
    (tmp_path / "logs").mkdir()
    assert main(["data", "info", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"{tmp_path}/train: 4 samples" in told
    assert f"{tmp_path}/validation: 4 samples" in told
    assert main(["data", "info", str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["parts"]) == 2


def test_what_is_damaged_is_still_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    era5(tmp_path / "a.nc")
    (tmp_path / "b.nc").write_bytes((tmp_path / "a.nc").read_bytes()[:5000])
    assert main(["data", "info", str(tmp_path)]) == 65
    assert main(["data", "info", str(tmp_path / "a.nc"), "--fields", "gone"]) == 65
    (tmp_path / "b.nc").unlink()
    (tmp_path / "index.json").write_text("{}")
    assert main(["data", "info", str(tmp_path)]) == 65
    capsys.readouterr()


def test_a_file_with_too_many_objects_is_told_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walking, "MOST_OBJECTS", 10)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for number in range(8):
            file[f"a{number}"] = np.zeros(number + 1)
        for number in range(8):
            file[f"z/b{number}"] = np.zeros(3)
    found = survey(str(tmp_path / "a.h5"))
    assert len(found.items) == 8
    assert "more than" in found.cut


def test_links_count_like_all_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "MOST_OBJECTS", 5)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for path in ("a/1", "a/2", "b/1", "b/2"):
            file[path] = h5py.SoftLink("/gone")
    found = survey(str(tmp_path / "a.h5"))
    assert [item.path for item in found.items] == ["a/1", "a/2"]
    assert "more than" in found.cut


def test_chunks_are_told_of_all_arrays(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("field", data=np.zeros((8, 6)), chunks=(2, 3), compression="gzip")
        file.create_dataset("text", data=np.array([b"a"] * 8), chunks=(4,))
    found = {item.path: item.stored for item in survey(str(tmp_path / "a.h5")).items}
    assert found == {"field": "chunks of 2 x 3, deflate", "text": "chunks of 4"}


def test_alike_groups_are_one_at_every_level(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for subject in range(3):
            for run in range(4):
                file[f"s{subject}/r{run}/eeg"] = np.zeros((10, 2))
        file["s9/other"] = np.zeros(3)
    found = {item.path: item for item in survey(str(tmp_path / "a.h5")).items}
    assert list(found) == ["*/*/eeg", "s9/other"]
    eeg: Item = found["*/*/eeg"]
    assert eeg.count == 12


def test_a_type_that_numpy_lacks_is_named(tmp_path: Path) -> None:
    every_type(tmp_path / "a.h5")
    with pytest.raises(DatasetError, match='field "time" is time of 4 bytes, which cannot become'):
        open_dataset(str(tmp_path / "a.h5"), ["time"])


def attributes_of(path: Path, **said: Any) -> None:
    with h5py.File(path, "w") as file:
        file["time"] = np.arange(3.0)
        for name, value in said.items():
            file["time"].attrs[name] = value


@pytest.mark.parametrize(
    ("units", "calendar", "told"),
    [
        ("days since 2000-02-28", "gregorian", "2000-02-28 00:00 to 2000-03-01 00:00, gregorian"),
        (
            "seconds since 1970-01-01T00:00:00Z",
            "",
            "1970-01-01 00:00 to 1970-01-01 00:00, standard",
        ),
        ("hours since 1900-1-1 0:0:0.0", "", "1900-01-01 00:00 to 1900-01-01 02:00, standard"),
        (
            "days since 0000-01-01",
            "",
            "0 days since 0000-01-01 to 2 days since 0000-01-01, standard",
        ),
        (
            "months since 2000-01-01",
            "360_day",
            "0 months since 2000-01-01 to 2 months since 2000-01-01, 360_day",
        ),
        ("metres", "", "in metres"),
        (np.arange(3), "", ""),
    ],
)
def test_periods(tmp_path: Path, units: Any, calendar: str, told: str) -> None:
    attributes_of(tmp_path / "a.h5", units=units, calendar=calendar)
    (item,) = survey(str(tmp_path / "a.h5")).items
    assert told in ", ".join(item.notes)
