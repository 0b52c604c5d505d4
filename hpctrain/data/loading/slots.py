"""Memory for groups of samples, before and after their transform, that processes can share."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Field
from hpctrain.data.reading.pieces import Bytes

_ALIGNMENT = 64


class SlotLayout(NamedTuple):
    """What a slot has room for.

    Attributes:
        rows: samples.
        inputs: by name, what of a sample is handed to the transform.
        outputs: by name, what it returns.
    """

    rows: int
    inputs: Mapping[str, Field]
    outputs: Mapping[str, Field]

    @property
    def total_bytes(self) -> int:
        fields = [*self.inputs.values(), *self.outputs.values()]
        return sum(_aligned(self.rows * field.row_bytes) for field in fields)


class Slot:
    """Room for one group of samples.

    The memory is a file without a name, in memory: it is gone with the last process that has it,
    however that ends, and no limit of /dev/shm holds for it.

    Attributes:
        descriptor: of the file, for other processes to map.
        layout: what is where.
        inputs: by name, (rows, *shape).
        outputs: by name, (rows, *shape).
        raw_inputs: the same memory as `inputs`, (rows, row_bytes) uint8.
        raw_outputs: the same memory as `outputs`.
    """

    def __init__(self, layout: SlotLayout, descriptor: int | None = None) -> None:
        """Make room, or map that of another process; the descriptor is then the slot's."""
        self.layout = layout
        size = max(1, layout.total_bytes)
        if descriptor is None:
            descriptor = _new_file()
            os.ftruncate(descriptor, size)
        self.descriptor = descriptor
        memory = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        self.raw_inputs, start = _cut(memory, 0, layout.rows, layout.inputs)
        self.raw_outputs, _ = _cut(memory, start, layout.rows, layout.outputs)
        self.inputs = _typed(self.raw_inputs, layout.inputs)
        self.outputs = _typed(self.raw_outputs, layout.outputs)

    def __del__(self) -> None:
        os.close(self.descriptor)


def _new_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("hpctrain-samples")
    with tempfile.TemporaryFile() as file:  # not on Linux
        return os.dup(file.fileno())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _cut(
    memory: Bytes, start: int, rows: int, fields: Mapping[str, Field]
) -> tuple[dict[str, Bytes], int]:
    """Return (rows, row_bytes) of every field, from `start` on, and where they end."""
    cut = {}
    for name, field in fields.items():
        size = rows * field.row_bytes
        cut[name] = memory[start : start + size].reshape(rows, field.row_bytes)
        start += _aligned(size)
    return cut, start


def _typed(raw: Mapping[str, Bytes], fields: Mapping[str, Field]) -> dict[str, npt.NDArray[Any]]:
    return {
        name: raw[name].view(field.dtype.newbyteorder("=")).reshape(-1, *field.shape)
        for name, field in fields.items()
    }
