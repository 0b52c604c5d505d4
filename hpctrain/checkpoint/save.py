"""Snapshots of a run: copies in host memory, which training need not wait for, and their files.

The files are tried in memory before the first step.
"""

from __future__ import annotations

import ctypes
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import safetensors
import torch
from torch import Tensor

from hpctrain.accelerator import COPIES_ASIDE, Streams, enter
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
    VERSION_OF_RANKS,
    Spread,
    checksum_of_meta,
    part_name,
)
from hpctrain.checkpoint.safetensors_files import Written, pieces_of_file, write_file, write_raw
from hpctrain.checkpoint.state import require_savable
from hpctrain.checkpoint.tensors import raw_of, tensor_bytes, tensors_of
from hpctrain.errors import CheckpointError
from hpctrain.utils.files import sync
from hpctrain.version import __version__


def pinned_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of host memory that copies of a device's tensors take: powers of two.

    Source: aten/src/ATen/core/CachingHostAllocator.h of torch 2.13, allocate.
    """
    sizes = [item.numel() * item.element_size() for item in tensors if _is_copied_aside(item)]
    return sum(1 << max(0, size - 1).bit_length() for size in sizes)


class HostCopies:
    """Memory that is kept from save to save: fresh memory costs more than the data."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._aside: dict[torch.device, _Aside] = {}

    def copy(self, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of tensors on the host, in the place of those of the same group before."""
        host = self._buffers(group, tensors)
        for name, tensor in tensors.items():
            host[name].copy_(tensor.detach(), non_blocking=_is_copied_aside(tensor))
        for device in {item.device for item in tensors.values() if _is_copied_aside(item)}:
            streams = Streams(device)
            streams.mark(streams.current()).synchronize()
        return host

    def copies(
        self, snapshot: Snapshot, model: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return copies of these tensors of the model and of the training state of a snapshot."""
        if snapshot.is_copied:
            return dict(model), dict(snapshot.training)
        return self.copy("model", model), self.copy("training", snapshot.training)

    def copy_later(self, group: str, tensors: Mapping[str, Tensor]) -> LaterCopies:
        """Return copies that are made while training goes on: of tensors that stay as they are."""
        devices = {item.device for item in tensors.values() if _is_copied_aside(item)}
        aside = [self._aside_of(device) for device in devices]
        return LaterCopies(tensors, self._buffers(group, tensors), aside)

    def _aside_of(self, device: torch.device) -> _Aside:
        if device not in self._aside:
            streams = Streams(device)
            self._aside[device] = _Aside(streams, streams.new())
        return self._aside[device]

    def _buffers(self, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return memory for copies of tensors, each contiguous."""
        kept = self._kept.get(group, {})
        host = {}
        for name, tensor in tensors.items():
            buffer = kept.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=_is_copied_aside(tensor)
                )
            host[name] = buffer
        self._kept[group] = host
        return host


@dataclass(frozen=True, slots=True)
class _Aside:
    """A device, and the one stream on which copies for all saves are made beside its work."""

    streams: Streams
    stream: Any


class LaterCopies:
    """Copies in the making, while the originals stay as they are.

    A CUDA device makes them on a stream of its own, beside its work; of all else the thread that
    calls `make` does.

    Attributes:
        host: copies by name; whole when `make` has returned.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], host: dict[str, Tensor], aside: Sequence[_Aside] = ()
    ) -> None:
        self.host = host
        # Held until they are copied, whatever else lets go of them.
        self._originals = {name: tensor.detach() for name, tensor in tensors.items()}
        self._copied = Event()
        self._on_device: list[tuple[Streams, Any]] = []
        for each in aside:
            streams, stream = each.streams, each.stream
            stream.wait_stream(streams.current())
            with streams.on(stream):
                for name, tensor in self._originals.items():
                    if tensor.device == streams.device:
                        host[name].copy_(tensor, non_blocking=True)
            self._on_device.append((streams, streams.mark(stream)))

    def make(self) -> None:
        """Make the copies, and wait for those of a CUDA device.

        Raises:
            CheckpointError: if torch cannot.
        """
        try:
            for name, tensor in self._originals.items():
                if not _is_copied_aside(tensor):
                    _copy(self.host[name], tensor)
            self._copied.set()
            for streams, done in self._on_device:
                enter(streams.device)  # a thread that waits for a device opens a context on its own
                done.synchronize()
        except RuntimeError as error:
            raise CheckpointError(f"cannot copy what is to be saved: {error}") from error
        finally:
            self._copied.set()
            self._originals.clear()

    def wait(self) -> None:
        """Return once the originals may change; the device's next kernels wait by themselves."""
        self._copied.wait()
        for streams, done in self._on_device:
            streams.current().wait_event(done)


def _is_copied_aside(tensor: Tensor) -> bool:
    return tensor.device.type in COPIES_ASIDE


def _copy(buffer: Tensor, tensor: Tensor) -> None:
    """Copy to contiguous memory of the host."""
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        # torch would wake as many threads as training computes with at this moment.
        ctypes.memmove(buffer.data_ptr(), tensor.data_ptr(), tensor.numel() * tensor.element_size())
    else:
        buffer.copy_(tensor)


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
        is_copied: `model` and `training` are copies on the host already, of this save alone.
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
    is_copied: bool = False
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
        "version": _version(spread),
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


def _version(spread: Spread | None) -> int:
    """Return the lowest version of the format that says how the tensors are spread."""
    if spread is None:
        return VERSION_OF_ONE_WRITER
    return VERSION_OF_RANKS if spread.group == 1 else VERSION


def write_part(
    folder: Path, model: Mapping[str, Tensor], training: Mapping[str, Tensor], part: int | None
) -> dict[str, Written]:
    """Write tensors to a folder, on disk when this returns.

    Args:
        folder: folder of the checkpoint.
        model: tensors on the host, contiguous, each of them once.
        training: more such tensors.
        part: number of this part; None: the only one.

    Returns:
        The files by name.

    Raises:
        OSError: if they cannot be written.
        CheckpointError: if a tensor is of a type that safetensors does not have.
    """
    files = {}
    for file, tensors in ((MODEL, model), (TRAINING, training)):
        name = file if part is None else part_name(file, part)
        files[name] = write_raw(folder / name, raw_of(tensors), {"format": "pt"})
    if part is not None:
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
