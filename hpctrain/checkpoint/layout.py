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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpctrain.checkpoint.schema import Meta, MetaHead
from hpctrain.errors import CheckpointError
from hpctrain.utils.files import checksum, file_checksum
from hpctrain.utils.json_files import (
    LARGE,
    parse_checked,
    parse_json,
    read_name,
    read_whole,
    require_file,
)
from hpctrain.utils.text import printable

VERSION = 2
VERSION_OF_ONE_WRITER = 1
"""What older readers understand; the later one has parts, see `hpctrain.checkpoint.parts`."""
FORMAT = "hpctrain checkpoint"
META, LATEST = "meta.json", "latest"
MODEL, TRAINING = "model.safetensors", "training.safetensors"
VALUES, CONFIG = "training.json", "config.toml"
AVERAGE = "average/"
"""Begins the names of the moving averages among the tensors of the training state."""
EVALUATION = "evaluation/"
"""The same of the weights that an optimizer with `train()` and `eval()` evaluates with."""

_REPLACED = ".replaced"
_FOLDER = re.compile(r"step-(\d{8,})")


class UnreadableError(CheckpointError):
    """A checkpoint that may be whole, but that cannot be read here and now.

    The permission is missing, the disk or the network fails, or it is of a newer hpctrain. Unlike
    one that is damaged it is not to be passed over: it would be lost to a run that begins anew.
    """


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
        CheckpointError: if it is missing, damaged, or cannot be read for now.
    """
    path = folder / META
    try:
        content = read_whole(path, LARGE)
        head = parse_checked(content, MetaHead)
        if head.format != FORMAT:
            raise ValueError("it is not the meta.json of a checkpoint")
        if head.version > VERSION:
            raise UnreadableError(
                f"{folder} has format version {head.version}, and this hpctrain reads up to "
                f"{VERSION}: update hpctrain"
            )
        parse_checked(content, Meta)
        meta: dict[str, Any] = parse_json(content)
        for name in meta["files"]:
            if "/" in name or not name.isprintable() or name in ("", ".", ".."):
                raise ValueError(f"{printable(name[:60])!r} is not the name of a file beside it")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not whole: it has no {META}") from error
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if meta.pop("xxh3_64") != checksum_of_meta(meta):
        raise CheckpointError(f"{path} is damaged: its checksum is not that of its content")
    return meta


def read_file(folder: Path, name: str, meta: Mapping[str, Any]) -> bytes:
    """Return the content of a file of a checkpoint, compared with meta.json.

    Raises:
        CheckpointError: if it is missing, cut or changed.
    """
    path = folder / name
    expected = _expected(folder, name, meta)
    with _reading(path):
        content = read_whole(path, expected["bytes"])
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
    expected = _expected(folder, name, meta)
    with _reading(path):
        length = require_file(path, expected["bytes"])
        digest = file_checksum(path)
    _compare(path, length, digest, expected)
    return length


def _expected(folder: Path, name: str, meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what meta.json says of a file."""
    try:
        return meta["files"][name]  # type: ignore[no-any-return]
    except KeyError as error:
        raise CheckpointError(f"{folder / META} is damaged: it has no file {name}") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Tell what the system does not let read from what is not there (any more)."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _compare(path: Path, length: int, digest: str, expected: Mapping[str, Any]) -> None:
    if length != expected["bytes"]:
        raise CheckpointError(
            f"{path} is damaged: {length} bytes, {expected['bytes']} were written"
        )
    if digest != expected["xxh3_64"]:
        raise CheckpointError(f"{path} is damaged: its checksum is not that of what was written")


def newest_first(checkpoints: Path) -> Iterator[Path]:
    """Yield the folders of checkpoints, whole or not, the newest first.

    Raises:
        CheckpointError: if they cannot be listed; none, where there is no such folder.
    """
    try:
        found = list(checkpoints.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UnreadableError(f"{checkpoints} cannot be listed: {error.strerror}") from error
    steps = [(step, path) for path in found if (step := step_of(path.name)) is not None]
    for _, path in sorted(steps, reverse=True):
        yield path


def evaluations(checkpoints: Path) -> list[tuple[int, Mapping[str, float] | None]]:
    """Return (step, metrics of an evaluation at that step) of every checkpoint that is whole.

    Raises:
        CheckpointError: if they cannot be listed.
    """
    found = []
    for path in newest_first(checkpoints):
        with suppress(CheckpointError):
            meta = read_meta(path)
            found.append((meta["step"], meta["metrics"]))
    return found


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
    path = run / LATEST
    try:
        return run / "checkpoints" / read_name(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{run} has no checkpoint yet: there is no {path}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; name a checkpoint in {run / 'checkpoints'} itself"
        ) from error


def is_whole(path: Path) -> bool:
    """Tell whether a checkpoint was finished; its bytes are not looked at."""
    return (path / META).is_file()
