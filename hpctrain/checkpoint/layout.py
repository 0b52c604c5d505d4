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
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpctrain.errors import CheckpointError
from hpctrain.utils.files import checksum, file_checksum

VERSION = 2
VERSION_OF_ONE_WRITER = 1
"""What older readers understand; the later one has parts, see `hpctrain.checkpoint.parts`."""
FORMAT = "hpctrain checkpoint"
META = "meta.json"
MODEL, TRAINING = "model.safetensors", "training.safetensors"
VALUES, CONFIG = "training.json", "config.toml"

_REPLACED = ".replaced"
_FOLDER = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """Return the name of the folder of a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's folder name, None if it is no such name."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def read_meta(folder: Path) -> dict[str, Any]:
    """Return meta.json.

    Raises:
        CheckpointError: if it is missing, damaged or of a newer version.
    """
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_bytes())
        version = meta["version"]
        if meta["format"] != FORMAT:
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
    if meta.pop("xxh3_64", None) != checksum_of_meta(meta):
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
    _compare(path, len(content), checksum(content), expected)
    return content


def checksum_of_meta(meta: Mapping[str, Any]) -> str:
    """Return the checksum that meta.json has of its own content."""
    return checksum(json.dumps(meta, sort_keys=True).encode())


def check_file(folder: Path, name: str, meta: Mapping[str, Any]) -> int:
    """Compare a file of a checkpoint with meta.json, a piece at a time.

    Returns:
        Its bytes.

    Raises:
        CheckpointError: if it is missing, cut or changed.
    """
    path = folder / name
    try:
        length, digest = path.stat().st_size, file_checksum(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    _compare(path, length, digest, meta["files"][name])
    return length


def _compare(path: Path, length: int, digest: str, expected: Mapping[str, Any]) -> None:
    if length != expected["bytes"]:
        raise CheckpointError(
            f"{path} is damaged: {length} bytes, {expected['bytes']} were written"
        )
    if digest != expected["xxh3_64"]:
        raise CheckpointError(f"{path} is damaged: its checksum is not that of what was written")


def newest_first(checkpoints: Path) -> Iterator[Path]:
    """Yield the folders of checkpoints, whole or not, the newest first."""
    if not checkpoints.is_dir():
        return
    steps = {path: step_of(path.name) for path in checkpoints.iterdir()}
    found = [(step, path) for path, step in steps.items() if step is not None]
    for _, path in sorted(found, reverse=True):
        yield path


def set_aside(path: Path) -> None:
    """Move a checkpoint out of the way of a new one of the same step."""
    os.replace(path, path.with_name(f".{path.name}.{time.time_ns()}{_REPLACED}"))


def those_aside(checkpoints: Path) -> list[Path]:
    """Return the folders of checkpoints in whose place new ones were to come."""
    return sorted(checkpoints.glob(f".*{_REPLACED}"), reverse=True)


def put_back(checkpoints: Path) -> None:
    """Give checkpoints their names back where a job was killed before the new ones had them."""
    for aside in those_aside(checkpoints):
        path = aside.with_name(aside.name[1:].partition(".")[0])
        if is_whole(aside) and not path.exists():
            os.replace(aside, path)


def resolved(path: Path) -> Path:
    """Return a checkpoint's folder, from that or from a run folder, whose `latest` is meant.

    Raises:
        CheckpointError: if a run folder has none.
    """
    return _named_latest(path) if (path / "checkpoints").is_dir() else path


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
