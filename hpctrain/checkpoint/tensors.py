"""Tensors as the bytes that a checkpoint's files hold, that ranks send and compare, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from hpctrain.checkpoint.safetensors_files import RawTensor, paired_names, texts_of
from hpctrain.errors import CheckpointError
from hpctrain.utils.text import printable

# As safetensors calls them, see `RawTensor`.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex32: "C32",
    torch.complex64: "C64",
    torch.complex128: "C128",
}


def storable_dtype(dtype: torch.dtype) -> bool:
    """Tell whether a checkpoint can hold tensors of a dtype."""
    return dtype in _NAMES


def tensor_bytes(tensor: Tensor) -> Tensor:
    """Return the values of a tensor one after the other, as bytes.

    So every dtype travels, whatever a backend or a file knows.

    Args:
        tensor: strided, of any shape and strides.

    Returns:
        (bytes,) uint8; the memory of the tensor where its values lie there in this order.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    if plain.numel() == 1:
        # Of one value torch takes any stride for contiguous, and views only a stride of 1 as bytes.
        plain = plain.as_strided((1,), (1,))
    return plain.view(torch.uint8)


# Integers of the size of an element: sums of their bits are exact in any order.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's elements taken as integers, () int64: every bit counts."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


def raw_of(tensors: Mapping[str, Tensor]) -> dict[str, RawTensor]:
    """Return host tensors as the bytes that they are in memory, without a copy."""
    raw = {}
    for name, tensor in tensors.items():
        dtype = _NAMES.get(tensor.dtype)
        if dtype is None or tensor.layout is not torch.strided:
            raise CheckpointError(
                f"{name} is a tensor of {tensor.dtype}, {tensor.layout}: a checkpoint holds plain "
                "numbers only"
            )
        flat = tensor_bytes(tensor)
        raw[name] = RawTensor(dtype, tuple(tensor.shape), flat.numpy().data)
    return raw


def tensors_of(content: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the host.

    Raises:
        CheckpointError: if it is none; `path` is for the message.
    """
    try:
        tensors: dict[str, Tensor] = load(content)
        return joined_pairs(tensors, texts_of(content))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: {printable(str(error))}"
        ) from error


def joined_pairs(tensors: dict[str, Tensor], texts: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Return tensors of a file with complex numbers where it has them as pairs.

    Args:
        tensors: tensors of the file, or some of their rows.
        texts: metadata of the file.
    """
    paired = [name for name in paired_names(texts) if name in tensors]
    return tensors | {name: torch.view_as_complex(tensors[name]) for name in paired}


def tensors_from_raw(raw: Mapping[str, RawTensor]) -> dict[str, Tensor]:
    """Return the bytes of a checkpoint's files as host tensors of their own memory."""
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    return {
        # A tensor of nothing has no buffer to be made from.
        name: torch.frombuffer(bytearray(item.data), dtype=dtypes[item.dtype]).view(item.shape)
        if len(item.data)
        else torch.empty(item.shape, dtype=dtypes[item.dtype])
        for name, item in raw.items()
    }
