"""Files that are not HDF5, or not all of one, among others: named, with what they are."""

from __future__ import annotations

import gzip
import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpctrain.config.schema_data import DataSection, FieldTable, SamplesTable
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.opening.open_datasets import open_for_training
from hpctrain.errors import DatasetError


def good(path: Path) -> bytes:
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(12.0).reshape(4, 3)
    return path.read_bytes()


def netcdf3(path: Path) -> None:
    netcdf = pytest.importorskip("scipy.io")
    with netcdf.netcdf_file(path, "w") as file:
        file.createDimension("t", 3)
        file.createVariable("x", "f8", ("t",))[:] = 1


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x", "x")


LFS = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
PAGE = "<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head>\n<body>No.</body></html>"
STRANGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "notes.txt": (lambda path: path.write_text("read me first\n"), "text, beginning with 'read me"),
    "page.h5": (lambda path: path.write_text(PAGE), r'page of HTML \("403 Forbidden"\).*download'),
    "store.h5": (
        lambda path: path.write_text('<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>'),
        "XML, such as the error of an object store",
    ),
    "lfs.h5": (lambda path: path.write_text(LFS), "Git LFS to a file of 12,345 bytes: `git lfs"),
    "annex.h5": (lambda path: path.write_text("/annex/objects/MD5E-s1--x.h5\n"), "git-annex: `gi"),
    "half.h5": (lambda path: path.write_bytes(good(path)[:1200]), "truncated: 1,200 of 2,144 byte"),
    "holes.h5": (lambda path: path.write_bytes(bytes(9000)), "nothing but zeros"),
    "none.h5": (lambda path: path.write_bytes(b""), "empty: it has no byte"),
    "classic.nc": (netcdf3, "netCDF-3, which is not HDF5: `python -m hpctrain data pack`"),
    "packed.h5": (
        lambda path: path.write_bytes(gzip.compress(good(path))),
        "compressed by gzip: gunzip it",
    ),
    "archive.h5": (archive, "a zip archive"),
    "array.npy": (lambda path: np.save(path, np.ones(3)), r"\.npy of numpy"),
    "facts.json": (lambda path: path.write_text(json.dumps({"a": 1})), "text, beginning with"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_each_is(tmp_path: Path, name: str) -> None:
    make, said = STRANGERS[name]
    good(tmp_path / "a-good.h5")
    make(tmp_path / name)
    with pytest.raises(DatasetError, match=rf"{name}: HDF5 cannot read this file: .*{said}"):
        open_dataset(str(tmp_path / "*"), ["x"])
    # Also where values decide what a field is: all files are looked at.
    section = DataSection(
        train=str(tmp_path / "*"), global_batch_size=1, fields={"x": FieldTable(dtype="float32")}
    )
    with pytest.raises(DatasetError, match=rf"{name}: HDF5 cannot read this file: .*{said}"):
        open_for_training(section, ["x"])


def test_all_of_a_pattern_are_named_at_once(tmp_path: Path) -> None:
    good(tmp_path / "a.h5")
    for name in ("lfs.h5", "notes.txt", "page.h5"):
        STRANGERS[name][0](tmp_path / name)
    good(tmp_path / "z.h5")
    told = (
        r"lfs\.h5: .*`git lfs pull` brings it\. The same of 2 other files: .*notes\.txt: text, "
        r"beginning.*page\.h5: a page of HTML.*give a pattern that they do not fit"
    )
    with pytest.raises(DatasetError, match=told):
        open_dataset(str(tmp_path / "*"), ["x"])


def test_hdf5_behind_a_header_is_hdf5(tmp_path: Path) -> None:
    """MATLAB's v7.3 begins with text; user blocks hold anything."""
    path = tmp_path / "a.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["x"] = np.ones((4, 3))
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512))
    assert open_dataset(str(path), ["x"]).samples == 4


@pytest.mark.parametrize("is_between", [False, True])
def test_rows_without_a_time_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_between: bool
) -> None:
    """A program that was killed has written values, and no time of them."""
    netcdf = pytest.importorskip("netCDF4")
    with netcdf.Dataset(tmp_path / "a.nc", "w") as file:
        file.createDimension("time", None)
        times = file.createVariable("time", "f8", ("time",))
        times.units = "days since 2000-01-01"
        file.createVariable("t", "f4", ("time",))[:6] = np.arange(6)
        times[:4] = np.arange(4)
        if is_between:  # netCDF fills what lies before the last that was written
            times[5] = 5
    section = DataSection(
        train=str(tmp_path / "a.nc"),
        global_batch_size=1,
        fields={"t": FieldTable()},
        samples=SamplesTable(train={"time": ["2000", "2001"]}),
    )
    with caplog.at_level(logging.WARNING):
        dataset = open_for_training(section, ["t"])
    with netcdf.Dataset(tmp_path / "a.nc") as file:
        missing = np.ma.getmaskarray(file["time"][:])
    assert dataset.samples == 6 - missing.sum() == (5 if is_between else 4)
    assert f'"time": {"1 row" if is_between else "2 rows"} of 6 without a value' in caplog.text
    assert f"the first one is row 4 of {tmp_path / 'a.nc'}" in caplog.text
