"""A snapshot of a run to the files of a checkpoint, and tried in memory before the first step."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from hpctrain.checkpoint.best import Preference
from hpctrain.checkpoint.format import (
    CONFIG,
    EVALUATION,
    FORMAT,
    META,
    MODEL,
    TRAINING,
    VALUES,
    VERSION,
    VERSION_OF_ONE_WRITER,
    Spread,
    checksum_of_meta,
    part_name,
)
from hpctrain.checkpoint.host_copies import HostCopies
from hpctrain.checkpoint.safetensors_files import Written, pieces_of_file, write_file, write_raw
from hpctrain.checkpoint.state import require_savable
from hpctrain.checkpoint.tensors import raw_of, tensor_bytes, tensors_of
from hpctrain.errors import CheckpointError
from hpctrain.utils.files import sync
from hpctrain.version import __version__

_MOST_TRIED_BYTES = 64 * 2**20
_MOST_TRIED_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that a checkpoint holds.

    Attributes:
        step: last step that is part of it.
        model: parameters and buffers by name. Tied tensors, which share memory, are stored once.
        training: state of random generators and other tensors of the training state, by name.
        lent: more of `training`, such as optimizer state, that stays as it is for a while.
        lend: hook for a function that is to be called, and to return, before `lent` changes.
        values: the rest of the training state; JSON.
        config_toml: the resolved config.
        metrics: results of an evaluation at this very step.
        made_by: facts of the job that saves it; JSON.
        preference: metric and direction of the run's best checkpoint; None: it keeps none.
        tied: further names of tensors, besides those that share memory here.
        spread: rows by rank, where `model` and `training` are rank 0's part of whole tensors.
        others: wait for the parts of the other ranks, which returns the files of each.
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
        folder: new folder of this checkpoint.
        snapshot: content, its tensors on the host, contiguous, each of them once.
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
        folder: folder of the checkpoint.
        model: tensors on the host, contiguous, each of them once.
        training: more such tensors.
        rank: writer of this part; None: the only one.

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


def try_snapshot(snapshot: Snapshot) -> None:
    """Check all that a checkpoint would hold, and send a part of it there and back.

    Names, types, shapes and layouts of everything; the bytes of the smallest tensors, of which the
    unusual ones are, up to 64 MiB and for a second at most.

    Raises:
        CheckpointError: naming what could not be saved, or would come back as something else.
    """
    tensors = {**snapshot.model, **snapshot.training, **snapshot.lent}
    for name, tensor in tensors.items():
        require_savable(name, tensor, own_class=name in snapshot.model)
    _try_values(snapshot)
    begin, taken = time.monotonic(), 0
    chosen: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].nbytes):
        taken += tensor.nbytes
        if taken > _MOST_TRIED_BYTES or time.monotonic() - begin > _MOST_TRIED_SECONDS:
            break
        chosen[name] = tensor
    _try_bytes(chosen)


def _try_values(snapshot: Snapshot) -> None:
    for name, value in snapshot.values.items():
        try:
            text = json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} cannot be saved: {error}") from error
        if json.dumps(json.loads(text)) != text:
            raise CheckpointError(f"{name} cannot be saved: JSON makes something else of it")


def _try_bytes(tensors: dict[str, Tensor]) -> None:
    try:
        host = HostCopies().copy("trial", tensors)
        content = b"".join(pieces_of_file(raw_of(host), {"format": "pt"}))
        back = tensors_of(content, Path("a file in memory"))
    except RuntimeError as error:
        raise CheckpointError(f"what a checkpoint would hold cannot be copied: {error}") from error
    for name, tensor in host.items():
        there = back.get(name)
        if (
            there is None
            or (there.dtype, there.shape) != (tensor.dtype, tensor.shape)
            or not torch.equal(tensor_bytes(there), tensor_bytes(tensor))
        ):
            raise CheckpointError(f"{name} does not come back from a file as it is")
