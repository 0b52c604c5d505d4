"""Safetensors files as plain bytes, without torch: read, and written so that they are on disk.

Checksums are taken on the way, of what is in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError, deserialize

from hpctrain.errors import CheckpointError
from hpctrain.utils.json_files import parse_json
from hpctrain.utils.text import printable

_NUMPY = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "C128": "complex128",
}
# Complex numbers that the format has no name for stand in it as pairs, along a last axis of 2.
_PAIRS = {"C32": "F16", "C128": "F64"}
_PAIRED = "complex"
"""Key of a file's own texts: the names of its tensors that are such pairs, as JSON."""

_PIECE_BYTES = 8 * 2**20
_AHEAD_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as it stands in a file.

    Attributes:
        dtype: safetensors' name for it, such as "BF16"; complex numbers of 32 and 128 bits, which
            it does not have, are "C32" and "C128".
        data: little-endian, row after row; a view is of bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def values(self) -> npt.NDArray[Any] | None:
        """Return the numbers; None of a dtype that numpy does not have."""
        if self.dtype == "BF16":  # the upper half of a float32
            wide = np.frombuffer(self.data, "<u2").astype("<u4") << 16
            return wide.view("<f4").reshape(self.shape)
        name = _NUMPY.get(self.dtype)
        if name is None:
            return None
        return np.frombuffer(self.data, np.dtype(name).newbyteorder("<")).reshape(self.shape)


def raw_tensors(content: bytes, where: object) -> dict[str, RawTensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: if it is none; `where` is for the message.
    """
    try:
        found: list[tuple[str, Mapping[str, Any]]] = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise CheckpointError(
            f"{where} is not a safetensors file: {printable(str(error))}"
        ) from error
    tensors = {
        name: RawTensor(facts["dtype"], tuple(facts["shape"]), bytes(facts["data"]))
        for name, facts in found
    }
    complex_of = {pair: dtype for dtype, pair in _PAIRS.items()}
    try:
        for name in paired_names(texts_of(content)):
            pairs = tensors[name]
            if pairs.shape[-1:] != (2,):
                raise ValueError(f"{name} is not a tensor of pairs")
            tensors[name] = RawTensor(complex_of[pairs.dtype], pairs.shape[:-1], pairs.data)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{where} is damaged: its list of complex tensors: {error}"
        ) from error
    return tensors


def paired_names(texts: Mapping[str, str] | None) -> list[str]:
    """Return the names of tensors that are pairs of the parts of complex numbers.

    Args:
        texts: metadata that a file has beside its tensors, see `_PAIRED`.

    Raises:
        ValueError: if they say no such thing.
    """
    names = parse_json((texts or {}).get(_PAIRED, "[]").encode())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'"{_PAIRED}" is not a list of names')
    return names


def texts_of(content: bytes) -> Mapping[str, str]:
    """Return the texts of a safetensors file beside its tensors."""
    length = int.from_bytes(content[:8], "little")
    texts: Mapping[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return texts


def write_raw(path: Path, tensors: Mapping[str, RawTensor], facts: Mapping[str, str]) -> Written:
    """Write a safetensors file, on disk when this returns.

    Args:
        path: the new file.
        tensors: content of the file, by name.
        facts: metadata that the file has beside them.

    Returns:
        How long it is, and its checksum.

    Raises:
        OSError: if it cannot be written.
    """
    with _DurableFile(path) as file:
        for piece in pieces_of_file(tensors, facts):
            file.write(piece)
    return file.written


def pieces_of_file(
    tensors: Mapping[str, RawTensor], facts: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """Yield the content of a safetensors file, without a copy of the tensors.

    The library's own functions copy every tensor once more, and leave the checksum to a second
    reading.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    paired = sorted(name for name, tensor in tensors.items() if tensor.dtype in _PAIRS)
    texts = {**facts, **({_PAIRED: json.dumps(paired)} if paired else {})}
    header: dict[str, Any] = {"__metadata__": texts}
    offset = 0
    # The widest elements first, so that each tensor begins at a multiple of its own.
    ordered = sorted(tensors.items(), key=lambda item: (-_element_bytes(item[1]), item[0]))
    for name, tensor in ordered:
        end = offset + len(tensor.data)
        header[name] = {
            "dtype": _PAIRS.get(tensor.dtype, tensor.dtype),
            "shape": [*tensor.shape, *([2] if tensor.dtype in _PAIRS else [])],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.data


def _element_bytes(tensor: RawTensor) -> int:
    return len(tensor.data) // max(1, math.prod(tensor.shape))


@dataclass(frozen=True, slots=True)
class Written:
    """Size and checksum of a file that was written.

    Attributes:
        xxh3_64: checksum, as hexadecimal digits.
    """

    num_bytes: int
    xxh3_64: str


class _DurableFile:
    """A new file; a context manager at whose end every byte is on disk.

    Checksums are taken of what is in memory, on the way to the file: what a disk loses or changes
    does not fit them. The system is asked to write out what it has every few pieces, so that the
    disk works while the rest is still being copied, and the page cache stays with the data.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = xxhash.xxh3_64()
        self._length = self._handed_on = 0

    def __enter__(self) -> _DurableFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    @property
    def written(self) -> Written:
        return Written(self._length, self._digest.hexdigest())

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: if there is no space, or the file system is gone.
        """
        view = memoryview(content)
        for begin in range(0, len(view), _PIECE_BYTES):
            piece = view[begin : begin + _PIECE_BYTES]
            self._digest.update(piece)
            self._file.write(piece)
            self._length += len(piece)
            if self._length - self._handed_on >= _AHEAD_BYTES:
                self._hand_on()

    def _hand_on(self) -> None:
        """Have the system begin to write out what it holds of this file."""
        if hasattr(os, "posix_fadvise"):
            descriptor, length = self._file.fileno(), self._length - self._handed_on
            os.posix_fadvise(descriptor, self._handed_on, length, os.POSIX_FADV_DONTNEED)
            self._handed_on = self._length


def write_file(path: Path, content: bytes) -> Written:
    """Write a file, on disk when this returns.

    Raises:
        OSError: if it cannot be written.
    """
    with _DurableFile(path) as file:
        file.write(content)
    return file.written
