"""A user's function of one sample, applied to rows of arrays. Knows no torch, and no files."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import UInt64s
from hpctrain.data.dataset import Field, require_supported
from hpctrain.errors import DatasetError

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
