"""Fields without samples and weights of latitudes, from files of xarray, h5py and WeatherBench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray as xr

from hpctrain.config.schema_data import DataSection, FieldTable, SamplesTable, SourceTable
from hpctrain.data.files.coordinates import latitude_weights
from hpctrain.data.loading.batch_transform import Constants
from hpctrain.data.opening.open_datasets import open_for_evaluation, open_for_training
from hpctrain.data.view import View
from hpctrain.errors import DatasetError, TrainingError

# Of a Gaussian grid with 8 latitudes.
GAUSSIAN = np.rad2deg(np.arcsin(np.polynomial.legendre.leggauss(8)[0]))
GRIDS = {
    "regular": np.linspace(90, -90, 7),
    "no poles": np.linspace(-87.1875, 87.1875, 32),
    "gaussian": GAUSSIAN[::-1].copy(),
    "float32": np.linspace(-60, 60, 9, dtype=np.float32),
}


def _opened(
    train: Path | str, fields: dict[str, FieldTable], names: list[str], **more: Any
) -> View:
    section = DataSection(train=str(train), global_batch_size=4, fields=fields, **more)
    found = open_for_training(section, names)
    assert isinstance(found, View)
    return found


def _write(path: Path, latitude: Any, name: str = "latitude", **attributes: Any) -> xr.Dataset:
    values = np.random.default_rng(0).standard_normal((3, 2, len(latitude), 4))
    made = xr.Dataset(
        {"t2m": (("time", "level", name, "lon"), values)}, {name: (name, latitude, attributes)}
    )
    made.to_netcdf(path, engine="h5netcdf")
    return made


def _weatherbench2(latitude: np.ndarray) -> np.ndarray:
    """Return what weatherbench2.metrics.get_lat_weights computes of ascending latitudes."""
    points = np.deg2rad(latitude)
    edges = np.concatenate([[-np.pi / 2], (points[:-1] + points[1:]) / 2, [np.pi / 2]])
    areas = np.sin(edges[1:]) - np.sin(edges[:-1])
    return areas / areas.mean()


@pytest.mark.parametrize("grid", GRIDS)
def test_weights_are_those_of_xarray_and_weatherbench(tmp_path: Path, grid: str) -> None:
    latitude = GRIDS[grid]
    made = _write(tmp_path / "a.nc", latitude)
    weighted = made.t2m.weighted(np.cos(np.deg2rad(made.latitude)))
    expected = weighted.mean(("level", "latitude", "lon")).values
    for kind in ("cos_latitude", "cell_area"):
        fields = {"t2m": FieldTable(weight=kind)}  # type: ignore[arg-type]
        weights = _opened(tmp_path / "a.nc", fields, ["t2m"]).static["t2m.weight"]
        assert weights.shape == (1, len(latitude), 1)
        assert weights.mean() == pytest.approx(1)
        means = (made.t2m.values * weights).mean((1, 2, 3))
        if kind == "cos_latitude":
            np.testing.assert_allclose(means, expected, rtol=1e-6)
        elif grid != "float32":  # which is no whole sphere
            ascending = _weatherbench2(np.sort(latitude))
            np.testing.assert_allclose(np.sort(weights.ravel()), np.sort(ascending), rtol=1e-9)
    assert latitude_weights(GRIDS["float32"].astype(float), "cell_area").sum() == pytest.approx(
        2 * np.sin(np.deg2rad(67.5))
    )


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("y", {"standard_name": "latitude"}),
        ("y", {"units": "degrees_north"}),
        ("y", {"units": "degrees_N"}),
        ("lat", {}),
        ("lat", {"units": "radians"}),
    ],
)
def test_latitude_is_found_by_cf(tmp_path: Path, name: str, attributes: dict[str, str]) -> None:
    latitude = np.linspace(-75, 75, 6)
    stored = np.deg2rad(latitude) if "radians" in attributes.values() else latitude
    _write(tmp_path / "a.nc", stored, name, **attributes)
    fields = {
        "x": FieldTable(
            path="t2m",
            weight="cos_latitude",
            steps=2,
            select={"0": [1], name: stored[1:4].tolist()},
            squeeze=True,
        )
    }
    found = _opened(tmp_path / "a.nc", fields, ["x"])
    assert found.fields["x"].shape == (2, 3, 4)
    weights = found.static["x.weight"]
    assert weights.shape == (1, 3, 1)
    cosines = np.cos(np.deg2rad(latitude[1:4]))
    np.testing.assert_allclose(weights.ravel(), cosines / cosines.mean())


def test_latitude_that_is_not_found_is_refused_with_names(tmp_path: Path) -> None:
    fields = {"t2m": FieldTable(weight="cos_latitude")}
    _write(tmp_path / "none.nc", np.linspace(-75, 75, 6), "y")
    with pytest.raises(DatasetError, match=r'none of its coord.*/y,.*standard_name = "latitude"'):
        _opened(tmp_path / "none.nc", fields, ["t2m"])
    _write(tmp_path / "rotated.nc", np.arange(6.0), "lat", standard_name="grid_latitude")
    with pytest.raises(DatasetError, match=r"none of its coordinates is a latitude"):
        _opened(tmp_path / "rotated.nc", fields, ["t2m"])
    for name, latitude, problem in (
        ("mixed", [10.0, 30.0, 20.0], "does not go from south to north"),
        ("wide", [0.0, 100.0, 200.0], "goes to 200 degrees"),
        ("pole", [90.0, 91.0], "goes to 91 degrees"),
    ):
        _write(tmp_path / f"{name}.nc", np.array(latitude))
        with pytest.raises(DatasetError, match=problem):
            _opened(tmp_path / f"{name}.nc", fields, ["t2m"])
    _write(tmp_path / "two0.nc", np.linspace(-75, 75, 6))
    _write(tmp_path / "two1.nc", np.linspace(75, -75, 6))
    with pytest.raises(DatasetError, match=r"two1.nc: latitude .* is not the same as in"):
        _opened(tmp_path / "two*.nc", fields, ["t2m"])
    with h5py.File(tmp_path / "plain.h5", "w") as file:  # no scales: by name and length
        file["t2m"], file["lat"] = np.zeros((5, 4, 6)), np.linspace(-45, 45, 4)
    weights = _opened(tmp_path / "plain.h5", fields, ["t2m"]).static["t2m.weight"]
    assert weights.shape == (4, 1)
    along = {"t2m": FieldTable(axis=1, weight="cos_latitude")}
    with pytest.raises(DatasetError, match="samples along latitude"):
        _opened(tmp_path / "plain.h5", along, ["t2m"])


def test_static_fields_are_read_as_fields_are(tmp_path: Path) -> None:
    surface = np.arange(24, dtype=np.float32).reshape(1, 4, 6)
    kinds = np.array([b"sea", b"land", b"sea", b"land"])
    for number in range(3):
        made = xr.Dataset(
            {
                "x": (("time", "y"), np.full((2, 3), number, np.float32)),
                "z": (("one", "lat", "lon"), surface),
                "packed": (("lat", "lon"), np.where(surface[0] == 5, np.nan, surface[0])),
                "index": (("lat",), np.arange(4, dtype=np.int16)),
            },
            {"lat": [30.0, 20.0, 10.0, 0.0]},
        )
        packing = {"dtype": "i2", "scale_factor": 0.5, "_FillValue": -1}
        made.to_netcdf(tmp_path / f"{number}.nc", engine="h5netcdf", encoding={"packed": packing})
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["kinds"] = kinds
        file["table"] = np.array([(1.0, 2), (3.0, 4)], [("a", "<f4"), ("b", ">i4")])
    other = str(tmp_path / "other.h5")
    fields = {
        "z": FieldTable(static=True, squeeze=True, select={"lat": [20, 0]}),
        "packed": FieldTable(static=True),
        "raw": FieldTable(static=True, path="packed", decode="none", select={"0": "1:3"}),
        "index": FieldTable(static=True, dtype="int64"),
        "kinds": FieldTable(static=True, train=other, dtype="bytes"),
        "b": FieldTable(static=True, train=other, path="table/b"),
    }
    found = _opened(tmp_path / "*.nc", fields, ["x"])
    assert found.samples == 6
    assert found.static["z"].tolist() == surface[0, [1, 3]].tolist()
    np.testing.assert_array_equal(found.static["packed"], made.packed.astype("f4"))
    assert (found.static["raw"].dtype, found.static["raw"].shape) == (np.int16, (2, 6))
    assert found.static["index"].dtype == np.int64
    assert found.static["kinds"].shape == (4, 4)
    assert found.static["b"].tolist() == [2, 4]
    everything = open_for_training(
        DataSection(train=str(tmp_path / "*.nc"), global_batch_size=4, fields=fields | {
            "x": FieldTable()}), [])  # fmt: skip
    assert list(everything.fields) == ["x"]
    again = _opened(tmp_path / "*.nc", fields, ["x"])
    assert again.fingerprint == found.fingerprint
    with h5py.File(tmp_path / "other.h5", "a") as file:
        file["table"][0] = (1.0, 3)
    assert _opened(tmp_path / "*.nc", fields, ["x"]).fingerprint != found.fingerprint


def test_static_fields_that_are_not_there_or_not_the_same(tmp_path: Path) -> None:
    for number in (0, 1):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["x"] = np.zeros((4, 2), np.float32)
            file["same"] = np.array([1.0, np.nan])
            file["other"] = np.array([1.0, number])
            file["text"] = "text"
    pattern = tmp_path / "*.h5"
    assert _opened(pattern, {"same": FieldTable(static=True)}, ["x"]).static["same"][0] == 1
    for name, problem in (
        ("other", r'1.h5: field "other" is not the same as in .*0.h5'),
        ("gone", r'field "gone": is not there: name a file that has it, data.fields.gone.train'),
        ("text", r'field "text": it is text'),
    ):
        with pytest.raises(DatasetError, match=problem):
            _opened(pattern, {name: FieldTable(static=True)}, ["x"])
    section = DataSection(
        train=str(tmp_path / "0.h5"),
        validation=str(tmp_path / "1.h5"),
        global_batch_size=2,
        fields={"other": FieldTable(static=True)},
        samples=SamplesTable(),
    )
    validation = open_for_evaluation(section, ["x"])
    assert isinstance(validation, View)
    assert validation.static["other"].tolist() == [1, 1]
    sources = tuple(SourceTable(name=n, train=str(tmp_path / f"{n}.h5")) for n in "01")
    mixed = {"train": "", "sources": sources, "fields": section.fields}
    with pytest.raises(DatasetError, match='the static field "other" is another in "1"'):
        open_for_training(DataSection(global_batch_size=2, **mixed), ["x"])


def test_a_batch_has_them_once_for_each_sample_without_a_copy() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    constants = Constants({"z": values})
    spread = constants.spread(5)["z"]
    assert spread.shape == (5, 2, 3)
    assert spread.data_ptr() == values.data_ptr()
    assert constants.spread(0)["z"].shape == (0, 2, 3)
    with pytest.raises(RuntimeError):
        spread.mul_(2)
    constants.spread(1)["z"].mul_(2)
    with pytest.raises(TrainingError, match='the static field "z" was changed in place'):
        constants.spread(5)
