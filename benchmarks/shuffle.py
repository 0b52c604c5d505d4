"""How well an epoch is shuffled, against a full permutation of all samples.

    python benchmarks/shuffle.py

The worst case for a shuffle in blocks: a dataset sorted by its label. Only the order is looked at,
so no data are read. A full permutation has the value 1 in every column but the last, 0 there; what
chance alone does to the numbers is the last row: another full permutation.

run        mean length of runs of equal labels in the stream
near       pairs of neighbours in the stream that are within a thousandth of the dataset
entropy    of the labels in a batch, mean over batches
batch sd   standard deviation over batches of a batch's mean label
repeat     correlation of a batch's labels with those of the next batch
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.data.order.epochs import Epoch
from hpctrain.data.order.order import Order, default_block_rows, default_lanes

LABELS = 1000
BUFFER = 10_000
"""Samples of the shuffle buffer that other loaders read a sorted dataset through."""
COLUMNS = ("run", "near", "entropy", "batch sd", "repeat")
Rows = npt.NDArray[np.int64]


def main() -> None:
    """Print a table for each kind of data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_280_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--windows", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parsed = parser.parse_args()
    samples, batch = parsed.samples, parsed.batch
    full = measure(np.random.default_rng(0).permutation(samples), samples, batch)
    for name, row_bytes in (("images of 12 KB", 12_288), ("tokens of 2 KB", 2050)):
        sys.stdout.write(f"{samples:,} {name}, batches of {batch}\n")
        sys.stdout.write(f"{'order':34}" + "".join(f"{column:>10}" for column in COLUMNS) + "\n")
        lanes = default_lanes(batch)
        for window in parsed.windows:
            # As a run makes it: a wider window takes shorter blocks, for the same memory.
            block_rows = default_block_rows(samples, row_bytes, lanes, window)
            order = Order(
                samples=samples, seed=1, lanes=lanes, window=window, block_rows=block_rows
            )
            _tell(f"window {window}, blocks of {block_rows}", order, full, batch)
        _write(f"a buffer of {BUFFER:,}", measure(_buffered(samples), samples, batch), full)
        other = measure(np.random.default_rng(1).permutation(samples), samples, batch)
        _write("a full permutation", other, full)


def measure(rows: Rows, samples: int, batch: int) -> npt.NDArray[np.float64]:
    """Return the values of all columns for one epoch.

    Args:
        rows: (samples,) int64, of the dataset, in the order of the stream.
        samples: of the dataset.
        batch: samples of a batch.
    """
    labels = rows * LABELS // samples
    changes = np.count_nonzero(np.diff(labels)) + 1
    near = np.mean(np.abs(np.diff(rows)) < samples / 1000)
    batches = labels[: samples // batch * batch].reshape(-1, batch)
    flat = batches + np.arange(len(batches))[:, None] * LABELS
    counts = np.bincount(flat.ravel(), minlength=len(batches) * LABELS)
    counts = counts.reshape(len(batches), LABELS).astype(np.float32)
    shares = counts / batch
    logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    return np.array(
        [
            samples / changes,
            near,
            -(shares * logs).sum(axis=1).mean(),
            batches.mean(axis=1).std(),
            _correlation(counts[:-1], counts[1:]),
        ]
    )


def _correlation(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Return how alike the numbers of each label are in batches that follow each other."""
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))


def _buffered(samples: int) -> Rows:
    """Return the order of a shuffle buffer: each sample goes where a random one just left."""
    draws = np.random.default_rng(2).integers(0, BUFFER, samples - BUFFER).tolist()
    buffer = list(range(BUFFER))
    rows = np.empty(samples, np.int64)
    for row, place in enumerate(draws, BUFFER):
        rows[row - BUFFER] = buffer[place]
        buffer[place] = row
    rows[samples - BUFFER :] = np.random.default_rng(3).permutation(buffer)
    return rows


def _tell(name: str, order: Order, full: npt.NDArray[np.float64], batch: int) -> None:
    rows = Epoch(order, 0).rows(np.arange(order.samples, dtype=np.int64))
    _write(name, measure(rows, order.samples, batch), full)


def _write(name: str, values: npt.NDArray[np.float64], full: npt.NDArray[np.float64]) -> None:
    # A correlation has no ratio to one of 0.
    shown = np.append(values[:-1] / full[:-1], values[-1])
    sys.stdout.write(f"{name:34}" + "".join(f"{value:10.3f}" for value in shown) + "\n")


if __name__ == "__main__":
    main()
