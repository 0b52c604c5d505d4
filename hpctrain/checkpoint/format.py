"""Tensors and texts to the files of a checkpoint, see `hpctrain.checkpoint.layout`."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from hpctrain.checkpoint.best import Preference
from hpctrain.checkpoint.layout import (
    CONFIG,
    EVALUATION,
    FORMAT,
    META,
    MODEL,
    TRAINING,
    VALUES,
    VERSION,
    VERSION_OF_ONE_WRITER,
    checksum_of_meta,
)
from hpctrain.checkpoint.parts import Spread, part_name
from hpctrain.checkpoint.raw import RawTensor, paired_names, texts_of, write_raw
from hpctrain.checkpoint.tensor_bytes import tensor_bytes
from hpctrain.checkpoint.writing import Written, write_file
from hpctrain.errors import CheckpointError
from hpctrain.utils.files import sync
from hpctrain.version import __version__

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that a checkpoint holds.

    Attributes:
        step: the last one that is part of it.
        model: parameters and buffers by name. Tied tensors, which share memory, are stored once.
        training: generators and what else there is, by name.
        lent: more of `training`, such as optimizer state, that stays as it is for a while.
        lend: takes a function; calls it, and lets it return, before anything changes what is lent.
        values: the rest of the training state; JSON.
        config_toml: the resolved config.
        metrics: of an evaluation at this very step.
        made_by: what there is to say of the job that saves it; JSON.
        preference: by which the run keeps its best checkpoint; None: it keeps none.
        tied: further names of tensors, besides those that share memory here.
        spread: of whole tensors, where `model` and `training` are rank 0's part of them.
        others: waits for the parts of the other ranks, and returns the files of each.
    """

    step: int
    model: Mapping[str, Tensor]
    training: Mapping[str, Tensor]
    values: Mapping[str, Any]
    config_toml: str
    lent: Mapping[str, Tensor] = field(default_factory=dict)
    lend: Callable[[Callable[[], None]], None] = lambda wait: wait()
    metrics: Mapping[str, float] | None = None
    made_by: Mapping[str, Any] = field(default_factory=dict)
    preference: Preference | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    spread: Spread | None = None
    others: Callable[[], Sequence[Mapping[str, Written]]] = tuple


def aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return, for every tensor that is another one under a second name, the first name."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and first.setdefault(place, name) != name:
            tied[name] = first[place]
    return tied


def write_files(folder: Path, snapshot: Snapshot, tied: Mapping[str, str]) -> None:
    """Write all files of a checkpoint to an existing folder and sync them; meta.json last.

    Args:
        folder: for this checkpoint only.
        snapshot: its tensors on the host, contiguous, each of them once.
        tied: further names of tensors, see `aliases`.

    Raises:
        OSError: if they cannot be written.
        CheckpointError: if a tensor is of a type that safetensors does not have.
    """
    spread = snapshot.spread
    evaluated = any(name.startswith(EVALUATION) for name in snapshot.training)
    written = {
        **write_part(folder, snapshot.model, snapshot.training, None if spread is None else 0),
        VALUES: write_file(folder / VALUES, json.dumps(dict(snapshot.values), indent=1).encode()),
        CONFIG: write_file(folder / CONFIG, snapshot.config_toml.encode()),
    }
    for files in snapshot.others():
        written |= files
    meta = {
        "format": FORMAT,
        "version": VERSION_OF_ONE_WRITER if spread is None else VERSION,
        "step": snapshot.step,
        "files": {
            name: {"bytes": file.num_bytes, "xxh3_64": file.xxh3_64}
            for name, file in written.items()
        },
        "aliases": dict(tied),
        "weights": ["training", *(["evaluation"] if evaluated else [])],
        **({} if spread is None else {"spread": spread.to_json()}),
        **({} if snapshot.preference is None else {"keep_best": snapshot.preference.to_json()}),
        "metrics": snapshot.metrics
        and {name: value for name, value in snapshot.metrics.items() if math.isfinite(value)},
        "made_by": dict(snapshot.made_by) or None,
        "versions": {
            "hpctrain": __version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
    }
    meta["xxh3_64"] = checksum_of_meta(meta)
    write_file(folder / META, json.dumps(meta, indent=1).encode())
    sync(folder)


def write_part(
    folder: Path, model: Mapping[str, Tensor], training: Mapping[str, Tensor], rank: int | None
) -> dict[str, Written]:
    """Write tensors to a folder, on disk when this returns.

    Args:
        folder: of the checkpoint.
        model: on the host, contiguous, each of them once.
        training: the same.
        rank: whose part this is; None: all there is.

    Returns:
        The files by name.

    Raises:
        OSError: if they cannot be written.
        CheckpointError: if a tensor is of a type that safetensors does not have.
    """
    files = {}
    for file, tensors in ((MODEL, model), (TRAINING, training)):
        name = file if rank is None else part_name(file, rank)
        files[name] = write_raw(folder / name, raw_of(tensors), {"format": "pt"})
    if rank is not None:
        sync(folder)
    return files


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
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def joined_pairs(tensors: dict[str, Tensor], texts: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Return tensors of a file with complex numbers where it has them as pairs.

    Args:
        tensors: of the file, or some of their rows.
        texts: that the file has beside them.
    """
    paired = [name for name in paired_names(texts) if name in tensors]
    return tensors | {name: torch.view_as_complex(tensors[name]) for name in paired}
