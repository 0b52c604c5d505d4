"""configs/forecast.toml on fields of a flow: files as a model of the weather writes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.jobs import here, hpctrain, in_turn
from helpers.launching import ROOT
from helpers.runs import metrics

from hpctrain.config import load
from hpctrain.data.opening.open_datasets import open_datasets

pytestmark = pytest.mark.ranks(3)

GRID = 16
HOURS = 240
YEARS = (2000, 2001, 2002)
OPTIONS = ("run.directory=runs", "logging.every_steps=1", "logging.progress=none")


def vorticity(seed: int) -> np.ndarray:
    """Integrate two-dimensional turbulence on a torus, pseudo-spectral, with third-order steps.

    Returns:
        (time, latitude, longitude) float64, of standard deviation 1 at the start.
    """
    k = np.fft.fftfreq(GRID, 1 / GRID)
    kx, ky = k[None, :], k[:, None]
    squared = kx**2 + ky**2
    inverse = np.divide(1, squared, where=squared > 0, out=np.zeros_like(squared))
    kept = (np.abs(kx) < GRID / 3) & (np.abs(ky) < GRID / 3)

    def tendency(spectrum: np.ndarray) -> np.ndarray:
        u = np.fft.ifft2(1j * ky * inverse * spectrum).real
        v = np.fft.ifft2(-1j * kx * inverse * spectrum).real
        gradient = [np.fft.ifft2(1j * each * spectrum).real for each in (kx, ky)]
        advection = kept * np.fft.fft2(u * gradient[0] + v * gradient[1])
        return -advection - 1e-3 * squared * spectrum

    noise = np.fft.fft2(np.random.default_rng(seed).standard_normal((GRID, GRID)))
    spectrum = noise * kept * np.exp(-squared / 8)
    spectrum /= np.fft.ifft2(spectrum).real.std()
    states = []
    for _ in range(HOURS):
        states.append(np.fft.ifft2(spectrum).real)
        first = spectrum + 0.05 * tendency(spectrum)
        second = 0.75 * spectrum + 0.25 * (first + 0.05 * tendency(first))
        spectrum = spectrum / 3 + 2 / 3 * (second + 0.05 * tendency(second))
    return np.array(states)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forecast")
    (folder / "data" / "weather").mkdir(parents=True)
    for year in YEARS:
        states = vorticity(year)
        with h5py.File(folder / "data" / "weather" / f"{year}.h5", "w") as file:
            file["state/fields"] = np.stack([states, np.gradient(states, axis=2)]).astype("f4")
            file["state/zonal_mean"] = 4 * states.mean(axis=2).astype("f4")
            file["quality/good"] = np.arange(HOURS) % 120 != 60
    shutil.copy(ROOT / "configs" / "forecast.toml", folder / "forecast.toml")
    return folder


def test_a_forecast_from_files_as_they_are(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It learns, every sample is seen once an epoch, and the curve is that of any world size."""
    monkeypatch.chdir(site)
    config = load("forecast.toml")
    expected, _ = open_datasets(config.data, ["state", "zonal_mean"])
    curves = []
    for ranks in (1, 3):
        job = ["forecast.toml", *OPTIONS, f"run.name=of_{ranks}", "training.max_epochs=4"]
        said = here(site, *job) if ranks == 1 else hpctrain(site, ranks, *job).stderr
        assert "forecast" in said
        assert "read through HDF5" not in said
        records = metrics(site / "runs" / f"of_{ranks}", "train")
        assert records[-1]["samples_seen"] == 4 * expected.samples
        curves.append([record["loss"] for record in records])
        assert len(metrics(site / "runs" / f"of_{ranks}", "evaluation")) == 4
    assert np.mean(curves[0][-5:]) < 0.2 * np.mean(curves[0][:5])
    assert np.allclose(curves[0][:5], curves[1][:5], rtol=1e-4)


def test_packed_files_train_as_the_floats_that_they_stand_for(site: Path) -> None:
    """Each file has a scale of its own, and values are missing: the same bits, on two ranks."""
    for year in YEARS:
        with h5py.File(site / "data" / "weather" / f"{year}.h5") as file:
            fields = {name: file[name][:] for name in ("state/fields", "state/zonal_mean")}
            good = file["quality/good"][:]
        for folder in ("packed", "floats"):
            (site / folder).mkdir(exist_ok=True)
        with (
            h5py.File(site / "packed" / f"{year}.h5", "w") as packed,
            h5py.File(site / "floats" / f"{year}.h5", "w") as floats,
        ):
            packed["quality/good"] = floats["quality/good"] = good
            for name, values in fields.items():
                scale, offset = 2e-4 * (year - 1998), 0.25 * (year - 2000)
                numbers = np.clip((values - offset) / scale, -32000, 32000).astype("i2")
                if name == "state/zonal_mean":
                    numbers[::3, :4] = -32768
                packed[name] = numbers
                said = {"scale_factor": scale, "add_offset": offset, "_FillValue": np.int16(-32768)}
                packed[name].attrs.update(said)
                decoded = (numbers * scale + offset).astype("f4")
                decoded[numbers == -32768] = np.nan
                floats[name] = decoded
    options = [
        "data.fields.zonal_mean.mask=there",
        "data.normalize={state={mean=0.1,std=1.5}}",
        "training.max_steps=6",
    ]
    curves = []
    folders = ("packed", "floats")
    jobs = (
        ["forecast.toml", *OPTIONS, *options, f"run.name={name}", f"data.train={name}/*.h5"]
        for name in folders
    )
    for folder, ended in zip(folders, in_turn(site, 2, *jobs), strict=True):
        assert ended.code == 0, ended.output
        said = "decoded: state, int16 x 0.0004 to 0.0008" in ended.output
        assert said == (folder == "packed")
        run = site / "runs" / folder
        curves.append(
            [record["loss"] for kind in ("train", "evaluation") for record in metrics(run, kind)]
        )
    assert len(curves[0]) == 7
    assert np.isfinite(curves[0]).all()
    assert curves[0] == curves[1]
