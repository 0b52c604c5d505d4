"""A dataset in memory, once on each node: the node's ranks fill it together and gather from it.

It is a file in /dev/shm that loses its name as soon as all ranks of the node have it open. So
nothing is left behind, however a job ends: the system frees the memory with the last process.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil

from hpctrain.data.arrays import Bytes
from hpctrain.data.dataset import Dataset
from hpctrain.data.reading.handles import Locate, where_it_is
from hpctrain.data.reading.retry import READ_RETRIES
from hpctrain.data.reading.rows import open_rows
from hpctrain.data.reading.threads import Helpers
from hpctrain.errors import ConfigError
from hpctrain.topology import Communicator, Topology, on_all_ranks
from hpctrain.utils.files import open_regular
from hpctrain.utils.proc import memory_limits

SHARED = Path("/dev/shm")
SPARE = 1 / 16
"""Of the free memory, left to the training itself at the least."""
READ_BYTES = 64 * 2**20
"""Values that are read at once while filling."""
ALIGNMENT = 4096
_OTHERWISE = 'set data.cache = "none" to read from the files while training'


def hold_on_node(
    dataset: Dataset,
    topology: Topology,
    communicator: Communicator,
    *,
    threads: int = 1,
    retries: int = READ_RETRIES,
    locate: Locate = where_it_is,
) -> Mapping[str, Bytes]:
    """Read a dataset into the memory of every node. Collective: all ranks.

    Args:
        dataset: with the fields that are wanted, and no others.
        topology: of this rank.
        communicator: of all ranks.
        threads: of this rank, to read with.
        retries: how often a read that fails is tried again.
        locate: as ShardReader takes it.

    Returns:
        By field, (samples, row_bytes) uint8 in native byte order, shared by the node's ranks.

    Raises:
        ConfigError: on every rank, if a node has not the memory, or its ranks no common /dev/shm.
        DatasetError: on every rank, if a file cannot be read.
    """
    places, size = plan(dataset)
    name = SHARED / f"hpctrain-{secrets.token_hex(8)}"
    leads = topology.local_rank == 0
    descriptor = -1

    def make() -> tuple[int, str]:
        if leads:
            require_room(size, dataset.source)
            try:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            except OSError as error:
                raise ConfigError(
                    f'data.cache = "memory": {SHARED}: {error.strerror}; {_OTHERWISE}'
                ) from error
        return topology.node_rank, str(name) if leads else ""

    def open_it() -> int:
        try:
            return _open_own(names[topology.node_rank])
        except OSError as error:
            raise ConfigError(
                f'data.cache = "memory": the ranks of this node do not share {SHARED} '
                f"({error.strerror}): give their containers one, such as by --ipc=host, or "
                f"{_OTHERWISE}"
            ) from error

    def keep() -> None:
        nonlocal descriptor
        descriptor = open_it()

    try:
        names = {node: path for node, path in on_all_ranks(communicator, make) if path}
        on_all_ranks(communicator, keep)
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise
    finally:
        if leads:
            name.unlink(missing_ok=True)
    try:
        on_all_ranks(communicator, lambda: os.ftruncate(descriptor, size) if leads else None)
        memory = mmap.mmap(descriptor, size)
        fields = {
            field: np.frombuffer(memory, np.uint8, count, place).reshape(dataset.samples, -1)
            for field, (place, count) in places.items()
        }
        rows = share(dataset, topology.local_rank, topology.local_world_size)

        def fill() -> None:
            _reserve(descriptor, dataset, places, rows)
            _read(dataset, rows, fields, threads=threads, retries=retries, locate=locate)

        on_all_ranks(communicator, fill)
    finally:
        os.close(descriptor)
    return fields


def _open_own(name: str) -> int:
    """Open the file that a rank of this node has made, and none that somebody else put there.

    Raises:
        OSError: if it is not there, or not this user's alone.
    """
    descriptor = open_regular(name, os.O_RDWR, follow_links=False)
    facts = os.fstat(descriptor)
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "it is somebody else's", name)
    return descriptor


def plan(dataset: Dataset) -> tuple[dict[str, tuple[int, int]], int]:
    """Return where each field begins and its bytes, and the bytes of all."""
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name, field in dataset.fields.items():
        count = dataset.samples * field.row_bytes
        places[name] = end, count
        end += -(-count // ALIGNMENT) * ALIGNMENT
    return places, end


def share(dataset: Dataset, local_rank: int, local_world_size: int) -> range:
    """Return the rows that a rank reads for its node; no two ranks undo the same chunk."""
    step = dataset.chunk_rows
    chunks = -(-dataset.samples // step)
    first, stop = (chunks * each // local_world_size for each in (local_rank, local_rank + 1))
    return range(first * step, min(stop * step, dataset.samples))


def require_room(size: int, source: str) -> None:
    """Check that so many bytes fit into the memory of this node.

    Raises:
        ConfigError: with the numbers, and what to do.
    """
    (free, _), shared = host_memory(), shared_memory()
    least, place = min((free, "this job's memory on the node"), (shared, str(SHARED)))
    if size > least * (1 - SPARE):
        raise ConfigError(
            f'data.cache = "memory": {source} takes {size / 1e9:,.1f} GB on every node, and '
            f"{place} has {least / 1e9:,.1f} GB free: ask for more memory, or {_OTHERWISE}"
        )


def _reserve(
    descriptor: int, dataset: Dataset, places: Mapping[str, tuple[int, int]], rows: range
) -> None:
    """Take the memory of this rank's rows: from now on a lack of it cannot kill the process."""
    for name, (place, _) in places.items():
        row_bytes = dataset.fields[name].row_bytes
        if not len(rows):
            continue
        try:
            os.posix_fallocate(descriptor, place + rows.start * row_bytes, len(rows) * row_bytes)
        except OSError as error:
            raise ConfigError(
                f'data.cache = "memory": {SHARED}: {error.strerror}; {_OTHERWISE}'
            ) from error


def _read(
    dataset: Dataset,
    rows: range,
    fields: Mapping[str, Bytes],
    *,
    threads: int,
    retries: int,
    locate: Locate,
) -> None:
    reader = open_rows(dataset, retries=retries, locate=locate, helpers=Helpers(threads))
    with closing(reader) as access:
        for name, values in fields.items():
            most = max(1, READ_BYTES // dataset.fields[name].row_bytes)
            most += -most % dataset.chunk_rows
            for first in range(rows.start, rows.stop, most):
                stop = min(first + most, rows.stop)
                access.read_runs(
                    name,
                    np.array([first]),
                    np.array([stop - first]),
                    values[first:stop],
                    np.array([0]),
                )


def host_memory() -> tuple[int, int]:
    """Return free and total bytes of what this job may take: of its control groups, or the node."""
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    for group in memory_limits():
        total = min(total, group.limit)
        free = min(free, max(0, group.limit - group.used))
    return free, total


def shared_memory() -> int:
    """Return the free bytes of /dev/shm; 0 where there is none."""
    try:
        found = os.statvfs(SHARED)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize
