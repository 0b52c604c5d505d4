"""Zeroed heaps of HDF5 files, in which HDF5 would read for ever, are named in every layout."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t

from hpctrain.cli import main
from hpctrain.config.schema_data import DataSection, FieldTable
from hpctrain.data.files.global_heaps import (
    require_sound_attribute,
    require_sound_heap,
)
from hpctrain.data.files.storage import open_hdf5_file
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.reading.rows import read_rows
from hpctrain.errors import DatasetError

ROWS = 40
TEXT = h5py.string_dtype()
WORDS = [f"word {number} of many" for number in range(ROWS)]
Make = Callable[[Path], None]
Where = tuple[str, str | None]


def texts(name: str, **stored: Any) -> Make:
    def make(path: Path) -> None:
        with h5py.File(path, "w", userblock_size=512 if name == "block" else 0) as file:
            file.create_dataset("x", data=WORDS, dtype=TEXT, **stored)

    return make


def compact(path: Path) -> None:
    with h5py.File(path, "w") as file:
        plan = h5p.create(h5p.DATASET_CREATE)
        plan.set_layout(h5d.COMPACT)
        kind = h5t.py_create(TEXT, logical=True)
        space = h5s.create_simple((ROWS,))
        dataset = h5py.Dataset(h5d.create(file.id, b"x", kind, space, plan))
        dataset[:] = WORDS


def sequences(path: Path) -> None:
    with h5py.File(path, "w") as file:
        rows = file.create_dataset("x", (ROWS,), h5py.vlen_dtype("f4"), chunks=(7,), shuffle=True)
        for number in range(1, ROWS):
            rows[number] = np.arange(number)


def table(path: Path) -> None:
    """Members of memory's size and of the file's: pointers there, and more than that here."""
    kind = np.dtype([("a", "u1"), ("name", TEXT), ("b", "f8"), ("in", [("c", "i2"), ("d", TEXT)])])
    values = np.array([(1, word, 2.0, (3, word)) for word in WORDS], kind)
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values, chunks=(9,), compression="gzip")


def arrays(path: Path) -> None:
    with h5py.File(path, "w") as file:
        kind = h5t.array_create(h5t.py_create(TEXT, logical=True), (2,))
        space = h5s.create_simple((ROWS,))
        dataset = h5py.Dataset(h5d.create(file.id, b"x", kind, space))
        dataset[:] = np.array([[word, word] for word in WORDS], object)


def regions(path: Path) -> None:
    with h5py.File(path, "w") as file:
        of = file.create_dataset("of", (ROWS, 9), "f4")
        refs = file.create_dataset("x", (ROWS,), h5py.regionref_dtype)
        for number in range(ROWS):
            refs[number] = of.regionref[number, :5]


def attribute(library: str, others: int, value: Any = WORDS) -> Make:
    def make(path: Path) -> None:
        with h5py.File(path, "w", libver=library) as file:
            file["x"] = np.zeros(3)
            for number in range(others):
                file["x"].attrs[f"other_{number}"] = np.arange(number % 50)
            file["x"].attrs["a"] = value
            for number in range(others):
                file["x"].attrs[f"more_{number}"] = np.arange(number % 50)

    return make


def lists_of_scales(path: Path) -> None:
    """As netCDF-4 notes the axes of a variable, which has many attributes."""
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("time", 4)
        file.createVariable("time", "f4", ("time",))[:] = np.arange(4)
        variable = file.createVariable("x", "f4", ("time",))
        variable[:] = 0
        for number in range(12):
            variable.setncattr(f"note_{number}", "text")


def texts_of_netcdf(path: Path) -> None:
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("n", ROWS)
        file.createVariable("x", str, ("n",))[:] = np.array(WORDS, object)


MAKES: dict[str, tuple[Make, Where]] = {
    "contiguous": (texts("plain"), ("x", None)),
    "behind a user block": (texts("block"), ("x", None)),
    "chunks": (texts("plain", chunks=(7,)), ("x", None)),
    "gzip": (texts("plain", chunks=(7,), compression="gzip", shuffle=True), ("x", None)),
    "compact": (compact, ("x", None)),
    "sequences": (sequences, ("x", None)),
    "compound": (table, ("x", None)),
    "arrays": (arrays, ("x", None)),
    "regions": (regions, ("x", None)),
    "netCDF texts": (texts_of_netcdf, ("x", None)),
    "attribute": (attribute("earliest", 0), ("x", "a")),
    "one text": (attribute("earliest", 3, "a text"), ("x", "a")),
    "attribute among many": (attribute("earliest", 60), ("x", "a")),
    "attribute, new format": (attribute("latest", 2), ("x", "a")),
    "attribute in a heap of its own": (attribute("latest", 20), ("x", "a")),
    "attribute in a large one": (attribute("latest", 150), ("x", "a")),
    "scales of netCDF": (lists_of_scales, ("x", "DIMENSION_LIST")),
}


def check(path: Path, where: Where) -> None:
    with open_hdf5_file(path) as file:
        if where[1] is None:
            require_sound_heap(file[where[0]])
        else:
            require_sound_attribute(file[where[0]].attrs, where[1])


def heaps_in(content: bytes) -> list[int]:
    return [found.start() for found in re.finditer(b"GCOL", content)]


@pytest.mark.parametrize("name", MAKES)
def test_a_zeroed_heap_is_named(tmp_path: Path, name: str) -> None:
    make, where = MAKES[name]
    path = tmp_path / "x.h5"
    make(path)
    check(path, where)
    good = path.read_bytes()
    assert heaps_in(good)
    for heap in heaps_in(good):
        for kept in (16, 40):
            path.write_bytes(good[: heap + kept] + bytes(4096 - kept) + good[heap + 4096 :])
            with pytest.raises(OSError, match=r"global heap at byte .* for ever"):
                check(path, where)


@pytest.mark.parametrize("name", MAKES)
def test_tools_return_of_it(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """HDF5 itself would not."""
    make, where = MAKES[name]
    path = tmp_path / "x.h5"
    make(path)
    good = path.read_bytes()
    heap = heaps_in(good)[0]
    path.write_bytes(good[: heap + 16] + bytes(4080) + good[heap + 4096 :])
    for tool in ("info", "verify", "stats"):
        assert main(["data", tool, str(path)]) in (0, 65)
    assert main(["data", "pack", str(path), str(tmp_path / "out")]) in (0, 65)
    if where[1] is None:
        fields = ["--fields", "x/name"] if name == "compound" else []
        assert main(["data", "verify", str(path), *fields]) == 65
    capsys.readouterr()


def test_a_run_ends_with_the_name_of_the_file(tmp_path: Path) -> None:
    for name in ("contiguous", "gzip", "compact", "netCDF texts", "compound"):
        path = tmp_path / "x.h5"
        MAKES[name][0](path)
        good = path.read_bytes()
        for table in (
            FieldTable(path="x/name" if name == "compound" else "x", dtype="S40"),
            FieldTable(path="x/name" if name == "compound" else "x", classes=tuple(WORDS)),
        ):
            section = DataSection(train=str(path), global_batch_size=4, fields={"t": table})
            path.write_bytes(good)
            dataset = open_datasets(section, ["t"])[0]
            assert read_rows(dataset, np.arange(4))["t"].shape[0] == 4
            for heap in heaps_in(good):
                path.write_bytes(good[: heap + 16] + bytes(4080) + good[heap + 4096 :])
                with pytest.raises(DatasetError, match=r"x\.h5.*global heap at byte .* for ever"):
                    read_rows(open_datasets(section, ["t"])[0], np.arange(ROWS))
