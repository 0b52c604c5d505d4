"""Checkpoints back from disk: verified, or refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hpctrain.checkpoint.format import tensors_of
from hpctrain.checkpoint.layout import (
    CONFIG,
    MODEL,
    TRAINING,
    VALUES,
    newest_first,
    put_back,
    read_file,
    read_meta,
    resolved,
)
from hpctrain.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint in host memory, every byte compared with its checksum."""

    path: Path
    step: int
    model: dict[str, Tensor]
    training: dict[str, Tensor]
    values: dict[str, Any]
    config_toml: str


def load(path: Path) -> Loaded:
    """Read a checkpoint, whole.

    Raises:
        CheckpointError: if any file of it is missing or is not what was written.
    """
    path = resolved(path)
    meta = read_meta(path)
    model = tensors_of(read_file(path, MODEL, meta))
    for name, first in meta["aliases"].items():
        model[name] = model[first]
    return Loaded(
        path=path,
        step=meta["step"],
        model=model,
        training=tensors_of(read_file(path, TRAINING, meta)),
        values=json.loads(read_file(path, VALUES, meta)),
        config_toml=read_file(path, CONFIG, meta).decode("utf-8"),
    )


def load_newest(checkpoints: Path, tell: Callable[[str], None]) -> Loaded | None:
    """Read the newest whole checkpoint of a folder; None if there is none.

    Args:
        checkpoints: the folder of all of them.
        tell: is told of every newer one that is not whole.

    Raises:
        CheckpointError: if the folder cannot be used.
    """
    try:
        put_back(checkpoints)
    except OSError as error:
        raise CheckpointError(f"cannot use {checkpoints}: {error}") from error
    for path in newest_first(checkpoints):
        try:
            return load(path)
        except CheckpointError as error:
            tell(f"skipped: {error}")
    return None
