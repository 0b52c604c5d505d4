"""Files as xarray writes them of a reanalysis: years, levels, latitudes, orography in another file.

Trained by date with errors weighted by latitude, on any number of ranks, stopped at a random step.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from helpers.jobs import here, in_turn
from helpers.runs import metrics

from hpctrain import load_model

pytestmark = pytest.mark.ranks(3)

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(5, 2, 3, padding=1)

    def forward(self, state, orography):
        assert len(orography) == len(state)
        past = state.flatten(1, 2)
        return state[:, -1] + self.conv(torch.cat([past, orography[:, None]], 1))
"""
CONFIG = """
[run]
name = "one"
[model]
use = "weather_nets:Net"
[task]
use = "regression"
inputs = ["state", "orography"]
target = "next"
[data]
train = "era/*.nc"
global_batch_size = 7
[data.fields.state]
path = "z"
steps = 2
select = {level = [500, 850]}
[data.fields.next]
path = "z"
lead = 3
select = {level = [500, 850]}
weight = "cos_latitude"
[data.fields.orography]
path = "zs"
train = "constant.nc"
static = true
squeeze = true
[data.normalize]
orography = "stats"
[data.samples]
train = {time = ["2000", "2001-01-05"]}
validation = {time = ["2001-01-06", "2001-01-10"]}
test = {time = ["2001-01-11", ""]}
[optimizer]
use = "adamw"
lr = 1e-3
[training]
max_epochs = 2
[checkpoint]
every_steps = 1
[logging]
every_steps = 1
"""
LEVELS = [500, 850]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import xarray as xr

    site = tmp_path_factory.mktemp("weather")
    (site / "era").mkdir()
    (site / "weather_nets.py").write_text(MODULE, encoding="utf-8")
    (site / "run.toml").write_text(CONFIG, encoding="utf-8")
    generator = np.random.default_rng(0)
    grid = {
        "level": [1000, 850, 500],
        "latitude": ("latitude", np.linspace(75, -75, 6, dtype="f4"), {"units": "degrees_north"}),
        "longitude": np.arange(8) * 45.0,
    }
    for year in (2000, 2001):
        time = xr.date_range(f"{year}", periods=60, freq="6h", calendar="noleap", use_cftime=True)
        z = generator.standard_normal((60, 3, 6, 8)).astype("f4").cumsum(0)
        fields = {"z": (("time", *grid), z)}
        made = xr.Dataset(fields, {"time": time, **grid})
        encoding = {"time": {"units": f"hours since {year}-01-01 00:00:0.0"}}
        made.to_netcdf(site / "era" / f"{year}.nc", engine="h5netcdf", encoding=encoding)
    orography = 1000 * generator.random((1, 6, 8)).astype("f4")
    constant = xr.Dataset({"zs": (("time", "latitude", "longitude"), orography)})
    constant.to_netcdf(site / "constant.nc", engine="h5netcdf")
    return site


def test_by_date_and_latitude_on_any_number_of_ranks(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import xarray as xr

    said = here(site, "run.toml")
    assert "train: time 2000-01-01 to 2001-01-05T18:00, 80 rows of 120" in said
    assert "validation: time 2001-01-06 to 2001-01-10T18:00, 20 rows of 120" in said
    stop = random.Random(site.name).randrange(1, 20)
    two = ["run.toml", 'run.name="two"']
    ended = in_turn(
        site,
        2,
        [*two, f"training.max_steps={stop}"],
        two,
        [*two, 'run.name="fsdp"', 'training.strategy="fsdp"'],
    )
    assert [each.code for each in ended] == [0, 0, 0], [each.output for each in ended]
    ended = in_turn(
        site,
        3,
        ["test", *two, "--json", "--checkpoint", "last"],
        ["predict", *two, "--output", "two.nc", "--split", "test", "--checkpoint", "last"],
        ["run.toml", 'run.name="late"', 'data.samples.train={time=["2000","2001-01-06"]}'],
        [*two, 'data.fields.next.weight="cell_area"', "training.max_epochs=3"],
        ["check", *two, "--json"],
    )
    assert [each.code for each in ended][:4] == [0, 0, 78, 65], [each.output for each in ended]
    step = {each["name"]: each for each in json.loads(ended[4].stdout)["findings"]}
    assert step["step"]["status"] == "pass", ended[4].output
    assert "train: time 2000-01-01 to 2001-01-05T18:00" in step["dataset"]["fact"]
    assert "train and validation have 4 rows in common, time 2001-01-06 to" in ended[2].output

    one, others = metrics(site / "runs" / "one", "train"), ("two", "fsdp")
    for kind in ("train", "evaluation"):
        one = metrics(site / "runs" / "one", kind)
        for other in (metrics(site / "runs" / name, kind) for name in others):
            # The stopped run has evaluated once more, where it stopped.
            steps = {each["step"]: each for each in other}
            for each in one:
                own = {key: each[key] for key in ("loss", "mae", "rmse") if key in each}
                assert {key: steps[each["step"]][key] for key in own} == pytest.approx(own, 2e-5)

    # The test's metrics are those of xarray of the file of predictions.
    tested = json.loads(ended[0].stdout)
    truth = xr.open_dataset(site / "era" / "2001.nc").z.sel(level=LEVELS)
    with xr.open_dataset(site / "two.nc") as predicted:
        assert predicted.z.dims == ("time", "level", "latitude", "longitude")
        assert predicted.level.values.tolist() == LEVELS
        assert predicted.time.dt.calendar == "noleap"
        assert str(predicted.time.values[0]).startswith("2001-01-11 00:00")
        xr.testing.assert_equal(predicted.latitude.drop_vars("lead_time"), truth.latitude)
        rows = range(40, 57)
        assert predicted.sizes["time"] >= len(rows) == tested["samples"]
        later = truth.isel(time=[row + 3 for row in rows]).values
        error = predicted.z[: len(rows)].load() - later
    weights = np.cos(np.deg2rad(error.latitude))
    mse = (error**2).weighted(weights).mean().item()
    expected = {
        "loss": mse,
        "mse": mse,
        "rmse": mse**0.5,
        "mae": abs(error).weighted(weights).mean().item(),
    }
    assert tested["metrics"] == pytest.approx(expected, rel=1e-5)
    # Orography was the same array in every batch, normalised by its own numbers.
    monkeypatch.syspath_prepend(str(site))
    model = load_model(site / "runs" / "two")
    zs = xr.open_dataset(site / "constant.nc").zs.values
    made = model(truth.isel(time=slice(40, 42)).values[None], zs)
    assert np.allclose(made[0], error.isel(time=0) + later[0], atol=1e-5)
