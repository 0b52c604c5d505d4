"""A catalogue of files anywhere: the same dataset as without it, or word of what changed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpctrain.convert import index as indexing
from hpctrain.convert.index import make_catalogue, make_index
from hpctrain.convert.verify import verify
from hpctrain.data.files.discovery import open_dataset, verify_share
from hpctrain.data.files.index import sealed
from hpctrain.data.view import Part, View
from hpctrain.errors import DatasetError, UsageError


@pytest.fixture
def site(tmp_path: Path) -> Path:
    for number in (1, 2):
        folder = tmp_path / f"year{number}"
        folder.mkdir()
        with h5py.File(folder / "a.nc", "w") as file:
            file["group/fields"] = np.full((2, 3 + number, 5), number, ">f4")
            file.create_dataset("zipped", data=np.arange(8), chunks=(3,), compression="gzip")
            file["is_good"] = np.ones(3 + number, bool)
            file["text"] = ["one", "two"]
            layout = h5py.VirtualLayout((8,), "i8")
            layout[:] = h5py.VirtualSource("../source.h5", "x", (8,))
            file.create_virtual_dataset("virtual", layout)
    with h5py.File(tmp_path / "source.h5", "w") as file:
        file["x"] = np.arange(8)
    return tmp_path


@pytest.mark.parametrize(
    ("names", "axis"),
    [
        (["group/fields"], 1),
        (["zipped", "virtual"], 0),
        (["is_good"], 0),
    ],
)
def test_it_stands_for_its_files(site: Path, names: list[str], axis: int) -> None:
    pattern = str(site / "year*" / "*.nc")
    catalogue = site / "elsewhere" / "all.json"
    catalogue.parent.mkdir()
    told: list[tuple[int, int]] = []
    make_catalogue(pattern, catalogue, jobs=1, progress=lambda *done: told.append(done))
    assert told == [(0, 2), (1, 2), (2, 2)]
    plain, listed = (open_dataset(each, names, axis) for each in (pattern, str(catalogue)))
    assert listed.fields == plain.fields
    for one, two in zip(plain.shards, listed.shards, strict=True):
        assert (one.layouts, one.samples, one.size) == (two.layouts, two.samples, two.size)
        assert one.sources == two.sources
        assert Path(two.path).samefile(one.path)
    verify_share([View.of("", [Part(listed, axis)], {}, None)], 0, 1)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=r"a\.nc: data\.verify = \"start\", but .* no checksum"):
        verify_share([plain], 1, 2)


def test_it_moves_with_its_files(site: Path) -> None:
    make_catalogue(str(site / "year1" / "*.nc"), site / "year1" / "all.json", jobs=1)
    (site / "year1").rename(site / "moved")
    dataset = open_dataset(str(site / "moved" / "all.json"), ["is_good"])
    assert Path(dataset.shards[0].path) == site / "moved" / "a.nc"


def test_files_that_changed(site: Path) -> None:
    catalogue = site / "all.json"
    pattern = str(site / "year*" / "*.nc")
    make_catalogue(pattern, catalogue, ["is_good"], checksums=False, jobs=1)
    path = site / "year2" / "a.nc"
    with pytest.raises(DatasetError, match=r'a\.nc: there is no field "zip"'):
        open_dataset(str(catalogue), ["zip"])
    with h5py.File(path, "r+") as file:
        file["is_good"][0] = False
    os.utime(path, ns=(0, 0))
    with pytest.raises(DatasetError, match=r"a\.nc: .*all\.json is older than this file"):
        open_dataset(str(catalogue), ["is_good"])
    make_catalogue(pattern, catalogue, ["is_good"], jobs=1)
    content = bytearray(path.read_bytes())
    times = path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DatasetError, match=r"year2/a\.nc: its checksum is not that of the index"):
        verify_share([open_dataset(str(catalogue), ["is_good"])], 0, 1)
    path.unlink()
    with pytest.raises(DatasetError, match=r"a\.nc: No such file .*all\.json lists it"):
        open_dataset(str(catalogue), ["is_good"])


def test_verify_of_listed_files(site: Path) -> None:
    catalogue = site / "all.json"
    make_catalogue(str(site / "year*" / "*.nc"), catalogue, jobs=1)
    verdict = verify(str(catalogue), jobs=1)
    assert (verdict.problems, verdict.shards, verdict.has_checksums) == ((), 2, True)
    assert verify(str(catalogue), ["is_good"], jobs=1).samples == 9
    path = site / "year1" / "a.nc"
    times = path.stat()
    with h5py.File(path, "r+") as file:
        file["group/fields"][1, 2, 3] = np.nan
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    problems = verify(str(catalogue), jobs=1).problems
    assert len(problems) == 1
    assert "year1/a.nc: its checksum" in problems[0]


def test_a_folder_that_cannot_be_written(site: Path) -> None:
    """What an index needs, and where a catalogue goes instead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "write_index", refuse)
        with pytest.raises(DatasetError, match=r"Read-only file system\. `--out FILE\.json` lists"):
            make_index(str(site / "year1"), ["is_good"], jobs=1)


def refuse(*_: Any) -> None:
    """Do what a read-only mount does."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def change(where: list[Any], value: Any) -> Any:
    """Return a function that sets one value of a document."""

    def apply(document: Any) -> None:
        for key in where[:-1]:
            document = document[key]
        document[where[-1]] = value

    return apply


ARRAY = ["files", 0, "arrays", "is_good"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(["version"], 99), "written by a newer hpctrain"),
        (change(["kind"], "x"), "it is not a catalogue"),
        (change(["files"], []), "files: .* at least 1 item"),
        (change(["files"], 3), "files: 3 is not a valid array"),
        (change(["files", 0, "bytes"], "many"), r"files\.0\.bytes: 'many' is not a valid integer"),
        (change([*ARRAY, "dtype"], "i99"), "'i99' is not a dtype of numpy"),
        (change([*ARRAY, "shape"], [-4]), r"shape\.0: -4 is not greater"),
        (change([*ARRAY, "shape"], [10**9]), r"values up to byte \d+ of \d+"),
        (change([*ARRAY, "offset"], -1), r"offset: -1 is not greater"),
        (lambda document: document.clear(), "kind is missing"),
    ],
)
def test_damaged_catalogues(site: Path, damage: Any, message: str) -> None:
    catalogue = site / "all.json"
    make_catalogue(str(site / "year1"), catalogue, ["is_good"], checksums=False, jobs=1)
    document = json.loads(catalogue.read_text())
    damage(document)
    catalogue.write_bytes(sealed(document))
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(str(catalogue), ["is_good"])
    assert str(catalogue) in str(caught.value)


def test_where_it_cannot_be(site: Path) -> None:
    for name in ("index.json", "all.txt"):
        with pytest.raises(UsageError, match=r"name it \*\.json, other than index\.json"):
            make_catalogue(str(site / "year1"), site / name)
    with pytest.raises(DatasetError, match="cannot write here"):
        make_catalogue(str(site / "year1"), site / "none" / "all.json", jobs=1)
