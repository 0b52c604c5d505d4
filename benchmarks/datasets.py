"""torch Datasets read here, and by torch's DataLoader with as many workers.

Samples cost what a loop of so many microseconds does, and draw nothing, from torch's generator, or
from all three, of which each sample here has numbers of its own. Epochs of both take turns; the
ratios are those of medians, by the clock and of the CPU time of all processes, which other programs
on the machine disturb less. The last column is what seeding costs a sample, in microseconds of one
process.

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
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpctrain.data.loading.map_style.dataset import MapDataset
from hpctrain.data.loading.map_style.fetch import Fetcher
from hpctrain.data.loading.map_style.loaders import MapTrainLoader
from hpctrain.data.loading.map_style.parcel import Parcel
from hpctrain.data.loading.map_style.passes import PassReader
from hpctrain.data.loading.map_style.workers import Travelling, processes
from hpctrain.data.order.batches import Batching, Epochs, RankShare
from hpctrain.data.order.order import Order, sample_keys

COSTS = (0, 20, 100, 1000)
DRAWS = ("none", "torch", "all")
Epoch = tuple[float, float]
"""Seconds by the clock, and of CPU time."""


class Costly(Dataset[Any]):
    """Images of 3 x 32 x 32 and a class, each at a cost of processor time."""

    def __init__(self, microseconds: int, samples: int, *, draws: str) -> None:
        self.seconds = microseconds / 1e6
        self.images = torch.rand(samples, 3, 32, 32)
        self.draws = draws

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        end = time.thread_time() + self.seconds
        image = self.images[index]
        if self.draws != "none":
            image = image + torch.rand(1)
        if self.draws == "all":
            image = image * random.random() * np.random.rand()  # noqa: NPY002
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
    epochs = Epochs(order, found.source, Batching(global_batch_size=batch), RankShare())
    return MapTrainLoader(found, epochs, reader)


def taken_by(batches: Iterable[Any]) -> Epoch:
    """Return how long an epoch takes."""
    begin, cpu = time.perf_counter(), cpu_seconds()
    for _ in batches:
        pass
    return time.perf_counter() - begin, cpu_seconds() - cpu


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its workers so far."""
    here = psutil.Process()
    each = (process.cpu_times() for process in (here, *here.children(recursive=True)))
    return float(sum(times.user + times.system for times in each))


def seeding(dataset: Dataset[Any], batch: int) -> float:
    """Return by how many microseconds the seeding makes a sample slower, in this process."""
    rows = np.arange(batch)
    keys = sample_keys(1, 0, rows)
    least = []
    for seeded in (True, False):
        fetcher = Fetcher(dataset, None, seeded=seeded)
        fetcher.samples(rows, keys)  # finds out what it draws from
        times = []
        for _ in range(30):
            begin = time.thread_time()
            fetcher.samples(rows, keys)
            times.append(time.thread_time() - begin)
        least.append(min(times))
    return (least[0] - least[1]) / batch * 1e6


def compare(microseconds: int, workers: int, batch: int, rounds: int, draws: str) -> None:
    """Print samples a second of both, and their ratios."""
    samples = batch * max(20, min(100, 400_000 // (batch * max(1, microseconds))))
    dataset = Costly(microseconds, samples, draws=draws)
    here = ours(dataset, samples, workers, batch)
    there = DataLoader(
        dataset, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=True
    )
    taken: dict[str, list[Epoch]] = {"here": [], "there": []}
    for turn in range(rounds + 1):
        for name, epoch in (("here", here.epoch(turn)), ("there", there)):
            seconds = taken_by(epoch)
            if turn:  # the first one starts the workers
                taken[name].append(seconds)
    here.close()
    (clock, cpu), (their_clock, their_cpu) = (
        [statistics.median(item) for item in zip(*each, strict=True)] for each in taken.values()
    )
    rates = f"{samples / clock:10,.0f} {samples / their_clock:10,.0f}"
    ratios = f"{their_clock / clock:7.2f} {their_cpu / cpu:7.2f}"
    cost = seeding(Costly(0, batch, draws=draws), batch)
    print(f"{microseconds:5d} us  {draws:<6} {rates} {ratios} {cost:8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--costs", type=int, nargs="*", default=COSTS, help="microseconds")
    parsed = parser.parse_args()
    print("a sample draws    hpctrain DataLoader   ratio     CPU  seeding")
    for draws in DRAWS:
        for cost in parsed.costs:
            compare(cost, parsed.workers, parsed.batch, parsed.rounds, draws)


if __name__ == "__main__":
    main()
