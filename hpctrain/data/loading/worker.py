"""A worker process of a rank, and `data.sample_transform` in it: one sample after the other.

It is started afresh, not forked, and by nobody's main module: MPI, torch and the rank's threads are
not in it. It has the rank's place in no world: those variables are not in its environment. Samples
are in memory that it shares with its rank.
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
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hpctrain.config.importing import build_transform
from hpctrain.data.arrays import Bytes, UInt64s
from hpctrain.data.dataset import Field, require_supported
from hpctrain.errors import ConfigError, DatasetError

Arrays = Mapping[str, npt.NDArray[Any]]


class SampleTransform(Protocol):
    """A user's own function of one sample, on the host."""

    def __call__(
        self,
        *,
        fields: dict[str, npt.NDArray[Any]],
        generator: np.random.Generator,
        training: bool,
    ) -> Mapping[str, Any]:
        """Return the fields that go to the device: arrays of the same shapes for every sample.

        Args:
            fields: by name, (*shape) as stored; the callee's to change until it returns.
            generator: of numbers that belong to (seed, epoch, sample): the same at any world
                size and number of workers, and after a restart.
            training: False in an evaluation.
        """
        ...


class SampleError(Exception):
    """A transform failed on a sample.

    Attributes:
        index: of the sample, in the rows that were handed over.
        text: what happened, with the traceback if the transform raised.
    """

    def __init__(self, index: int, text: str) -> None:
        super().__init__(text)
        self.index = index
        self.text = text

    def __reduce__(self) -> tuple[type[SampleError], tuple[int, str]]:
        return type(self), (self.index, self.text)


class SampleRunner:
    """Calls a transform for one sample after the other, each with its own random numbers."""

    def __init__(self, transform: SampleTransform) -> None:
        self._transform = transform
        # Setting the key of a counter-based generator takes 4 microseconds, making one 50.
        self._bits = np.random.Philox(key=0)
        self._fresh: Any = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def fill(self, inputs: Arrays, keys: UInt64s, outputs: Arrays, *, training: bool) -> None:
        """Transform rows.

        Args:
            inputs: by name, (rows, *shape); they may be changed.
            keys: (rows,) uint64.
            outputs: by name, (rows, *shape): all that the transform returns, of those dtypes.
            training: False in an evaluation.

        Raises:
            SampleError: if it fails, or returns something else than `outputs` has room for.
        """
        for index, key in enumerate(keys):
            returned = self._call(index, inputs, key, training=training)
            if returned.keys() != outputs.keys():
                raise SampleError(
                    index, f"it returned {_listed(returned)}, and {_listed(outputs)} of another"
                )
            for name, value in returned.items():
                out = outputs[name]
                if value.shape != out.shape[1:] or value.dtype != out.dtype:
                    raise SampleError(
                        index,
                        f'it made {value.dtype} {value.shape} of "{name}", and {out.dtype} '
                        f"{out.shape[1:]} for another sample; batches need all samples alike",
                    )
                out[index] = value

    def describe(
        self, inputs: Arrays, key: int, needed: Sequence[str], *, training: bool
    ) -> dict[str, Field]:
        """Return what the transform makes of the first row.

        Args:
            inputs: by name, (rows, *shape); they may be changed.
            key: of the row.
            needed: fields that have to be there.
            training: False in an evaluation.

        Raises:
            SampleError: if it fails, or returns what cannot become a tensor.
        """
        returned = self._call(0, inputs, np.uint64(key), training=training)
        for name in needed:
            if name not in returned:
                raise SampleError(
                    0, f'it returned no "{name}", which the task needs: {_listed(returned)}'
                )
        fields = {name: Field(value.shape, value.dtype) for name, value in returned.items()}
        try:
            for name, field in fields.items():
                require_supported(name, field, "what it returned")
        except DatasetError as error:
            raise SampleError(0, str(error)) from error
        return fields

    def _call(
        self, index: int, inputs: Arrays, key: np.uint64, *, training: bool
    ) -> dict[str, npt.NDArray[Any]]:
        self._fresh["state"]["key"][0] = key
        self._bits.state = self._fresh
        sample = {name: rows[index, ...] for name, rows in inputs.items()}
        try:
            returned: Any = self._transform(
                fields=sample, generator=self._generator, training=training
            )
            if not isinstance(returned, Mapping):
                raise SampleError(
                    index,
                    f"it returned {type(returned).__name__}; it has to return the fields, a dict "
                    "of arrays by name",
                )
            return {name: _native(value) for name, value in returned.items()}
        except SampleError:
            raise
        except Exception as error:  # whatever the user's code raises
            # The first frame is this one.
            own = error.__traceback__.tb_next if error.__traceback__ is not None else None
            lines = traceback.format_exception(type(error), error, own)
            raise SampleError(index, "".join(lines).rstrip()) from error


def _native(value: Any) -> npt.NDArray[Any]:
    """Return an array in the byte order of this machine, of arrays, tensors and numbers alike."""
    array = np.asarray(value)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(map(str, names)) or "nothing"


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
