"""A checkpoint tried in memory: what it would hold can be written, and comes back."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from hpctrain.checkpoint.format import Snapshot, raw_of, tensors_of
from hpctrain.checkpoint.host import HostCopies
from hpctrain.checkpoint.raw import pieces_of_file
from hpctrain.checkpoint.tensor_bytes import tensor_bytes
from hpctrain.checkpoint.tree import require_savable
from hpctrain.errors import CheckpointError

MOST_BYTES = 64 * 2**20
MOST_SECONDS = 1.0


def try_snapshot(snapshot: Snapshot) -> None:
    """Look at all that a checkpoint would hold, and send a part of it there and back.

    Names, types, shapes and layouts of everything; the bytes of the smallest tensors, of which the
    unusual ones are, as far as `MOST_BYTES` and `MOST_SECONDS` go.

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
        if taken > MOST_BYTES or time.monotonic() - begin > MOST_SECONDS:
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
