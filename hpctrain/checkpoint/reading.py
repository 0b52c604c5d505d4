"""Checkpoints back from disk: verified, or refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hpctrain.checkpoint.format import (
    CONFIG,
    META,
    MODEL,
    TRAINING,
    VALUES,
    read_file,
    read_meta,
    step_of,
    tensors_of,
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
    if (path / "checkpoints").is_dir():
        path = _named_latest(path)
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
    """
    for path in newest_first(checkpoints):
        try:
            return load(path)
        except CheckpointError as error:
            tell(f"skipped: {error}")
    return None


def newest_first(checkpoints: Path) -> Iterator[Path]:
    """Yield the folders of checkpoints, whole or not, the newest first."""
    if not checkpoints.is_dir():
        return
    steps = {path: step_of(path.name) for path in checkpoints.iterdir()}
    found = [(step, path) for path, step in steps.items() if step is not None]
    for _, path in sorted(found, reverse=True):
        yield path


def _named_latest(run: Path) -> Path:
    """Return the checkpoint that a run folder's `latest` names."""
    try:
        name = (run / "latest").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise CheckpointError(f"{run} has no checkpoint: {error}") from error
    return run / "checkpoints" / name


def is_whole(path: Path) -> bool:
    """Tell whether a checkpoint was finished; its bytes are not looked at."""
    return (path / META).is_file()
