"""An array has every name by which HDF5 finds it, whatever an index or a catalogue lists."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpctrain.convert.index import make_catalogue, make_index
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.reading.rows import read_rows
from hpctrain.errors import DatasetError

ROWS = 6
NAMES = {
    "real/x": 0,
    "/real/x": 0,
    "./real//x/": 0,
    "soft": 0,
    "hard": 0,
    "soft to soft": 0,
    "alias/x": 0,
    "loop/loop/real/loop/hard": 0,
    "elsewhere": 100,
    "shelf/y": 200,
    "back/real/x": 0,
    "a name, with \N{GREEK SMALL LETTER ALPHA}/%d.{x}[0]*\n\"'": 300,
    "..": 400,
    "virtual": 0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files with arrays under many names, and one beside them that links lead to."""
    made = tmp_path / "shards"
    made.mkdir()
    with h5py.File(tmp_path / "beside.hdf", "w") as file:
        file["y"] = values(100)
        file["group/y"] = values(200)
        file["short"] = np.arange(5.0)
        file["again"] = h5py.ExternalLink("shards/a.h5", "/")
    for name in ("a", "b"):
        with h5py.File(made / f"{name}.h5", "w") as file:
            file["real/x"] = values(0)
            file["soft"] = h5py.SoftLink("/real/x")
            file["soft to soft"] = h5py.SoftLink("soft")
            file["hard"] = file["real/x"]
            file["alias"] = file["real"]
            file["loop"] = file["/"]
            file["real/loop"] = h5py.SoftLink("/")
            file["elsewhere"] = h5py.ExternalLink("../beside.hdf", "/y")
            file["short"] = h5py.ExternalLink("../beside.hdf", "/short")
            file["shelf"] = h5py.ExternalLink("../beside.hdf", "/group")
            file["back"] = h5py.ExternalLink("../beside.hdf", "/again")
            file[list(NAMES)[-3]] = values(300)
            file[".."] = values(400)
            file[b"\xff\xfe"] = values(500)
            file["itself"] = h5py.SoftLink("/itself")
            file["nothing"] = h5py.SoftLink("/not/there")
            file["nobody"] = h5py.ExternalLink("nobody.h5", "/x")
            layout = h5py.VirtualLayout((ROWS, 2), "f8")
            layout[:] = h5py.VirtualSource(".", "real/x", (ROWS, 2))
            file.create_virtual_dataset("virtual", layout)
    return made


def values(first: int) -> np.ndarray[Any, Any]:
    return first + np.arange(2.0 * ROWS).reshape(ROWS, 2)


def sources(folder: Path) -> dict[str, str]:
    """Return what stands for the files of a folder, by what it is."""
    catalogue = folder.parent / "all.json"
    make_catalogue(str(folder), catalogue, jobs=1)
    make_index(str(folder), jobs=1)
    return {"files": str(folder / "*.h5"), "index": str(folder), "catalogue": str(catalogue)}


def test_every_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hpctrain")
    for kind, source in sources(folder).items():
        caplog.clear()
        for name, first in NAMES.items():
            dataset = open_dataset(source, [name])
            found = read_rows(dataset, np.arange(2 * ROWS))[name]
            assert (found == np.concatenate([values(first)] * 2)).all(), (kind, name)
        together = open_dataset(source, list(NAMES))
        assert list(together.fields) == list(NAMES)
        assert together.fingerprint == open_dataset(source, ["soft"]).fingerprint
        asked = [record.getMessage() for record in caplog.records]
        assert (f"{source}: asking the files about soft" in asked) == (kind == "index")


@pytest.mark.parametrize("name", ["itself", "nothing", "nobody"])
def test_links_that_lead_to_nothing(folder: Path, name: str) -> None:
    for source in sources(folder).values():
        with pytest.raises(DatasetError, match=f'a.h5: field "{name}" is a link that leads to no'):
            open_dataset(source, [name])


def test_names_that_nothing_has(folder: Path) -> None:
    for source in sources(folder).values():
        with pytest.raises(DatasetError, match=r'a\.h5: there is no field "softt"'):
            open_dataset(source, ["softt"])


def test_fields_of_another_length(folder: Path) -> None:
    source = sources(folder)["index"]
    with pytest.raises(DatasetError, match=r'a\.h5: field "short" has 5 rows, and index\.json li'):
        open_dataset(source, [next(iter(open_dataset(source).fields)), "short"])


def test_files_of_nothing_but_links(tmp_path: Path) -> None:
    """A master file, as instruments write it: what it leads to trains with an index, too."""
    (tmp_path / "parts").mkdir()
    for number in (1, 2, 10):
        with h5py.File(tmp_path / f"part{number}.hdf", "w") as file:
            file["entry/data"] = np.arange(3) + 10 * number
            file["entry/up"] = h5py.SoftLink("/entry")
    with h5py.File(tmp_path / "parts" / "master.h5", "w") as file:
        file["entry/one"] = h5py.ExternalLink("../part1.hdf", "/entry/data")
        file["entry/same"] = h5py.ExternalLink("../part1.hdf", "/entry/data")
        file["entry/more"] = h5py.ExternalLink("../part2.hdf", "/entry")
        file["entry/gone"] = h5py.ExternalLink("../part3.hdf", "/entry")
    assert list(open_dataset(str(tmp_path / "parts")).fields) == ["entry/one", "entry/more/data"]
    make_index(str(tmp_path / "parts"), jobs=1)
    dataset = open_dataset(str(tmp_path / "parts"), ["entry/one", "entry/more/data", "entry/same"])
    found = read_rows(dataset, np.arange(3))
    assert [each.tolist() for each in found.values()] == [[10, 11, 12], [20, 21, 22], [10, 11, 12]]
    assert dataset.shards[0].sources == (
        *(str(tmp_path / "parts" / f"../part{number}.hdf") for number in (1, 2)),
    )


def test_values_of_other_files_are_looked_for_each_time(folder: Path) -> None:
    """HDF5 would give fill values for a source that is gone since the index was made."""
    source = folder.parent / "source.hdf"
    with h5py.File(source, "w") as file:
        file["x"] = np.arange(ROWS)
    for name in ("a", "b"):
        with h5py.File(folder / f"{name}.h5", "r+") as file:
            layout = h5py.VirtualLayout((ROWS,), "i8")
            layout[:] = h5py.VirtualSource("../source.hdf", "x", (ROWS,))
            file.create_virtual_dataset("made of others", layout)
    made = sources(folder)
    for each in made.values():
        dataset = open_dataset(each, ["made of others"])
        assert [Path(s).resolve() for s in dataset.shards[0].sources] == [source.resolve()]
    source.unlink()
    for each in made.values():
        with pytest.raises(DatasetError, match=r"its source \.\./source\.hdf is missing"):
            open_dataset(each, ["made of others"])


def test_external_storage_that_is_too_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 gives zeros for what is not there, and looks from the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    content = np.arange(20, dtype="<i4")
    for name, part in (("one.bin", content[:8]), ("two.bin", content[8:])):
        (tmp_path / name).write_bytes(b"head" + part.tobytes())
    with h5py.File(tmp_path / "folder" / "a.h5", "w") as file:
        external = [("one.bin", 4, 32), ("two.bin", 4, h5py.h5f.UNLIMITED)]
        file.create_dataset("x", (20,), "<i4", external=external)
    make_index("folder", jobs=1)
    dataset = open_dataset("folder", ["x"])
    assert (read_rows(dataset, np.arange(20))["x"] == content).all()
    assert dataset.shards[0].sources == (str(tmp_path / "one.bin"), str(tmp_path / "two.bin"))
    (tmp_path / "two.bin").write_bytes(b"head" + content[8:19].tobytes())
    with pytest.raises(
        DatasetError, match=r"two\.bin up to byte 52, and that file ends at byte 48"
    ):
        open_dataset("folder", ["x"])
    (tmp_path / "two.bin").unlink()
    with pytest.raises(DatasetError, match=r"two\.bin up to byte 52, and that file is missing"):
        open_dataset("folder/*.h5", ["x"])
