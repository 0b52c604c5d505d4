"""What a checkpoint is on disk: a folder of safetensors and JSON, and meta.json written last.

step-00000120/
  model.safetensors      parameters and buffers; loads anywhere
  training.safetensors   optimizer state and random generators
  training.json          everything else of the training state
  config.toml            the resolved config
  meta.json              step, sizes and checksums of the files above, versions
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import xxhash
from safetensors.torch import load, save_file
from torch import Tensor

from hpctrain.errors import CheckpointError
from hpctrain.version import __version__

VERSION = 1
META = "meta.json"
MODEL, TRAINING = "model.safetensors", "training.safetensors"
VALUES, CONFIG = "training.json", "config.toml"

_FOLDER = re.compile(r"step-(\d{8,})")


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


def folder_name(step: int) -> str:
    """Return the name of the folder of a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's folder name, None if it is no such name."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


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
        "format": "hpctrain checkpoint",
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
    meta["xxh3_64"] = _checksum_of(meta)
    (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    sync(folder / META)
    sync(folder)


def read_meta(folder: Path) -> dict[str, Any]:
    """Return meta.json.

    Raises:
        CheckpointError: if it is missing, damaged or of a newer version.
    """
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_bytes())
        version = meta["version"]
        if meta["format"] != "hpctrain checkpoint":
            raise ValueError("not the meta.json of a checkpoint")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not whole: it has no {META}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / META} is damaged: {error}") from error
    if version > VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, and this hpctrain reads up to {VERSION}: "
            "update hpctrain"
        )
    if meta.pop("xxh3_64", None) != _checksum_of(meta):
        raise CheckpointError(
            f"{folder / META} is damaged: its checksum is not that of its content"
        )
    return meta


def read_file(folder: Path, name: str, meta: Mapping[str, Any]) -> bytes:
    """Return the content of a file of a checkpoint, compared with meta.json.

    Raises:
        CheckpointError: if it is missing, cut or changed.
    """
    path = folder / name
    try:
        content = path.read_bytes()
        expected = meta["files"][name]
    except (OSError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if len(content) != expected["bytes"]:
        raise CheckpointError(
            f"{path} is damaged: {len(content)} bytes, {expected['bytes']} were written"
        )
    if xxhash.xxh3_64_hexdigest(content) != expected["xxh3_64"]:
        raise CheckpointError(f"{path} is damaged: its checksum is not that of what was written")
    return content


def tensors_of(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the host."""
    tensors: dict[str, Tensor] = load(content)
    return tensors


def _checksum_of(meta: Mapping[str, Any]) -> str:
    return str(xxhash.xxh3_64_hexdigest(json.dumps(meta, sort_keys=True).encode()))


def checksum(path: Path) -> str:
    """Return the xxh3-64 of a file, as hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(4 * 2**20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have a file or folder on disk before anything that follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
