"""configs/forecast.toml on fields of a flow: files as a model of the weather writes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from test_main_job import ROOT, hpctrain, metrics

from hpctrain.config import load
from hpctrain.data.finding.opening import open_datasets

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
        name = f"run.name=of_{ranks}"
        ended = hpctrain(site, ranks, "forecast.toml", *OPTIONS, name, "training.max_epochs=4")
        assert "read through HDF5" not in ended.stdout + ended.stderr
        records = metrics(site / "runs" / f"of_{ranks}", "train")
        assert records[-1]["samples_seen"] == 4 * expected.samples
        curves.append([record["loss"] for record in records])
        assert len(metrics(site / "runs" / f"of_{ranks}", "evaluation")) == 4
    assert np.mean(curves[0][-5:]) < 0.2 * np.mean(curves[0][:5])
    assert np.allclose(curves[0][:5], curves[1][:5], rtol=1e-4)
