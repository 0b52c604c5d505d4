"""Chains of HDF5's filters, made without the help of h5py, which allows a few of them only."""

from __future__ import annotations

import h5py

from hpctrain.data.reading.filters import (
    BITSHUFFLE,
    BZIP2,
    DEFLATE,
    FLETCHER32,
    LZF,
    NBIT,
    SCALE_OFFSET,
    SHUFFLE,
    SZIP,
    ZSTD,
)

BLOSC, LZ4, BLOSC2 = 32001, 32004, 32026
CHAINS: dict[str, list[tuple[int, tuple[int, ...]]]] = {
    "shuffle": [(SHUFFLE, ())],
    "gzip": [(DEFLATE, (1,))],
    "shuffle+gzip": [(SHUFFLE, ()), (DEFLATE, (1,))],
    "gzip+fletcher32": [(DEFLATE, (1,)), (FLETCHER32, ())],
    "fletcher32+gzip": [(FLETCHER32, ()), (DEFLATE, (1,))],
    "gzip twice": [(DEFLATE, (1,)), (DEFLATE, (1,))],
    "fletcher32": [(FLETCHER32, ())],
    "lzf": [(LZF, ())],
    "szip": [(SZIP, (4 | 32, 8))],  # entropy coding with nearest neighbours, 8 pixels a block
    "scale-offset": [(SCALE_OFFSET, (2, 0))],
    "nbit+zstd": [(NBIT, ()), (ZSTD, (1,))],
    "bzip2": [(BZIP2, (9,))],
    "zstd": [(ZSTD, (1,))],
    "shuffle+zstd": [(SHUFFLE, ()), (ZSTD, (1,))],
    "shuffle+lz4+fletcher32": [(SHUFFLE, ()), (LZ4, ()), (FLETCHER32, ())],
    "lz4+zstd": [(LZ4, ()), (ZSTD, (1,))],
    "bitshuffle": [(BITSHUFFLE, (0, 0))],
    "bitshuffle+gzip": [(BITSHUFFLE, (0, 0)), (DEFLATE, (1,))],
    "bitshuffle with lz4": [(BITSHUFFLE, (0, 2))],
    "blosc+fletcher32": [(BLOSC, (0, 0, 0, 0, 5, 1, 1)), (FLETCHER32, ())],
    "blosc2": [(BLOSC2, (0, 0, 0, 0, 5, 1, 1))],
}


def properties_of(chain: str, chunk: tuple[int, ...]) -> h5py.h5p.PropDCID:
    """Return what makes HDF5 store chunks of this shape under a chain of filters."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(chunk)
    for number, values in CHAINS[chain]:
        if number == SHUFFLE:
            properties.set_shuffle()
        elif number == FLETCHER32:
            properties.set_fletcher32()
        elif number == SZIP:
            properties.set_szip(*values)
        elif number == SCALE_OFFSET:
            properties.set_scaleoffset(*values)
        else:
            properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, values)
    return properties
