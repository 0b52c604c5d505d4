"""torch Datasets read here, and by torch's DataLoader with as many workers.

Samples cost what a loop of so many microseconds does; epochs of both take turns, and the ratio is
that of the medians. One line a cost, also with a Dataset that draws from all three generators, of
which each sample here has numbers of its own.

    python benchmarks/datasets.py [--workers 2] [--batch 64] [--rounds 5] [--costs 0 100]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpctrain.data.loading.map_style.dataset import MapDataset
from hpctrain.data.loading.map_style.fetch import Fetcher
from hpctrain.data.loading.map_style.loaders import MapTrainLoader
from hpctrain.data.loading.map_style.parcel import Parcel
from hpctrain.data.loading.map_style.passes import PassReader
from hpctrain.data.loading.map_style.service import Travelling
from hpctrain.data.loading.map_style.workers import processes
from hpctrain.data.order import Order

COSTS = (0, 20, 100, 1000)


class Costly(Dataset[Any]):
    """Images of 3 x 32 x 32 and a class, each at a cost of processor time."""

    def __init__(self, microseconds: int, samples: int, *, draws: bool) -> None:
        self.seconds = microseconds / 1e6
        self.images = torch.rand(samples, 3, 32, 32)
        self.draws = draws

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        end = time.thread_time() + self.seconds
        image = self.images[index]
        if self.draws:
            image = image + torch.rand(1) * random.random() * np.random.rand()  # noqa: NPY002
        while time.thread_time() < end:
            pass
        return image, index


def ours(dataset: Dataset[Any], samples: int, workers: int, batch: int) -> Any:
    """Return a loader of hpctrain."""
    found = MapDataset(source="benchmark", dataset=dataset, samples=samples, workers=workers)
    order = Order.for_dataset(found, seed=1, global_batch_size=batch, is_resident=True)
    parcel = Parcel.of(Travelling(dataset, None, None))
    pool = processes("benchmark", parcel, workers, dict(os.environ), seeded=True, used=())
    reader = PassReader(found, Fetcher(dataset, None, seeded=True), pool, torch.device("cpu"))
    return MapTrainLoader(
        found,
        order,
        reader,
        global_batch_size=batch,
        micro_batch_size=None,
        drop_last=False,
        rank=0,
        world_size=1,
    )


def seconds_of(batches: Iterable[Any]) -> float:
    """Return how long an epoch takes."""
    begin = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - begin


def compare(microseconds: int, workers: int, batch: int, rounds: int, *, draws: bool) -> None:
    """Print samples a second of both, and their ratio."""
    samples = batch * max(20, min(100, 400_000 // (batch * max(1, microseconds))))
    dataset = Costly(microseconds, samples, draws=draws)
    here = ours(dataset, samples, workers, batch)
    there = DataLoader(
        dataset, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=True
    )
    taken: dict[str, list[float]] = {"here": [], "there": []}
    for turn in range(rounds + 1):
        for name, epoch in (("here", here.epoch(turn)), ("there", there)):
            seconds = seconds_of(epoch)
            if turn:  # the first one starts the workers
                taken[name].append(seconds)
    here.close()
    ours_rate, theirs = (samples / statistics.median(each) for each in taken.values())
    what = f"{microseconds:5d} us{', draws' if draws else '':8s}"
    print(f"{what} {ours_rate:10,.0f} {theirs:10,.0f}   {ours_rate / theirs:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--costs", type=int, nargs="*", default=COSTS, help="microseconds")
    parsed = parser.parse_args()
    print("a sample            hpctrain DataLoader   ratio, samples a second")
    for draws in (False, True):
        for cost in parsed.costs:
            compare(cost, parsed.workers, parsed.batch, parsed.rounds, draws=draws)


if __name__ == "__main__":
    main()
