"""Decoding by the CF conventions: the values of xarray and netCDF4-python, on files they wrote."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.packed_variables import F4, RANGES, ROWS, VARIABLES, stored

from hpctrain.convert.index import make_index
from hpctrain.data import open_dataset
from hpctrain.data.coding import PLAIN, Coding, coding_from, coding_of
from hpctrain.data.decoding import FieldDecoding, decoding_record, decodings
from hpctrain.data.files.catalogue import read_catalogue, write_catalogue
from hpctrain.data.files.contents import look_into
from hpctrain.errors import DatasetError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of numpy's, about the size of arrays when they were compiled
    import netCDF4
    import xarray


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cf") / "all.nc"
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("time", None)
        file.createDimension("x", 3)
        for name, (dtype, attributes) in VARIABLES.items():
            write(file, name, dtype, attributes)
    return path


def write(file: Any, name: str, dtype: str, attributes: dict[str, Any], seed: int = 0) -> None:
    # Without one netCDF4-python takes a default for said, which no attribute of the file does.
    fill = attributes.get("_FillValue", False)
    variable = file.createVariable(name, dtype, ("time", "x"), fill_value=fill)
    variable.set_auto_maskandscale(False)
    variable[:] = stored(dtype, seed)
    for key, value in attributes.items():
        if key != "_FillValue":
            variable.setncattr(key, value)


def as_floats(values: np.ndarray) -> np.ndarray:
    """Return floats of at most the precision that a field has by default."""
    return values.astype("f4") if values.dtype.kind == "f" else values


def decoding(path: Path | str, name: str, *integers: str) -> FieldDecoding | None:
    return decodings([open_dataset(str(path), [name])], integers)[0].get(name)


def decoded(path: Path, name: str, dtype: str) -> np.ndarray:
    found = decoding(path, name)
    with h5py.File(path) as file:
        numbers = file[name][:].astype(np.dtype(dtype).newbyteorder("="))
    return numbers if found is None else found.decode(numbers)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARIABLES)
def test_the_values_are_those_of_xarray(written: Path, name: str) -> None:
    dtype, _ = VARIABLES[name]
    with xarray.open_dataset(written, decode_times=False) as file:
        expected = file[name].values
    values = decoded(written, name, dtype)
    with np.errstate(over="ignore"):
        assert np.array_equal(values, expected.astype(values.dtype), equal_nan=values.dtype != "i2")
    assert (values.dtype.kind == "f") == (expected.dtype.kind == "f")
    assert values.dtype.itemsize <= 4 or dtype == "f8"


@pytest.mark.filterwarnings("ignore")
def test_valid_ranges_and_what_the_two_do_not_agree_on_are_those_of_netcdf4(tmp_path: Path) -> None:
    path = tmp_path / "ranges.nc"
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("time", ROWS)
        file.createDimension("x", 3)
        for name, (dtype, attributes) in RANGES.items():
            write(file, name, dtype, attributes)
    for name, (dtype, _) in RANGES.items():
        with netCDF4.Dataset(path) as file:
            masked = np.ma.masked_array(file[name][:])
        values = decoded(path, name, dtype)
        missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
        expected = np.ma.getmaskarray(masked) | np.isnan(masked.data)
        if values.dtype.kind == "f":
            assert np.array_equal(missing, expected), name
        else:
            assert not expected.any(), name
        there = ~np.ma.getmaskarray(masked) & ~missing
        assert np.allclose(values[there], masked.data[there], rtol=1e-6), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["netcdf4", "h5netcdf"])
def test_files_that_xarray_packed(tmp_path: Path, engine: str) -> None:
    values = 280 + 10 * np.random.default_rng(1).standard_normal((ROWS, 3))
    values[::9, 1] = np.nan
    dates = np.arange("2001-01-01", "2001-02-10", dtype="datetime64[D]").astype("datetime64[ns]")
    made = xarray.Dataset(
        {
            "t2m": (("time", "x"), values, {"units": "K"}),
            "plain": (("time", "x"), values.astype("f4")),
            "hours": (("time", "x"), np.abs(values), {"units": "hours"}),
        },
        coords={"time": dates},
    )
    packing = {"dtype": "int16", "scale_factor": 0.002, "add_offset": 280.0, "_FillValue": -32768}
    made.to_netcdf(
        path := tmp_path / "xarray.nc",
        engine=engine,
        encoding={
            "t2m": packing,
            "hours": {"dtype": "uint16", "scale_factor": 0.01, "_FillValue": 65535},
            "time": {"units": "hours since 1900-01-01", "dtype": "int64"},
        },
    )
    with xarray.open_dataset(path, decode_times=False) as file:
        for name, dtype in (("t2m", "i2"), ("plain", "f4"), ("hours", "u2")):
            found = decoded(path, name, dtype)
            assert np.array_equal(found, file[name].values.astype("f4"), equal_nan=True), name
            assert np.isnan(found).sum() == np.isnan(values).sum()
    assert decoding(path, "time") is None
    assert decoding(path, "plain") is None, "NaN stands for none without a warning"


def test_times_stay_as_stored() -> None:
    said = {
        "units": "hours since 1900-01-01",
        "_FillValue": np.int64(-(2**63)),
        "scale_factor": 2.0,
    }
    coding = coding_of(np.dtype("i8"), said)
    assert coding.is_plain
    assert "times are left as stored" in coding.unused[0]
    assert not coding_of(
        np.dtype("i2"), {**said, "_FillValue": np.int16(0), "units": "hours"}
    ).is_plain


@pytest.mark.parametrize("big", [False, True])
def test_attributes_in_all_of_their_forms(tmp_path: Path, big: bool) -> None:
    """Scalars, arrays of one, strings of every kind, either byte order: as h5py returns them."""
    order = ">" if big else "<"
    forms: list[Any] = [
        lambda value: value,
        lambda value: np.array([value], order + value.dtype.str[1:]),
    ]
    words = [
        "true",
        np.bytes_("true"),
        np.array(["true"], h5py.string_dtype()),
        np.array([b"true"]),
    ]
    expected = Coding(unsigned=True, missing=(65535,), scale=0.5, offset=2.0)
    for form, word in itertools.product(forms, words):
        path = tmp_path / "forms.h5"
        with h5py.File(path, "w") as file:
            file["x"] = np.arange(6, dtype=f"{order}i2").reshape(3, 2)
            file["x"].attrs.update(
                {
                    "_Unsigned": word,
                    "_FillValue": form(np.int16(-1)),
                    "missing_value": h5py.Empty("i2"),
                    "scale_factor": form(np.float64(0.5)),
                    "add_offset": form(np.float64(2.0)),
                }
            )
        dataset = open_dataset(str(path))
        assert dataset.codings("x") == (expected,)
        found = decodings([dataset])[0]["x"]
        assert found.viewed == np.dtype("u2")
        numbers = np.array([[0, -1, 7]], "i2")
        assert np.array_equal(found.decode(numbers), [[2, np.nan, 5.5]], equal_nan=True)


def test_what_cannot_be_followed_is_said_or_refused(tmp_path: Path) -> None:
    kind = np.dtype("i2")
    unused = {
        "_FillValue": (40000, "40000 does not fit int16"),
        "missing_value": ("none", "'none' is not a number"),
        "valid_range": (np.array([1.5, 3]), "1.5 does not fit int16"),
        "valid_min": (np.array([1, 2]), "has 2 numbers and not 1"),
        "_Unsigned": ("yes", 'is "true" or "false"'),
    }
    for name, (value, why) in unused.items():
        coding = coding_of(kind, {name: value})
        assert coding.is_plain
        assert coding.unused[0].startswith(f"{name}: ")
        assert why in coding.unused[0]
    assert coding_of(np.dtype("?"), {"scale_factor": 2.0}) == PLAIN
    for said in ({"valid_range": np.array([0, 255], "u1")}, {"valid_max": np.uint8(255)}):
        assert coding_of(np.dtype("u1"), said) == PLAIN, "no number is outside"
    assert coding_of(np.dtype("i1"), {"valid_range": np.int8([0, -1]), "_Unsigned": "true"}) == (
        Coding(unsigned=True)
    )
    for value in (np.array([1.0, 2.0]), "0.5", np.nan):
        with h5py.File(path := tmp_path / "bad.h5", "w") as file:
            file["x"] = np.arange(4, dtype="i2")
            file["x"].attrs["scale_factor"] = value
        with pytest.raises(
            DatasetError, match=r'bad.h5: field "x": scale_factor = .* decode = "none"'
        ):
            decoding(path, "x")
        assert decodings([open_dataset(str(path)).as_stored(["x"])]) == [{}]


def test_every_file_has_its_own(tmp_path: Path) -> None:
    scales = [0.5, 0.25, 0.5, 2.0]
    for number, scale in enumerate(scales):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["x"] = np.arange(6, dtype="i2").reshape(3, 2)
            file["y"] = np.arange(3, dtype="i1")
            file["x"].attrs.update(scale_factor=scale, add_offset=float(number))
    dataset = open_dataset(str(tmp_path))
    found = decodings([dataset])[0]
    assert list(found) == ["x"]
    rows = np.array([11, 0, 7, 4])
    codes = found["x"].codes(rows)
    assert codes is not None
    numbers = np.tile(np.int16([0, 2]), (4, 1))
    expected = [[3, 7], [0, 1], [2, 3], [1, 1.5]]
    assert np.array_equal(found["x"].decode(numbers, codes), expected)
    assert decoding_record(dataset, "x")
    assert decoding_record(dataset, "y") == ""
    assert decoding_record(dataset.as_stored(["x"]), "x") == ""


def test_integers_that_only_mark_what_is_missing(tmp_path: Path) -> None:
    with h5py.File(path := tmp_path / "labels.h5", "w") as file:
        for name in ("label", "scaled"):
            file[name] = np.array([0, 3, -1, 2], "i2")
            file[name].attrs["_FillValue"] = np.int16(-1)
        file["scaled"].attrs["scale_factor"] = 2.0
    kept = decoding(path, "label", "label", "scaled")
    assert kept is not None
    assert kept.keeps_numbers
    numbers = np.array([0, 3, -1, 2], "i2")
    assert kept.decode(numbers).dtype == np.int16
    assert kept.missing(numbers).tolist() == [False, False, True, False]
    assert decoding(path, "label").decoded == np.float32  # type: ignore[union-attr]
    assert decoding(path, "scaled", "scaled").decoded == np.float32  # type: ignore[union-attr]


def test_codings_survive_index_and_catalogue(written: Path, tmp_path: Path) -> None:
    coding = Coding(
        missing=(np.nan, 1e20, -np.inf), least=-1, scale=0.1, unsigned=True, is_single=True
    )
    document = json.loads(json.dumps(coding.to_json(), allow_nan=False))
    assert repr(coding_from(document)) == repr(coding)
    for broken in ({"scale": "x"}, {"other": 1}, {"missing": [True]}, {"least": None}):
        with pytest.raises((TypeError, ValueError)):
            coding_from(broken)
    expected = {name: open_dataset(str(written), [name]).codings(name) for name in VARIABLES}
    assert expected["filled"] == (Coding(missing=(float(F4(1e20)),)),)
    write_catalogue(out := tmp_path / "all.json", [look_into(str(written), None)])
    listed = read_catalogue(out)[0]
    make_index(str(written.parent), list(VARIABLES), jobs=1)
    try:
        indexed = open_dataset(str(written.parent))
        for name, codings in expected.items():
            assert indexed.codings(name) == codings == (listed.arrays[name].coding,)
        # Of an index that was made before anybody asked, the files are asked.
        index = written.parent / "index.json"
        old = json.loads(index.read_text())
        del old["shards"][0]["codings"], old["checksum"]
        old["version"] = 1
        index.write_text(json.dumps(old))
        assert open_dataset(str(written.parent), ["era5"]).codings("era5") == expected["era5"]
    finally:
        index.unlink()
