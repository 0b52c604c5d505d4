"""One process of `benchmarks/data.py`: reads in the way that it is told, as long as it is told.

Every line on stdin is a JSON object {"name", "folder", "batch", "rank", "ranks", "option",
"seconds"}; the answer is {"bytes", "seconds", "cpu"}. What was begun goes on where it was left.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

WINDOW_BYTES = 4 * 2**20
UNCOUNTED = 0.25
"""Part of a turn that comes before it: what was read ahead since the last one is taken then."""
LOOK_SECONDS, MOST_LOOKS = 0.05, 40
"""Between two looks whether a reader is still at work, and how often."""

Passes = Callable[[], Iterator[int]]
"""Starts one pass over the data, which yields the bytes of every batch."""


def raw(folder: Path, batch: int, rank: int, ranks: int, option: str) -> Passes:
    """Read the files from end to end, in turns among ranks; the option: bytes to read them to.

    A window that is used again stays in the cache. What is to be kept has to go to memory.
    """
    memory = memoryview(np.ones(int(option), np.uint8))  # type: ignore[arg-type]
    into = itertools.cycle(
        memory[begin : begin + WINDOW_BYTES] for begin in range(0, len(memory), WINDOW_BYTES)
    )
    descriptors = [os.open(path, os.O_RDONLY) for path in sorted(folder.glob("*.h5"))]

    windows = [
        (descriptor, place)
        for descriptor in descriptors
        for place in range(0, os.fstat(descriptor).st_size, WINDOW_BYTES)
    ]

    def read() -> Iterator[int]:
        for descriptor, place in windows[rank::ranks]:
            yield os.preadv(descriptor, [next(into)], place)

    return read


def hpctrain(folder: Path, batch: int, rank: int, ranks: int, option: str) -> Passes:
    """Iterate over the loader of training; the option: threads."""
    return training(folder, batch, rank, ranks, int(option), in_memory=False)


def chunks(folder: Path, batch: int, rank: int, ranks: int, option: str) -> Passes:
    """Undo all chunks in their order, in one call; the option: threads."""
    from hpctrain.data import open_dataset
    from hpctrain.data.reading.rows import open_rows
    from hpctrain.data.reading.threads import Helpers

    dataset = open_dataset(str(folder))
    access = open_rows(dataset, helpers=Helpers(int(option)))
    field = dataset.fields["x"]
    out = np.ones((dataset.samples, field.row_bytes), np.uint8)

    def read() -> Iterator[int]:
        access.read_runs("x", np.array([0]), np.array([len(out)]), out, np.array([0]))
        yield out.nbytes

    return read


def memory(folder: Path, batch: int, rank: int, ranks: int, option: str) -> Passes:
    """Iterate over the loader of training with data.cache = "memory"; the option: threads."""
    return training(folder, batch, rank, ranks, int(option), in_memory=True)


def training(
    folder: Path, batch: int, rank: int, ranks: int, threads: int, *, in_memory: bool
) -> Passes:
    import torch

    from hpctrain.data import open_dataset
    from hpctrain.data.loading.loader import LoaderOptions, TrainLoader
    from hpctrain.data.order.batches import Batching, Epochs, RankShare
    from hpctrain.data.order.order import Order

    dataset = open_dataset(str(folder))
    batching = Batching(global_batch_size=batch * ranks, drop_last=True)
    order = Order.for_dataset(
        dataset, seed=0, global_batch_size=batch * ranks, is_resident=in_memory
    )
    loader = TrainLoader(
        dataset,
        Epochs(order, dataset.source, batching, RankShare(rank, ranks)),
        LoaderOptions(device=torch.device("cpu"), buffer_mb=512.0, threads=threads),
        fields=list(dataset.fields),
        memory=held(dataset) if in_memory else None,
    )
    epochs = iter(range(2**30))
    row_bytes = dataset.bytes_per_sample

    def read() -> Iterator[int]:
        for share in loader.epoch(next(epochs)):
            yield share.size * row_bytes

    return read


def held(dataset: Any) -> Any:
    """Return a dataset in memory, as one rank alone on its node holds it."""
    from hpctrain.data.staging.node_cache import hold_on_node
    from hpctrain.launch.communicators import SingleCommunicator
    from hpctrain.topology import Topology

    alone = Topology(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        node_rank=0,
        num_nodes=1,
        hosts=("here",),
        launcher="none",
    )
    return hold_on_node(dataset, alone, SingleCommunicator())


def gather(folder: Path, batch: int, rank: int, ranks: int, option: str) -> Passes:
    """Gather random rows from memory, the least that any shuffled batch costs."""
    from hpctrain.data import open_dataset

    values = held(open_dataset(str(folder)).select(["x"]))["x"]
    out = [np.empty((batch, values.shape[1]), np.uint8) for _ in range(8)]

    def read() -> Iterator[int]:
        order = np.random.default_rng().permutation(len(values))
        for number, start in enumerate(range(0, len(order) - batch + 1, batch)):
            target = out[number % len(out)]
            np.take(values, order[start : start + batch], axis=0, out=target, mode="clip")
            yield target.nbytes

    return read


def h5py_rows(folder: Path, batch: int, rank: int, ranks: int, option: str) -> Passes:
    """Read row by row through h5py in a torch Dataset, as most people begin."""
    import h5py
    from torch.utils.data import DataLoader, Dataset

    class Rows(Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.paths = sorted(folder.glob("*.h5"))
            self.stops = np.cumsum([len(h5py.File(path)["x"]) for path in self.paths])
            self.files: dict[int, h5py.File] = {}

        def __len__(self) -> int:
            return int(self.stops[-1])

        def __getitem__(self, row: int) -> tuple[object, object]:
            shard = int(np.searchsorted(self.stops, row, "right"))
            if shard not in self.files:
                self.files[shard] = h5py.File(self.paths[shard])
            row -= int(self.stops[shard - 1]) if shard else 0
            return self.files[shard]["x"][row], self.files[shard]["y"][row]

    return batches(DataLoader(Rows(), batch, shuffle=True, num_workers=int(option)))


def webdataset(folder: Path, batch: int, rank: int, ranks: int, option: str) -> Passes:
    import webdataset as wds

    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = wds.WebDataset(paths, shardshuffle=len(paths), empty_check=False).shuffle(1000)
    samples = samples.decode().to_tuple("x.npy", "y.cls").batched(batch)
    return batches(wds.WebLoader(samples, batch_size=None, num_workers=int(option)))


def litdata(folder: Path, batch: int, rank: int, ranks: int, option: str) -> Passes:
    from litdata import StreamingDataLoader, StreamingDataset

    samples = StreamingDataset(str(folder), shuffle=True)
    return batches(StreamingDataLoader(samples, batch_size=batch, num_workers=int(option)))


def streaming(folder: Path, batch: int, rank: int, ranks: int, option: str) -> Passes:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    samples = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
    return batches(DataLoader(samples, batch_size=batch, num_workers=int(option)))


CONTENDERS = {
    "raw": raw,
    "hpctrain": hpctrain,
    "chunks": chunks,
    "memory": memory,
    "take": gather,
    "h5py": h5py_rows,
    "webdataset": webdataset,
    "litdata": litdata,
    "streaming": streaming,
}


def batches(loader: object) -> Passes:
    """Return the passes of a loader of tuples or dictionaries of tensors."""

    def read() -> Iterator[int]:
        for batch in loader:  # type: ignore[attr-defined]
            values = batch.values() if isinstance(batch, dict) else batch
            yield sum(value.nbytes for value in values if hasattr(value, "nbytes"))

    return read


def main() -> None:
    begun: dict[str, Iterator[int]] = {}
    for line in sys.stdin:
        told = json.loads(line)
        seconds = told.pop("seconds")
        key = json.dumps(told)
        if key not in begun:
            begin = CONTENDERS[told.pop("name")]
            begun[key] = endless(begin(Path(told.pop("folder")), **told))
        read = begun[key]
        take(read, seconds * UNCOUNTED)
        before, start = cpu_seconds(), time.perf_counter()
        done = take(read, seconds)
        elapsed = time.perf_counter() - start
        facts = {"bytes": done, "seconds": elapsed, "cpu": cpu_seconds() - before}
        settle()
        print(json.dumps(facts), flush=True)


def take(read: Iterator[int], seconds: float) -> int:
    """Return the bytes of so many seconds."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        done += next(read)
    return done


def settle() -> None:
    """Wait until nothing reads ahead any more: the next turn is another's."""
    for _ in range(MOST_LOOKS):
        before = cpu_seconds()
        time.sleep(LOOK_SECONDS)
        if cpu_seconds() - before < LOOK_SECONDS / 4:
            return


def endless(passes: Passes) -> Iterator[int]:
    while True:
        yield from passes()


def cpu_seconds() -> float:
    """Return the seconds of this process and its workers, those that ended included."""
    me = psutil.Process()
    times = [me.cpu_times(), *(child.cpu_times() for child in me.children(recursive=True))]
    ended = times[0].children_user + times[0].children_system
    return ended + sum(each.user + each.system for each in times)


if __name__ == "__main__":
    main()
