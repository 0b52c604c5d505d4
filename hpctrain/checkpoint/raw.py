"""Tensors of safetensors files as plain bytes: read, compared and written without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize

from hpctrain.checkpoint.writing import DurableFile, Written
from hpctrain.errors import CheckpointError
from hpctrain.utils.json_files import parse_json

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
PAIRED = "complex"
"""Key of a file's own texts: the names of its tensors that are such pairs, as JSON."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as it stands in a file.

    Attributes:
        dtype: as safetensors calls it, such as "BF16"; complex numbers of 32 and 128 bits, which
            it has not, are "C32" and "C128".
        data: little-endian, row after row; a view is of bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def values(self) -> npt.NDArray[Any] | None:
        """Return the numbers, None of a dtype that numpy has not."""
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
        raise CheckpointError(f"{where} is no safetensors file: {error}") from error
    tensors = {
        name: RawTensor(facts["dtype"], tuple(facts["shape"]), bytes(facts["data"]))
        for name, facts in found
    }
    complex_of = {pair: dtype for dtype, pair in _PAIRS.items()}
    try:
        for name in paired_names(texts_of(content)):
            pairs = tensors[name]
            if pairs.shape[-1:] != (2,):
                raise ValueError(f"{name} is no tensor of pairs")
            tensors[name] = RawTensor(complex_of[pairs.dtype], pairs.shape[:-1], pairs.data)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{where} is damaged: its list of complex tensors: {error}"
        ) from error
    return tensors


def paired_names(texts: Mapping[str, str] | None) -> list[str]:
    """Return the names of tensors that are pairs of the parts of complex numbers.

    Args:
        texts: that a file has beside its tensors, see `PAIRED`.

    Raises:
        ValueError: if they say no such thing.
    """
    names = parse_json((texts or {}).get(PAIRED, "[]").encode())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'"{PAIRED}" is not a list of names')
    return names


def texts_of(content: bytes) -> Mapping[str, str]:
    """Return the texts of a safetensors file beside its tensors."""
    length = int.from_bytes(content[:8], "little")
    texts: Mapping[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return texts


def write_raw(path: Path, tensors: Mapping[str, RawTensor], facts: Mapping[str, str]) -> Written:
    """Write a safetensors file, on disk when this returns.

    Args:
        path: of the file.
        tensors: by name.
        facts: texts that the file has beside them.

    Returns:
        How long it is, and its checksum.

    Raises:
        OSError: if it cannot be written.
    """
    with DurableFile(path) as file:
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
    texts = {**facts, **({PAIRED: json.dumps(paired)} if paired else {})}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How one tensor differs from another of its name.

    Attributes:
        differing: elements, of `elements`.
        largest: absolute difference of any two elements; None where numpy has no such numbers.
        relative: norm of the difference, as a part of the norm of the first.
    """

    differing: int
    elements: int
    largest: float | None
    relative: float | None


def difference(first: RawTensor, second: RawTensor) -> Difference | None:
    """Compare two tensors of the same dtype and shape; None if they are equal to the bit."""
    if first.data == second.data:
        return None
    ours, theirs = first.values(), second.values()
    if ours is None or theirs is None:
        return Difference(differing=1, elements=1, largest=None, relative=None)
    bytes_of = [np.frombuffer(tensor.data, np.uint8) for tensor in (first, second)]
    unequal = int(np.count_nonzero(bytes_of[0] != bytes_of[1]))
    wide = np.complex128 if np.iscomplexobj(ours) else np.float64
    before, after = ours.astype(wide), theirs.astype(wide)
    with np.errstate(invalid="ignore", over="ignore"):
        change = np.abs(after - before)
        norm = float(np.linalg.norm(before))
        relative = float(np.linalg.norm(change)) / norm if norm else None
        differing = int(np.count_nonzero(~(before == after)))
        largest = float(change.max())
    return Difference(
        differing=differing or min(unequal, before.size),
        elements=before.size,
        largest=largest,
        relative=relative,
    )
