"""Samples drawn by weight: which rows the positions of an epoch hold, in O(log N) for any of them.

Every position is drawn on its own, with replacement, by a hash of (seed, epoch, position). So where
a run stands says all about what it will draw, at any number of ranks and after any restart.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Dataset
from hpctrain.data.decoding import decodings
from hpctrain.data.files.discovery import FileOrder, open_dataset
from hpctrain.data.order.permutation import derive_key, derive_keys
from hpctrain.data.reading.rows import open_rows
from hpctrain.data.view import View
from hpctrain.errors import DatasetError

Float64s = npt.NDArray[np.float64]

_DRAWS = 3
"""What the key is for: order.py has the others."""
_READ_ROWS = 2**22
_IN_FILE = re.compile(r"(?P<files>.+\.(?:h5|hdf5|hdf|nc|nc4)):(?P<name>.+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Weights:
    """How often each sample is drawn, in proportion.

    Attributes:
        sums: (samples,) float64, the weights up to and with each sample.
        last: the last sample that has any.
        fingerprint: of the weights; a run goes on with the same ones only.
    """

    sums: Float64s
    last: int
    fingerprint: str

    @classmethod
    def of(cls, weights: npt.ArrayLike, what: str) -> Weights:
        """Take weights.

        Args:
            weights: (samples,) numbers, at least 0 and not all 0; they need not add up to 1.
            what: where they come from, for messages.

        Raises:
            DatasetError: naming the sample that has none that can be used.
        """
        values = np.asarray(weights, np.float64)
        if values.ndim != 1 or not len(values):
            raise DatasetError(
                f"{what}: weights have one number a sample; these have the shape {values.shape}"
            )
        is_wrong = ~(np.isfinite(values) & (values >= 0))
        if is_wrong.any():
            at = int(np.argmax(is_wrong))
            raise DatasetError(
                f"{what}: the weight of sample {at} is {values[at]}: a weight is a number from 0"
            )
        sums = np.cumsum(values)
        if not 0 < sums[-1] < np.inf:
            raise DatasetError(
                f"{what}: the sum of all weights is {sums[-1]}: give at least one sample a weight "
                "above 0, and none one beyond all bounds"
            )
        return cls(
            sums, int(np.flatnonzero(values)[-1]), xxhash.xxh3_64_hexdigest(values.tobytes())
        )

    def rows(self, seed: int, epoch: int, positions: Int64s) -> Int64s:
        """Return which rows of the dataset are at these positions, (count,) int64."""
        hashes = derive_keys(derive_key(seed, epoch, _DRAWS), positions)
        # 53 bits: what a float64 in [0, 1) holds.
        draws = (hashes >> np.uint64(11)) * (2.0**-53 * self.sums[-1])
        # A sample without a weight adds nothing to the sums: the next one is found in its place.
        found: Int64s = np.searchsorted(self.sums, draws, side="right").astype(np.int64)
        return np.minimum(found, self.last, out=found)


def read_weights(given: str, dataset: Dataset, files: str, order: FileOrder) -> Weights:
    """Return the weights that a config names. Reads files: for one rank to do.

    Args:
        given: a .npy file, "files.h5:name", or the name of an HDF5 dataset in the training files.
        dataset: to train with.
        files: of its own, as `data.train` names them.
        order: of files.

    Raises:
        DatasetError: if they are not there, or not one usable number a sample or a row.
    """
    if given.lower().endswith(".npy"):
        values, where = _npy(given), given
    else:
        in_file = _IN_FILE.fullmatch(given)
        source, name = in_file.group("files", "name") if in_file else (files, given)
        values, where = _column(source, name.strip("/"), order), f'{source}, "{name}"'
    what = f"data.weights: {where}"
    if len(values) == dataset.samples:
        return Weights.of(values, what)
    rows = dataset.parts[0].samples if isinstance(dataset, View) else dataset.samples
    if len(values) != rows or not isinstance(dataset, View):
        of_rows = f" (made of {rows} rows)" if rows != dataset.samples else ""
        raise DatasetError(
            f"{what} has {len(values)} numbers, but {dataset.source} has {dataset.samples} "
            f"samples{of_rows}: one a sample is needed"
        )
    return Weights.of(values[dataset.selection.rows(np.arange(dataset.samples))], what)


class Samples(Protocol):
    """A dataset of any kind."""

    @property
    def samples(self) -> int:
        """How many there are."""
        ...

    @property
    def source(self) -> str:
        """What they are called."""
        ...


def weights_of_file(path: str, dataset: Samples) -> Weights:
    """Return the weights in a .npy file, of a dataset that has no files of its own.

    Raises:
        DatasetError: if they are not one usable number a sample.
    """
    values = _npy(path)
    if len(values) != dataset.samples:
        raise DatasetError(
            f"data.weights: {path} has {len(values)} numbers, but {dataset.source} has "
            f"{dataset.samples} samples: one a sample is needed"
        )
    return Weights.of(values, f"data.weights: {path}")


def _npy(path: str) -> npt.NDArray[Any]:
    try:
        values: npt.NDArray[Any] = np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"data.weights: {path} cannot be read: {error}") from error
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "buif":
        shape = getattr(values, "shape", None)
        raise DatasetError(
            f"data.weights: {path} has to be one number a sample, and is an array of "
            f"{getattr(values, 'dtype', type(values).__name__)} of the shape {shape}"
        )
    return values


def _column(source: str, name: str, order: FileOrder) -> npt.NDArray[Any]:
    """Return an HDF5 dataset of one number a row, of all files."""
    dataset = open_dataset(source, [name], order=order)
    field = dataset.fields[name]
    if field.shape or field.dtype.kind not in "buif":
        raise DatasetError(
            f'data.weights: {source}: "{name}" is {field.dtype} with rows of shape {field.shape}, '
            "and has to be one number a row"
        )
    decoding = decodings([dataset])[0].get(name)
    decode: Callable[..., Any] = (lambda each, _: each) if decoding is None else decoding.decode
    parts = []
    with closing(open_rows(dataset)) as reader:
        for start in range(0, dataset.samples, _READ_ROWS):
            count = min(_READ_ROWS, dataset.samples - start)
            out = np.empty((count, field.row_bytes), np.uint8)
            reader.read_runs(name, np.array([start]), np.array([count]), out, np.zeros(1, np.int64))
            numbers = out.view(field.dtype.newbyteorder("="))[:, 0]
            codes = None if decoding is None else decoding.codes(np.arange(start, start + count))
            parts.append(decode(numbers, codes))
    return np.concatenate(parts)
