"""Values of samples of unequal length in host memory: read to their places, neighbours in one go.

Knows no torch.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hpctrain.data.arrays import Bytes, Int64s, groups_of, within
from hpctrain.data.reading.rows import ViewReader
from hpctrain.data.reading.scatter import LEAST_DIRECT_BYTES
from hpctrain.data.view import View

STAGED_BYTES = 4 * 2**20
"""Values that go many ways are read in one piece of about so much, and copied from there."""
LEAST_BYTES = 4096
"""Of a piece of memory."""


class HostValues(NamedTuple):
    """The values of a field of some samples, in host memory.

    Attributes:
        values: (rows of all, bytes of a row) uint8.
        offsets: (samples + 1,) int64, where those of each sample begin, and the end.
    """

    values: Bytes
    offsets: Int64s


class ValuePool:
    """Memory of any size that is used again as soon as nobody refers to it."""

    def __init__(self, allocate: Callable[[int], Bytes]) -> None:
        """Take memory from `allocate(bytes)`, in sizes that are powers of two."""
        self._allocate = allocate
        self._free: dict[int, deque[Bytes]] = {}

    def take(self, rows: int, size: int) -> Bytes:
        """Return (rows, size) uint8: an array object of its own, so that its end can be watched."""
        whole_size = 1 << max(LEAST_BYTES, rows * size - 1).bit_length()
        free = self._free.setdefault(whole_size, deque())
        whole = free.pop() if free else self._allocate(whole_size)
        view = whole[: rows * size].reshape(rows, size)
        weakref.finalize(view, free.append, whole).atexit = False
        return view


class ValueSource:
    """Reads the fields of a view whose samples are of unequal length."""

    def __init__(self, view: View, access: ViewReader, pool: ValuePool) -> None:
        """Read by `access` to memory of `pool`."""
        self._view = view
        self._access = access
        self._pool = pool
        self._bytes = {name: _value_bytes(view, name) for name in view.ragged}
        self._direct = {name: self._is_direct(name) for name in view.ragged}

    def room(self, samples: Int64s) -> dict[str, HostValues]:
        """Return memory for the values of samples, by field."""
        made = {}
        for name, size in self._bytes.items():
            _, counts = self._view.values_of(name, samples)
            offsets = np.zeros(len(counts) + 1, np.int64)
            np.cumsum(counts, out=offsets[1:])
            total = int(offsets[-1])
            made[name] = HostValues(self._pool.take(total, size), offsets)
        return made

    def read(self, samples: Int64s) -> dict[str, HostValues]:
        """Return the values of samples in this order, by field."""
        made = self.room(samples)
        for name, (values, offsets) in made.items():
            firsts, counts = self._view.values_of(name, samples)
            self._read(name, firsts, counts, values, offsets[:-1])
        return made

    def scatter(
        self,
        samples: Int64s,
        places: Int64s,
        rooms: Sequence[Mapping[str, HostValues]],
        starts: Int64s,
    ) -> None:
        """Read the values of samples, each to its place.

        Args:
            samples: ascending, which they are.
            places: of each among those that the rooms are for.
            rooms: memory, as `room` returns it.
            starts: the place of the first sample of each.
        """
        owners = np.searchsorted(starts, places, side="right") - 1
        for name in self._bytes:
            firsts, counts = self._view.values_of(name, samples)
            hosts = [room[name] for room in rooms]
            to = np.empty_like(firsts)
            for number, host in enumerate(hosts):
                own = owners == number
                to[own] = host.offsets[places[own] - starts[number]]
            put = self._read_each if self._direct[name] else self._copy_each
            put(name, firsts, counts, hosts, owners, to)

    def _read_each(
        self,
        name: str,
        firsts: Int64s,
        counts: Int64s,
        hosts: Sequence[HostValues],
        owners: Int64s,
        to: Int64s,
    ) -> None:
        """Read straight to the places."""
        for number, host in enumerate(hosts):
            own = owners == number
            self._read(name, firsts[own], counts[own], host.values, to[own])

    def _copy_each(
        self,
        name: str,
        firsts: Int64s,
        counts: Int64s,
        hosts: Sequence[HostValues],
        owners: Int64s,
        to: Int64s,
    ) -> None:
        """Read in pieces, as values lie in the file, and copy them from there."""
        size = self._bytes[name]
        item = np.dtype((np.void, size))
        for group in groups_of(counts * size, STAGED_BYTES):
            some = counts[group]
            total = int(some.sum())
            if not total:
                continue
            begins = np.cumsum(some) - some
            staged = self._pool.take(total, size)
            self._read(name, firsts[group], some, staged, begins)
            # As items: numpy moves short rows at the speed of memory then.
            content = staged.view(item).reshape(total)
            inside = within(some)
            into = np.repeat(to[group], some) + inside
            number_of = owners[group]
            if (number_of == number_of[0]).all():
                hosts[int(number_of[0])].values.view(item).reshape(-1)[into] = content
                continue
            of_values = np.repeat(number_of, some)
            for number in np.unique(number_of).tolist():
                own = of_values == number
                hosts[number].values.view(item).reshape(-1)[into[own]] = content[own]

    def _read(self, name: str, firsts: Int64s, counts: Int64s, out: Bytes, places: Int64s) -> None:
        """Read runs of values; those that follow each other, in the file and in memory, as one."""
        filled = counts > 0
        if not filled.any():
            return
        firsts, counts, places = firsts[filled], counts[filled], places[filled]
        begins = np.ones(len(firsts), bool)
        begins[1:] = (firsts[1:] != (firsts + counts)[:-1]) | (places[1:] != (places + counts)[:-1])
        runs = np.flatnonzero(begins)
        self._access.read_values(
            name, firsts[runs], np.add.reduceat(counts, runs), out, places[runs]
        )

    def _is_direct(self, name: str) -> bool:
        """Tell whether samples are read fastest one by one: long ones, not compressed."""
        if self._view.parts[self._view.columns[name].part].heap is not None:
            return True  # whose reader does the same by itself
        dataset, inside = self._view.home(name)
        mean = self._view.fields[name].mean_rows or 1
        at_offsets = all(shard.layouts[inside].offset is not None for shard in dataset.shards)
        return at_offsets and mean * self._bytes[name] >= LEAST_DIRECT_BYTES


def _value_bytes(view: View, name: str) -> int:
    """Return the bytes of one row of a field's values."""
    dataset, inside = view.home(name)
    return dataset.fields[inside].row_bytes
