"""Tensors and texts to the files of a checkpoint, see `hpctrain.checkpoint.layout`."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from hpctrain.checkpoint.layout import (
    CONFIG,
    FORMAT,
    META,
    MODEL,
    TRAINING,
    VALUES,
    VERSION,
    checksum,
    checksum_of_meta,
    sync,
)
from hpctrain.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that a checkpoint holds.

    Attributes:
        step: the last one that is part of it.
        model: parameters and buffers by name. Tied tensors, which share memory, are stored once.
        training: optimizer state and generators by name.
        values: the rest of the training state; JSON.
        config_toml: the resolved config.
        metrics: of an evaluation at this very step.
    """

    step: int
    model: Mapping[str, Tensor]
    training: Mapping[str, Tensor]
    values: Mapping[str, Any]
    config_toml: str
    metrics: Mapping[str, float] | None = None


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
    """Write all files of a checkpoint to an existing folder and sync them; meta.json last."""
    save_file(dict(snapshot.model), folder / MODEL, metadata={"format": "pt"})
    save_file(dict(snapshot.training), folder / TRAINING, metadata={"format": "pt"})
    (folder / VALUES).write_text(json.dumps(dict(snapshot.values), indent=1), encoding="utf-8")
    (folder / CONFIG).write_text(snapshot.config_toml, encoding="utf-8")
    files = {}
    for name in (MODEL, TRAINING, VALUES, CONFIG):
        sync(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "xxh3_64": checksum(folder / name)}
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "step": snapshot.step,
        "files": files,
        "aliases": dict(tied),
        "metrics": snapshot.metrics
        and {name: value for name, value in snapshot.metrics.items() if math.isfinite(value)},
        "versions": {
            "hpctrain": __version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
    }
    meta["xxh3_64"] = checksum_of_meta(meta)
    (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    sync(folder / META)
    sync(folder)


def tensors_of(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the host."""
    tensors: dict[str, Tensor] = load(content)
    return tensors
