"""Fields of a reanalysis by date, decoded by the CF conventions, beside xarray and a DataLoader.

Files are written by xarray: years of (time, level, latitude, longitude), packed to 16 bits as ERA5
is, or as floats, contiguous or in compressed chunks. A sample is two steps and the step 6 rows
later, of the years that are for training. Epochs take turns; the ratio is that of the medians, and
processor seconds are of all threads and workers.

    python benchmarks/reanalysis.py [--workers 0 2] [--batch 8] [--rounds 5] [--rows 400]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch.utils.data import DataLoader, Dataset

from hpctrain.config.schema_data import DataSection, FieldTable, SamplesTable
from hpctrain.data.decoding import decodings
from hpctrain.data.loading.decoder import Decoder, Decoding
from hpctrain.data.loading.loader import LoaderOptions, TrainLoader
from hpctrain.data.loading.preprocessing import Preprocessing
from hpctrain.data.opening.open_datasets import open_for_training
from hpctrain.data.order.batches import Batching, Epochs, RankShare
from hpctrain.data.order.order import Order

LEVELS, LATITUDES, LONGITUDES = 3, 91, 180
YEARS = (2000, 2001, 2002)
LEAD = 6
PACKED = {"dtype": "i2", "scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -32768}
CHUNKS = {"chunksizes": (1, LEVELS, LATITUDES, LONGITUDES)}
LAYOUTS: dict[str, dict[str, Any]] = {
    "int16": PACKED,
    "int16, zlib": {**PACKED, **CHUNKS, "zlib": True, "shuffle": True, "complevel": 1},
    "float32": {"dtype": "f4", "_FillValue": None},
}


def write(folder: Path, layout: str, rows: int) -> None:
    """Write a file a year; the last one is for validation."""
    generator = np.random.default_rng(0)
    shape = (rows, LEVELS, LATITUDES, LONGITUDES)
    grid = {
        "level": [1000, 850, 500],
        "latitude": np.linspace(90, -90, LATITUDES),
        "longitude": np.arange(LONGITUDES) * 2.0,
    }
    for year in YEARS:
        values = 280 + generator.standard_normal(shape, dtype=np.float32).cumsum(3) / 4
        time_of = xr.date_range(f"{year}", periods=rows, freq="6h")
        made = xr.Dataset({"t": (("time", *grid), values)}, {"time": time_of, **grid})
        made.to_netcdf(folder / f"{year}.nc", encoding={"t": LAYOUTS[layout]})


class Windows(Dataset[Any]):
    """What people write: xarray opened by each worker, rows taken by number."""

    def __init__(self, folder: Path, first: str, last: str) -> None:
        self.paths = sorted(str(path) for path in folder.glob("*.nc"))
        self.files: list[Any] = []
        self.samples = []
        for number, path in enumerate(self.paths):
            with xr.open_dataset(path) as opened:
                wanted = opened.indexes["time"].slice_indexer(first, last)
                stop = range(opened.sizes["time"])[wanted].stop - LEAD
                self.samples += [(number, row) for row in range(wanted.start or 0, stop)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.files:
            self.files = [xr.open_dataset(path, cache=False).t for path in self.paths]
        number, row = self.samples[index]
        of = self.files[number]
        state = of.isel(time=slice(row, row + 2)).to_numpy()
        target = of.isel(time=row + LEAD).to_numpy()
        return torch.from_numpy(state), torch.from_numpy(target)


def ours(folder: Path, batch: int, threads: int) -> TrainLoader:
    """Return a loader of hpctrain, on a CPU."""
    section = DataSection(
        train=str(folder / "*.nc"),
        global_batch_size=batch,
        fields={
            "state": FieldTable(path="t", steps=2),
            "target": FieldTable(path="t", lead=LEAD),
        },
        samples=SamplesTable(train={"time": [str(YEARS[0]), str(YEARS[-2])]}),
    )
    names = ["state", "target"]
    dataset = open_for_training(section, names)
    decoder = Decoder(decodings([dataset])[0], {}, torch.device("cpu"))
    order = Order.for_dataset(dataset, seed=1, global_batch_size=batch)
    return TrainLoader(
        dataset,
        Epochs(order, dataset.source, Batching(global_batch_size=batch), RankShare()),
        LoaderOptions(device=torch.device("cpu"), buffer_mb=512.0, threads=threads),
        fields=names,
        preprocessing=Preprocessing(decoding=Decoding(on_device=decoder)),
    )


class Turn(NamedTuple):
    """What an epoch took: seconds by the clock, and of processors."""

    seconds: float
    processor_seconds: float


def taken_by(epoch: Callable[[], Iterator[Any]]) -> Turn:
    """Return what an epoch takes, in this process and in workers that end with it."""
    before, begin = os.times(), time.perf_counter()
    for _ in epoch():
        pass
    seconds, after = time.perf_counter() - begin, os.times()
    return Turn(seconds, sum(after[:4]) - sum(before[:4]))


def compare(layout: str, workers: int, batch: int, rounds: int, rows: int) -> None:
    """Print samples a second and processor milliseconds a sample of both, and their ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, layout, rows)
        here = ours(folder, batch, max(1, workers))
        windows = Windows(folder, str(YEARS[0]), str(YEARS[-2]))
        assert here.epoch_size == len(windows)
        kept, ending = (
            DataLoader(
                windows,
                batch_size=batch,
                shuffle=True,
                num_workers=workers,
                persistent_workers=stays and workers > 0,
            )
            for stays in (True, False)
        )
        turns: dict[str, list[Turn]] = {"here": [], "there": []}
        for number in range(rounds + 1):
            for who, epoch in (
                ("here", lambda number=number: here.epoch(number)),
                ("there", lambda: iter(kept)),
            ):
                turn = taken_by(epoch)
                if number:  # the first one starts the workers
                    turns[who].append(turn)
        # What workers took is known once they have ended.
        last = taken_by(lambda: iter(ending))
        here.close()
        samples = len(windows)
    seconds = [statistics.median(turn.seconds for turn in each) for each in turns.values()]
    cpu = [min(turn.processor_seconds for turn in turns["here"]), last.processor_seconds]
    print(
        f"{layout:12s} {workers} {samples / seconds[0]:10,.0f} {samples / seconds[1]:10,.0f}"
        f" {seconds[1] / seconds[0]:6.2f} {1e3 * cpu[0] / samples:10.3f}"
        f" {1e3 * cpu[1] / samples:8.3f} {cpu[1] / cpu[0]:6.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, nargs="*", default=(0, 2))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=400, help="of each of the three years")
    parsed = parser.parse_args()
    print("samples/s, ratio; processor ms a sample, ratio; of hpctrain and of xarray + DataLoader")
    print("layout workers   hpctrain     xarray  ratio   hpctrain   xarray  ratio")
    for layout in LAYOUTS:
        for workers in parsed.workers:
            compare(layout, workers, parsed.batch, parsed.rounds, parsed.rows)


if __name__ == "__main__":
    main()
