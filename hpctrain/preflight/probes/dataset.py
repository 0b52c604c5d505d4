"""Reads some real batches; looks whether every node sees the shards; tries a file lock."""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.loader import TrainLoader
from hpctrain.utils.files import open_regular

_READ_SECONDS = 3.0
_MOST_BATCHES = 50
_MOST_SHARDS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one rank has read: its shares of the first global batches."""

    samples: int
    batches: int
    num_bytes: int
    seconds: float


def read_batches(loader: TrainLoader, bytes_per_sample: int) -> Reading:
    """Read real batches for some seconds.

    Raises:
        DatasetError: naming file, field and row that cannot be read.
    """
    samples = batches = 0
    begin = time.perf_counter()
    try:
        for batch in islice(loader.epoch(0), _MOST_BATCHES):
            samples += batch.size
            batches += 1
            if time.perf_counter() - begin > _READ_SECONDS:
                break
        seconds = time.perf_counter() - begin
    finally:
        loader.close()
    return Reading(
        samples=samples, batches=batches, num_bytes=samples * bytes_per_sample, seconds=seconds
    )


def unseen_shards(dataset: Dataset) -> list[str]:
    """Return what this node does not see of the shards, evenly chosen where there are many."""
    every = max(1, len(dataset.shards) // _MOST_SHARDS)
    wrong = []
    for shard in dataset.shards[::every]:
        try:
            size = Path(shard.path).stat().st_size
            if size != shard.size:
                wrong.append(f"{shard.path}: {size} bytes here, {shard.size} on rank 0")
            elif not os.access(shard.path, os.R_OK):
                wrong.append(f"{shard.path}: not readable here")
        except OSError as error:
            wrong.append(f"{shard.path}: {error.strerror}")
    return wrong


def try_lock(path: str) -> str | None:
    """Return what the lock that HDF5 takes for reading fails of; None: it works."""
    descriptor = open_regular(path)
    try:
        # What HDF5 itself calls; through h5py HDF5_USE_FILE_LOCKING would decide it.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        os.close(descriptor)
    return None
