"""Objects as bytes, their tensors and arrays beside them: to memory that processes share.

A pass of any structure goes from a worker to its rank, and a Dataset from a rank to its workers.
The values of tensors and arrays are written where the other side finds them, and are not copied
there: pickle's protocol 5 hands them out, and takes them in.
"""

from __future__ import annotations

import importlib.util
import io
import mmap
import os
import pickle
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpctrain.data.arrays import Bytes
from hpctrain.data.loading.batch import bytes_of
from hpctrain.data.loading.prefetch import ALIGNMENT_BYTES
from hpctrain.data.loading.worker import new_file

Spans = Sequence[tuple[int, int]]
"""Where each buffer is in memory: the first byte, and one past the last."""


class Packed(NamedTuple):
    """An object taken apart.

    Attributes:
        payload: pickled.
        buffers: values that are not in it, each one run of bytes.
    """

    payload: bytes
    buffers: list[memoryview]

    def spans(self) -> tuple[Spans, int]:
        """Return where the buffers are to go, and how many bytes that takes."""
        spans, stop = [], 0
        for buffer in self.buffers:
            start = -(-stop // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            stop = start + buffer.nbytes
            spans.append((start, stop))
        return spans, stop

    def write(self, memory: Bytes, spans: Spans) -> None:
        """Write the buffers to their places."""
        for (start, stop), buffer in zip(spans, self.buffers, strict=True):
            memory[start:stop] = np.frombuffer(buffer, np.uint8)


def packed(obj: Any) -> Packed:
    """Take an object of this process apart.

    Raises:
        Exception: whatever pickle says of what it cannot take.
    """
    return _packed(obj, _Pickler)


def unpacked(payload: bytes, memory: Any, spans: Spans) -> Any:
    """Put an object together; its tensors and arrays are where the memory is.

    Args:
        payload: as `packed` made it.
        memory: what holds the buffers, writable; kept for as long as a part of the object is.
        spans: where they are in it.
    """
    view = memoryview(memory)
    return pickle.loads(payload, buffers=[view[start:stop] for start, stop in spans])


class _Pickler(pickle.Pickler):
    """Knows tensors, of which pickle itself would copy every byte."""

    def reducer_override(self, obj: Any) -> Any:
        return _reduced(obj) if type(obj) is Tensor else NotImplemented


class _Importable(_Pickler):
    """Refuses what another process could not import: what the program that runs has defined."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | FunctionType) and obj.__module__ == "__main__":
            raise pickle.PicklingError(f"{obj.__qualname__} is defined in the program itself")
        return super().reducer_override(obj)


def _packed(obj: Any, pickler: Callable[..., Any]) -> Packed:
    buffers: list[memoryview] = []
    file = io.BytesIO()
    pickler(file, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw())).dump(obj)
    return Packed(file.getvalue(), buffers)


def _reduced(tensor: Tensor) -> Any:
    """Return how a tensor is made again, if its values are plain memory of the host."""
    is_plain = (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.requires_grad
        and not tensor.is_quantized
    )
    if not is_plain:
        return NotImplemented
    array: Any = bytes_of(tensor).numpy()
    return _tensor, (pickle.PickleBuffer(array), tensor.dtype, tuple(tensor.shape))


def _tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor over memory that is kept with it."""
    if not memoryview(buffer).nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(shape)


class Parcel(NamedTuple):
    """An object that processes of this node can have, its values once for all of them.

    Attributes:
        payload: pickled.
        descriptor: of the memory that holds its values.
        spans: where they are in it.
        size: of that memory, bytes.
    """

    payload: bytes
    descriptor: int
    spans: Spans
    size: int

    @classmethod
    def of(cls, obj: Any) -> Parcel:
        """Take an object apart.

        What the program that runs has defined, and functions without a name, go by value with
        cloudpickle, where it is installed.

        Raises:
            Exception: whatever pickle says of what it cannot take.
        """
        try:
            taken = _packed(obj, _Importable)
        except Exception as error:
            if importlib.util.find_spec("cloudpickle") is None:
                raise _with_hint(error) from error
            taken = _packed(obj, _by_value())
        spans, size = taken.spans()
        descriptor = new_file()
        try:
            os.ftruncate(descriptor, max(1, size))
            taken.write(np.frombuffer(mmap.mmap(descriptor, max(1, size)), np.uint8), spans)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(taken.payload, descriptor, spans, size)

    def opened(self) -> Any:
        """Return the object. What this process changes of its values no other one sees."""
        memory = mmap.mmap(self.descriptor, max(1, self.size), flags=mmap.MAP_PRIVATE)
        return unpacked(self.payload, memory, self.spans)


def _with_hint(error: Exception) -> Exception:
    return pickle.PicklingError(
        f"{error} (with cloudpickle, what a script defines can be sent, and lambdas: pip install "
        "hpctrain[cloudpickle])"
    )


def _by_value() -> Callable[..., Any]:
    import cloudpickle  # type: ignore[import-untyped]

    class ByValue(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is Tensor and (reduced := _reduced(obj)) is not NotImplemented:
                return reduced
            return super().reducer_override(obj)

    return ByValue
