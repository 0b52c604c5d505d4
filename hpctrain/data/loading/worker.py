"""Where worker processes begin; and one that transforms samples, in memory shared with its rank.

It is started afresh, not forked, and by nobody's main module: MPI, torch and the rank's threads are
not in it. It has the rank's place in no world: those variables are not in its environment.
"""

from __future__ import annotations

import importlib
import mmap
import os
import select
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpctrain.config.importing import build_transform
from hpctrain.data.arrays import Bytes
from hpctrain.data.dataset import Field
from hpctrain.data.loading.sample_transform import SampleError, SampleRunner
from hpctrain.errors import ConfigError

_ALIGNMENT = 64
"""Bytes that every array of a slot begins at a multiple of."""
IGNORED = frozenset(
    {
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGXCPU,
    }
)
"""Signals that schedulers send to all processes of a job, of which the ranks decide."""


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
            descriptor = new_file()
            os.ftruncate(descriptor, size)
        self.descriptor = descriptor
        memory = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        self.raw_inputs, start = _cut(memory, 0, layout.rows, layout.inputs)
        self.raw_outputs, _ = _cut(memory, start, layout.rows, layout.outputs)
        self.inputs = _typed(self.raw_inputs, layout.inputs)
        self.outputs = _typed(self.raw_outputs, layout.outputs)

    def __del__(self) -> None:
        os.close(self.descriptor)


def new_file() -> int:
    """Return the descriptor of a file without a name, in memory."""
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


def main() -> None:
    """Serve the process at the other end of a socket; the last arguments say how, and which."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)  # blocked since before this process began
    descriptor, service = int(sys.argv.pop()), sys.argv.pop()
    threading.Thread(target=_end_with_rank, args=(descriptor,), daemon=True).start()
    connection = Connection(descriptor)
    try:
        module, _, name = service.partition(":")
        getattr(importlib.import_module(module), name)(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the rank has closed its end, or is gone


def serve_transform(connection: Any) -> None:
    """Transform samples for a rank, until it closes its end."""
    key, reference, arguments = connection.recv()
    try:
        runner = SampleRunner(build_transform(key, reference, arguments))
    except ConfigError as error:
        connection.send(str(error))
        return
    except Exception:  # noqa: BLE001 - whatever the user's class raises
        connection.send(traceback.format_exc())
        return
    connection.send(None)
    slots: dict[int, Slot] = {}
    while True:
        number, layout, start, stop, keys, training = connection.recv()
        if layout is not None:
            slots[number] = Slot(layout, reduction.recv_handle(connection))
        slot = slots[number]
        rows = slice(start, stop)
        try:
            runner.fill(
                {name: array[rows] for name, array in slot.inputs.items()},
                keys,
                {name: array[rows] for name, array in slot.outputs.items()},
                training=training,
            )
        except SampleError as error:
            connection.send(error)
        else:
            connection.send(None)


def _end_with_rank(descriptor: int) -> None:
    """End at once when the rank does, also in the midst of a sample."""
    poll = select.poll()
    poll.register(descriptor, 0)  # hanging up is always reported
    poll.poll()
    os._exit(0)
