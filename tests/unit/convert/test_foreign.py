"""Packing what other tools write: each file by its own tool, each value as that tool reads it."""

from __future__ import annotations

import gc
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xarray as xr
import zarr
from helpers.packing import packed_values
from pyarrow import feather, parquet
from scipy.io import netcdf_file

from hpctrain.convert.pack import Packing, pack
from hpctrain.convert.sources.opening import Reading, open_source
from hpctrain.convert.sources.source import Source
from hpctrain.convert.sources.table import Table
from hpctrain.data import open_dataset
from hpctrain.errors import DatasetError
from hpctrain.launch.communicators import SingleCommunicator

Values = dict[str, np.ndarray]
ROWS = 23


def all_rows(source: Source) -> Values:
    """Read a source, as ranks do: in two parts, one of them out of order."""
    order = np.r_[np.arange(11, source.samples), np.arange(11)[::-1]]
    parts = [source.read(part) for part in (order[:5], order[5:])]
    if isinstance(source, Table):
        source.close()
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: values[np.argsort(order)] for name, values in joined.items()}


def weather() -> xr.Dataset:
    """Make what public stores of reanalyses hold: packed variables over time, level, lat, lon."""
    draw = np.random.default_rng(0)
    t = draw.normal(280, 9, (ROWS, 2, 4, 3))
    t[3, 1, 2, 0] = np.nan
    return xr.Dataset(
        {
            "t": (("time", "level", "lat", "lon"), t, {"units": "K"}),
            "t2m": (("time", "lat", "lon"), t[:, 0].astype("f4"), {"units": "K"}),
        },
        {
            "time": pd.date_range("1979-01-01", periods=ROWS, freq="6h"),
            "level": ("level", [500, 850]),
            "lat": np.linspace(90, -90, 4),
            "lon": np.linspace(0, 359, 3),
        },
    )


PACKED = {"dtype": "i2", "scale_factor": 0.002, "add_offset": 280.0, "_FillValue": -32768}


def zarr_2(folder: Path) -> tuple[str, xr.Dataset]:
    path = f"{folder}/era5.zarr"
    encoding = {"t": PACKED, "t2m": {"_FillValue": np.nan}}
    weather().to_zarr(path, zarr_format=2, encoding=encoding, consolidated=True)
    return path, xr.open_zarr(path)


def zarr_3(folder: Path) -> tuple[str, xr.Dataset]:
    path = f"{folder}/era5.zarr"
    chunks = {"t": {**PACKED, "chunks": (5, 2, 4, 2)}, "t2m": {"_FillValue": -1.0}}
    weather().to_zarr(path, zarr_format=3, encoding=chunks, consolidated=False)
    return path, xr.open_zarr(path, consolidated=False)


def netcdf_3(folder: Path) -> tuple[str, xr.Dataset]:
    path = f"{folder}/classic.nc"
    weather().to_netcdf(path, engine="scipy", encoding={"t": PACKED}, unlimited_dims=["time"])
    return path, xr.load_dataset(path, engine="scipy")


def netcdf_cdf5(folder: Path) -> tuple[str, xr.Dataset]:
    path = f"{folder}/classic.nc"
    weather().to_netcdf(path, engine="netcdf4", format="NETCDF3_64BIT_DATA", encoding={"t": PACKED})
    return path, xr.load_dataset(path, engine="netcdf4")


@pytest.mark.parametrize("make", [zarr_2, zarr_3, netcdf_3, netcdf_cdf5])
def test_variables_are_what_xarray_reads(
    tmp_path: Path, make: Callable[[Path], tuple[str, xr.Dataset]]
) -> None:
    path, itself = make(tmp_path)
    stored = open_source([path], Reading())
    assert isinstance(stored, Table)
    # Coordinates are left out; what is packed stays so, and keeps what is said of it.
    assert stored.fields.keys() == {"t", "t2m"}
    assert stored.fields["t"].dtype == "int16"
    assert stored.attributes["t"]["scale_factor"] == 0.002
    assert stored.attributes["t"]["_FillValue"] == -32768
    assert stored.attributes["t"]["units"] == "K"

    pack(lambda: stored, tmp_path / "out", Packing(shard_rows=7), SingleCommunicator())
    stored.close()
    packed = packed_values(tmp_path / "out")
    for name, decoded in all_rows(Table(path, stored.columns, frozenset({"t"}))).items():
        expected = itself[name].to_numpy().astype("f4")
        np.testing.assert_array_equal(decoded, expected)
        np.testing.assert_array_equal(packed[name], expected)


def test_arrays_and_groups_of_zarr_itself(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    image = draw.integers(0, 255, (ROWS, 3, 5), "u1")
    for version in (2, 3):
        group = zarr.open_group(tmp_path / f"{version}.zarr", mode="w", zarr_format=version)
        group.create_array("train/image", data=image, chunks=(4, 3, 5))
        group.create_array("train/label", data=np.arange(ROWS), chunks=(23,))
        alone = zarr.create_array(
            tmp_path / f"alone{version}.zarr", data=image, zarr_format=version
        )
        assert alone.ndim == 3
        found = all_rows(open_source([str(tmp_path / f"{version}.zarr")], Reading()))
        assert found.keys() == {"train/image", "train/label"}
        np.testing.assert_array_equal(found["train/image"], image)  # 0 is a value, not missing
        one = all_rows(open_source([f"y={tmp_path}/{version}.zarr:train/label"], Reading()))
        np.testing.assert_array_equal(one["y"], np.arange(ROWS))
        lone = all_rows(open_source([f"image={tmp_path}/alone{version}.zarr"], Reading()))
        np.testing.assert_array_equal(lone["image"], image)
    with zarr.storage.ZipStore(tmp_path / "x.zarr.zip", mode="w") as store:
        zarr.create_array(store, name="image", data=image)
    zipped = all_rows(open_source([f"{tmp_path}/x.zarr.zip"], Reading()))
    np.testing.assert_array_equal(zipped["image"], image)


def read_whole(texts: list[str]) -> Values:
    source = open_source(texts, Reading())
    return source.read(np.arange(source.samples))


def columns(read: pd.DataFrame) -> Values:
    return {n: np.stack(list(read[n])) if n == "vector" else read[n].to_numpy() for n in read}


def frame() -> pd.DataFrame:
    draw = np.random.default_rng(2)
    return pd.DataFrame(
        {
            "x": draw.normal(size=ROWS),
            "gap": np.where(np.arange(ROWS) == 4, np.nan, 1.5),
            "label": np.arange(ROWS, dtype="i4"),
            "ok": np.arange(ROWS) % 3 == 0,
            "vector": list(draw.normal(size=(ROWS, 5)).astype("f4")),
        }
    )


def by_pandas_parquet(folder: Path) -> tuple[str, Values]:
    table = frame()
    table.iloc[:9].to_parquet(folder / "a.parquet", row_group_size=4)
    table.iloc[9:].to_parquet(folder / "b.parquet", compression="zstd")
    read = pd.concat([pd.read_parquet(folder / f"{name}.parquet") for name in "ab"])
    return f"{folder}/*.parquet", columns(read)


def by_pandas_feather(folder: Path) -> tuple[str, Values]:
    frame().to_feather(folder / "x.feather")
    read = pd.read_feather(folder / "x.feather")
    return f"{folder}/x.feather", columns(read)


def arrow_table() -> tuple[pa.Table, Values]:
    draw = np.random.default_rng(3)
    grid, pair = draw.normal(size=(ROWS, 2, 3)), draw.integers(0, 9, (ROWS, 2), "i2")
    half = draw.normal(size=ROWS).astype("f2")
    inner = pa.FixedSizeListArray.from_arrays(pa.array(grid.ravel()), 3)
    return pa.table(
        {
            "grid": pa.FixedSizeListArray.from_arrays(inner, 2),
            "pair": pa.array(list(pair), pa.list_(pa.int16())),
            "half": pa.array(half),
            "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(grid.astype("f4")),
        }
    ), {"grid": grid, "pair": pair, "half": half, "tensor": grid.astype("f4")}


def by_arrow_file(folder: Path) -> tuple[str, Values]:
    table, values = arrow_table()
    with pa.ipc.new_file(f"{folder}/x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=6)
    return f"{folder}/x.arrow", values


def by_arrow_stream(folder: Path) -> tuple[str, Values]:
    table, values = arrow_table()
    with pa.ipc.new_stream(f"{folder}/x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=6)
    return f"{folder}/x.arrow", values


def by_arrow_parquet(folder: Path) -> tuple[str, Values]:
    table, values = arrow_table()
    parquet.write_table(table.slice(0, 10), f"{folder}/x-2.parquet", row_group_size=3)
    parquet.write_table(table.slice(10), f"{folder}/x-10.parquet")
    return f"{folder}/x-*.parquet", values


@pytest.mark.parametrize(
    "make",
    [by_pandas_parquet, by_pandas_feather, by_arrow_file, by_arrow_stream, by_arrow_parquet],
)
def test_columns_are_what_their_tool_reads(
    tmp_path: Path, make: Callable[[Path], tuple[str, Values]]
) -> None:
    pattern, values = make(tmp_path)
    found = all_rows(open_source([pattern], Reading()))
    assert found.keys() == values.keys()
    for name, expected in values.items():
        assert found[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(found[name], expected)


def test_columns_that_are_no_numbers(tmp_path: Path) -> None:
    gaps = pa.table({"n": pa.array([*range(8), None]), "x": pa.array([1.0] * 9)})
    lists = pa.table({"n": pa.array([[1, 2], [3, 4], [5]])})
    texts = pa.table({"text": pa.array(["a", "b"]), "n": pa.array([1, 2])})
    for name, table in {"gaps": gaps, "lists": lists, "texts": texts}.items():
        parquet.write_table(table, f"{tmp_path}/{name}.parquet", row_group_size=3)
    feather.write_feather(texts, f"{tmp_path}/texts.feather")
    for name, words in {
        "gaps.parquet": 'column "n", row 8: there is no value',
        "lists.parquet": 'column "n", row 2: a list of other length',
        "texts.parquet": 'column "text" is string, which is no number',
        "texts.feather": 'column "text" is string, which is no number',
        "texts.parquet:m": "m",
    }.items():
        with pytest.raises(DatasetError, match=words):
            read_whole([f"{tmp_path}/{name}"])
    named = open_source([f"label={tmp_path}/texts.parquet:n"], Reading())
    assert named.read(np.array([1]))["label"].tolist() == [2]


def test_damaged_ones_are_named(tmp_path: Path) -> None:
    for name in ("x.parquet", "x.arrow", "x.feather", "x.zarr.zip"):
        (tmp_path / name).write_bytes(b"PAR1 and not much more")
        with pytest.raises(DatasetError, match=name):
            open_source([f"{tmp_path}/{name}"], Reading())
    (tmp_path / "cut.nc").write_bytes(b"CDF\1\0\0")
    with pytest.raises(DatasetError, match=r"cut\.nc"):
        open_source([f"{tmp_path}/cut.nc"], Reading())
    (tmp_path / "x.zarr").mkdir()
    (tmp_path / "x.zarr" / "zarr.json").write_text("{")
    with pytest.raises(DatasetError, match=r"x\.zarr"):
        open_source([f"{tmp_path}/x.zarr"], Reading())


@pytest.mark.parametrize(
    ("module", "extra", "make"),
    [
        ("zarr", "zarr", zarr_2),
        ("scipy", "netcdf3", netcdf_3),
        ("netCDF4", "netcdf3", netcdf_cdf5),
        ("pyarrow", "arrow", by_arrow_file),
        ("pyarrow", "arrow", by_arrow_parquet),
    ],
)
def test_the_extra_that_is_missing_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    extra: str,
    make: Callable[[Path], tuple[str, Any]],
) -> None:
    path, _ = make(tmp_path)
    found = importlib.import_module

    def refuse(name: str, *arguments: Any) -> Any:
        if name.partition(".")[0] == module:
            raise ImportError(name=name)
        return found(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(DatasetError, match=rf"{module}, which is not installed.*\[{extra}\]"):
        open_source([path], Reading())


def test_attributes_are_in_the_shards(tmp_path: Path) -> None:
    path, _ = zarr_2(tmp_path)
    pack(lambda: open_source([path], Reading()), tmp_path / "o", Packing(), SingleCommunicator())
    with h5py.File(next((tmp_path / "o").glob("shard-*.h5"))) as file:
        assert file["t"].attrs["add_offset"] == 280.0
        assert file["t"].attrs["units"] == "K"


def test_classic_files_that_nobody_closes_are_closed_without_a_warning(tmp_path: Path) -> None:
    with netcdf_file(tmp_path / "x.nc", "w") as file:
        file.createDimension("time", 5)
        file.createVariable("t", "i2", ("time",))[:] = np.arange(5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        source = open_source([str(tmp_path / "x.nc")], Reading())
        assert source.read(np.arange(5))["t"].tolist() == list(range(5))
        del source
        gc.collect()
    assert not told


@pytest.mark.parametrize("suffix", [".h5ad", ".nc4", ".cdf", ".mat", ".hdf", ".loom"])
def test_hdf5_by_other_names(tmp_path: Path, suffix: str) -> None:
    """In folders, by patterns, and as a source; not beside shards, nor what is no HDF5."""
    for number in range(2):
        with h5py.File(tmp_path / f"{number}{suffix}", "w") as file:
            file["x"] = np.arange(3) + 3 * number
    (tmp_path / f"old{suffix}").write_bytes(b"MATLAB 5.0 MAT-file")
    assert open_dataset(str(tmp_path)).samples == 6
    assert open_dataset(f"{tmp_path}/[01]{suffix}").samples == 6
    for source in (str(tmp_path), f"{tmp_path}/[01]{suffix}", f"x={tmp_path}/[01]{suffix}:x"):
        found = open_source([source], Reading()).read(np.arange(6))
        assert found["x"].tolist() == list(range(6))
    with h5py.File(tmp_path / "shard.h5", "w") as file:
        file["x"] = np.arange(2)
    assert open_dataset(str(tmp_path)).samples == 2
