"""IDX, the format that MNIST came in: a few bytes of header, then one array; often gzipped."""

from __future__ import annotations

import gzip
import math
import re
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from hpctrain.errors import DatasetError
from hpctrain.utils.files import open_file, require_regular

# Source: Yann LeCun's description of the format, http://yann.lecun.com/exdb/mnist.
_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_NAME = re.compile(r"idx\d-u?(byte|short|int|float|double)(\.gz)?$")
_FIELDS = {"images": "image", "labels": "label"}
_PICTURES = 3
"""Axes of a file of pictures: number, row, column."""


def is_idx(path: str) -> bool:
    """Tell whether a file has a name like train-images-idx3-ubyte.gz."""
    return _NAME.search(path) is not None


def idx_field(path: str) -> str:
    """Return what to call the array of a file: image, label, or its own name."""
    for word, field in _FIELDS.items():
        if word in Path(path).name:
            return field
    return Path(path).name.split(".")[0]


def idx_shape(path: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of the array; grey pictures get an axis of one channel.

    Raises:
        DatasetError: if this is no IDX file.
    """
    with _open(path) as file:
        sizes, dtype, _ = _header(path, file)
    return _with_channel(sizes), dtype


def read_idx(path: str) -> npt.NDArray[Any]:
    """Return the array, mapped from the file if it is not compressed.

    Raises:
        DatasetError: if the file is damaged or cut.
    """
    with _open(path) as file:
        sizes, dtype, begin = _header(path, file)
        wanted = math.prod(sizes) * dtype.itemsize
        content = file.read() if path.endswith(".gz") else None
    there = Path(path).stat().st_size - begin if content is None else len(content)
    if there != wanted:
        raise DatasetError(
            f"{path}: {there} bytes of values, where its header says {wanted}: "
            f"{'it is truncated' if there < wanted else 'it is damaged'}. Get the file again"
        )
    values: npt.NDArray[Any] = (
        np.memmap(path, dtype, "r", begin, sizes)
        if content is None
        else np.frombuffer(content, dtype).reshape(sizes)
    )
    return values.reshape(_with_channel(sizes))


def _open(path: str) -> BinaryIO:
    require_regular(path)
    return cast("BinaryIO", gzip.open(path)) if path.endswith(".gz") else open_file(path)


def _header(path: str, file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Read sizes, dtype, and where the values begin."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES or magic[3] == 0:
        raise DatasetError(f"{path}: this is no IDX file: it begins with {magic.hex(' ')}")
    sizes = np.frombuffer(file.read(4 * magic[3]), ">u4")
    if len(sizes) < magic[3]:
        raise DatasetError(f"{path}: the file ends in its header. Get the file again")
    return tuple(sizes.tolist()), np.dtype(_DTYPES[magic[2]]), 4 + 4 * magic[3]


def _with_channel(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (sizes[0], 1, *sizes[1:]) if len(sizes) == _PICTURES else sizes
