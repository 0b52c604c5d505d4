"""`data info` on files of other makers: nothing is refused, and what can train is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
import pytest
from helpers.jobs import here
from helpers.made_files import ROWS, make_all
from helpers.made_files import h5py__every_class_of_types as every_type
from helpers.made_files import netcdf4__era5_as_the_store_delivers_it as era5

from hpctrain.cli import main
from hpctrain.convert.items import Item
from hpctrain.convert.survey import survey
from hpctrain.data import open_dataset
from hpctrain.data.files import walking
from hpctrain.data.files.form_opening import all_texts
from hpctrain.errors import DatasetError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODEL = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        values = [v for v in batch.values() if torch.is_tensor(v) and v.numel()]
        parts = [(v.abs() if v.is_complex() else v).double().nan_to_num().mean() for v in values]
        return self.weight * (1 + sum(parts)).float()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)
"""
CONFIG = """
[run]
name = "any"
[model]
use = "any_model:Net"
[training]
max_steps = 1
[checkpoint]
resume = "never"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Return files of many makers, by what they are."""
    return make_all(tmp_path_factory.mktemp("made"))


def told_of(path: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["data", "info", str(path)]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    return told


def tables_in(told: str) -> str:
    """Return the tables that are told to be copied, as TOML."""
    lines = [line[2:] for line in told.splitlines() if line.startswith("  ")]
    return "\n".join(lines[lines.index("[data]") :]) if "[data]" in lines else ""


def test_no_file_is_refused_and_what_is_told_trains(
    made: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(made) >= 50
    assert len({name.partition(":")[0] for name in made}) >= 12
    (tmp_path / "any_model.py").write_text(MODEL)
    useless = []
    for name, path in made.items():
        tables = tables_in(told_of(path, capsys))
        assert main(["data", "info", str(path), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert len(facts["arrays"]) or "nothing" in name
        if not tables:
            useless.append(name)
            continue
        said = tomllib.loads(tables)["data"]
        wanted = [each["path"] for each in facts["sets"][0]["fields"]]
        assert [each["path"] for each in said["fields"].values()] == wanted[: len(said["fields"])]
        # Those of plain arrays have been opened, as tables are before they are told.
        if any(len(each) > 1 or "*" in each["path"] for each in said["fields"].values()):
            sized = tables.replace("[data]", "[data]\nglobal_batch_size = 2")
            (tmp_path / "run.toml").write_text(CONFIG + sized)
            here(tmp_path, "run.toml")
    assert sorted(useless) == [
        "h5py: a sample an array",
        "h5py: events in groups of their own shape",
        "h5py: groups without arrays",
        "h5py: nothing at all",
        "h5py: references only",
    ]


SAID = {
    "h5py: every class of types": [
        "int16, one of A, B", "compound {pt: float32, hits: arrays 2", "sequences of float32",
        "bitfield of 16 bits", "time of 4 bytes", "opaque of 7 bytes",
        'letters = {path = "letters", classes = "sorted"}', 'needs dtype = "bytes"',
        'date = {path = "date", dtype = "int64"}', 'hits = {path = "record/hits"}',
        "no: it holds references to places in this file, which are not followed",
    ],
    "h5py: types of odd widths": ['bits = {path = "bits", dtype = "int64"}'],
    "h5py: links of all kinds": [
        "a link to /a/x", "to /gone, where there is nothing", "other:/x",
        "to gone.h5:/x, where there is nothing", "to /a, which is a group",
    ],
    "h5py: names of all kinds": ["esc\\x1b[31m", "caf\\xe9", "no: its name is not UTF-8"],
    "h5py: attributes of all kinds": ['needs decode = "none"'],
    "h5py: images by offsets": [
        'image = {path = "image", offsets = "image_offsets", image = [224, 224]}',
        "offsets: where samples begin in image",
    ],
    "h5py: graphs by offsets and counts": [
        'edge = {path = "edge", counts = "num_edges", batch = "concat"}',
        'pos = {path = "pos", offsets = "atom_ptr", batch = "concat"}',
        'energy = {path = "energy"}',
    ],
    "h5py: starts without an end": ['offsets = "tokens_start"'],
    "h5py: a sample an array": ["patch_*", "64 times, such as 8 x 8", "a sample each: write"],
    "h5py: a virtual without its source": ["its source gone.h5 is missing", 'path = "x"'],
    "robomimic: demonstrations": [
        'actions = {path = "data/demo_*/actions"}', "11 times, such as 3 x 7",
    ],
    "matlab: version 7 3": [
        'X = {path = "X", axis = 1}', 'z = {path = "z", axis = 1, dtype = "complex128"}',
        "letters of MATLAB", "no: it holds references",
    ],
    "netcdf4: era5 as the store delivers it": [
        "1990-01-01 00:00 to 1990-01-01 11:00, standard calendar", "--fields expver,t2m",
        "decoded: x 0.01, + 270, some stand for missing values", "one value, and no axis of",
    ],
    "netcdf4: cmip without leap days": [
        "15.5 days since 1850-01-01 to 345.5 days since 1850-01-01, noleap calendar",
    ],
    "netcdf4: members before time": ['t = {path = "t", axis = 1}'],
    "wrf: letters of times": ['needs dtype = "bytes"', 'T2 = {path = "T2"}'],
    "pytables: a table with an index": ["an index of PyTables", 'path = "particles/energy"'],
    "pandas: columns to search by": ['x = {path = "obs/table/x"}'],
    "anndata: cells by genes": ['offsets = "X/indptr"', 'X_pca = {path = "obsm/X_pca"}'],
    "hdf5: a filter that nobody has": ["no: ", "hpctrain[filters]", 'x = {path = "x"}'],
}  # fmt: skip


def test_what_is_told_of_files_of_other_makers(
    made: Mapping[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, texts in SAID.items():
        told = told_of(made[name], capsys)
        for text in texts:
            assert text in told, f"{name}: {told}"


def test_keys_are_of_all_files_and_of_none_that_others_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, more in (("a", ["x", "y"]), ("b", ["x"])):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for field in more:
                file[field] = np.zeros((ROWS, 2))
            file["word"] = np.array([b"a", b"b"] * (ROWS // 2))
    told = told_of(tmp_path, capsys)
    assert 'x = {path = "x"}' in told
    assert "y = {" not in told
    assert 'no: field "y" is not in this file' in told or "b.h5" in told


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
    assert list(found) == ["s*/r*/eeg", "s9/other"]
    eeg: Item = found["s*/r*/eeg"]
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


@pytest.mark.parametrize("damage", ["numbers", "lists of numbers", "too few", "null", "deleted"])
def test_lists_of_scales_that_are_none(tmp_path: Path, damage: str) -> None:
    """HDF5's own reading of such lists ends the process."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["time"] = np.arange(3.0)
        file["t"] = np.zeros((3, 4))
        file["time"].make_scale("time")
        file["t"].dims[0].attach_scale(file["time"])
        there = file["t"].attrs
        references = there["DIMENSION_LIST"]
        kind = h5py.vlen_dtype(h5py.ref_dtype)
        if damage == "numbers":
            there["DIMENSION_LIST"] = [1, 2]
        elif damage == "lists of numbers":
            lists = np.array([np.arange(2), np.arange(3)], object)
            there.create("DIMENSION_LIST", lists, dtype=h5py.vlen_dtype("i8"))
        elif damage == "too few":
            there.create("DIMENSION_LIST", references[:1], (1,), kind)
        elif damage == "null":
            references[0] = np.array([h5py.Reference()], h5py.ref_dtype)
            there.create("DIMENSION_LIST", references, (2,), kind)
        else:
            del file["time"]
    found = {item.path: item for item in survey(str(tmp_path / "x.h5")).items}
    assert found["t"].axes == ("", "")


def test_texts_in_a_zeroed_heap_are_no_endless_loop(tmp_path: Path) -> None:
    """A page of zeros, as a disk leaves it: HDF5 reads on in such a heap for ever."""
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("name", data=["cat", "dog"] * 9, dtype=h5py.string_dtype())
    content = bytearray(path.read_bytes())
    begin = content.index(b"GCOL")
    content[begin + 64 : begin + 4096] = bytes(4096 - 64)
    path.write_bytes(content)
    (item,) = survey(str(path)).items
    assert item.peek.texts == 0
    with pytest.raises(DatasetError, match=r"x\.h5.*heap at byte"):
        all_texts([str(path)], "name")
