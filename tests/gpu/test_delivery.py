"""Batches on a device equal what h5py reads, whatever consumer, buffers and streams do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.loaders import train_loader
from torch import Tensor

from hpctrain.accelerator import Streams
from hpctrain.data import Writer, open_dataset
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.batch_transform import BatchTransform
from hpctrain.data.loading.device_copies import Copying
from hpctrain.data.loading.loader import TrainLoader
from hpctrain.data.loading.prefetch import DEVICE_ALIGNMENT_BYTES
from hpctrain.data.order.order import Order

SAMPLES = 3001
CYCLES = 50_000_000
"""Of the device: about 30 ms."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delivery") / "data"
    draw = np.random.default_rng(0)
    with Writer(path, shard_bytes=200_000) as writer:
        writer.extend(
            {
                "image": draw.integers(0, 256, (SAMPLES, 3, 17), np.uint8),
                "values": draw.standard_normal((SAMPLES, 9)).astype(np.float32),
                "id": np.arange(SAMPLES),
            }
        )
    return path


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, np.ndarray]:
    """What h5py reads, in the order of the ids."""
    parts: dict[str, list[np.ndarray]] = {"image": [], "values": [], "id": []}
    for shard in sorted(folder.rglob("*.h5")):
        with h5py.File(shard) as file:
            for name, found in parts.items():
                found.append(file[name][:])
    whole = {name: np.concatenate(found) for name, found in parts.items()}
    order = np.argsort(whole["id"])
    return {name: values[order] for name, values in whole.items()}


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return open_dataset(str(folder))


def keyed(*, fields: dict[str, Tensor], keys: Tensor, training: bool) -> dict[str, Tensor]:
    """A transform that needs keys, and changes nothing that is compared."""
    return {**fields, "keys": keys.view(torch.int64) // 2}


def loader(dataset: Dataset, device: torch.device, buffer_mb: float) -> TrainLoader:
    return train_loader(
        dataset,
        Order(samples=SAMPLES, seed=3, lanes=16, window=4, block_rows=8),
        fields=["image", "values", "id"],
        global_batch_size=64,
        device=device,
        buffer_mb=buffer_mb,
        batch_transform=BatchTransform(transform=keyed),
    )


def delay(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda._sleep(CYCLES)


def copies(device: torch.device, batches: TrainLoader, how: str) -> Iterator[dict[str, Tensor]]:
    """Yield copies of all batches, made by a consumer of some kind."""
    streams = Streams(device) if device.type == "cuda" else None
    aside = None if streams is None else streams.new()
    for number, batch in enumerate(batches.epoch(0)):
        with streams.on(aside) if streams and how == "streams" and number % 2 else nullcontext():
            if how == "slow" and number % 5 == 0:
                delay(device)
            yield {name: each.clone() for name, each in batch.fields.items()}


def differences(found: list[dict[str, Tensor]], stored: dict[str, np.ndarray]) -> int:
    wrong = 0
    seen = []
    for fields in found:
        ids = fields["id"].cpu().numpy()
        seen.append(ids)
        if ids.min() < 0 or ids.max() >= SAMPLES:
            wrong += 1
            continue
        wrong += any(
            fields[name].cpu().numpy().tobytes() != stored[name][ids].tobytes()
            for name in ("image", "values")
        )
    return wrong + (np.sort(np.concatenate(seen)).tolist() != list(range(SAMPLES)))


@pytest.mark.parametrize("how", ["fast", "slow", "streams"])
@pytest.mark.parametrize("buffer_mb", [0.01, 64.0])
def test_batches_are_what_is_stored(
    dataset: Dataset,
    stored: dict[str, np.ndarray],
    device: torch.device,
    how: str,
    buffer_mb: float,
) -> None:
    batches = loader(dataset, device, buffer_mb)
    found = list(copies(device, batches, how))
    batches.close()
    assert differences(found, stored) == 0
    expected = loader(dataset, torch.device("cpu"), 64.0)
    for mine, theirs in zip(found, expected.epoch(0), strict=True):
        assert torch.equal(mine["keys"].cpu(), theirs.fields["keys"])
    expected.close()


def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have copies come late, into memory that holds something else."""

    def copied(self: Streams, tensor: Tensor) -> Tensor:
        made = torch.full(tensor.shape, 77, dtype=tensor.dtype, device=self.device)
        torch.cuda._sleep(CYCLES // 10)
        return made.copy_(tensor, non_blocking=True)

    monkeypatch.setattr(Streams, "copied", copied)


@pytest.mark.on_device
def test_late_copies_are_waited_for(
    dataset: Dataset,
    stored: dict[str, np.ndarray],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late(monkeypatch)
    batches = loader(dataset, device, 1.0)
    assert differences(list(copies(device, batches, "fast")), stored) == 0
    batches.close()


@pytest.mark.on_device
def test_without_waiting_they_would_be_wrong(
    dataset: Dataset,
    stored: dict[str, np.ndarray],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late(monkeypatch)
    monkeypatch.setattr(Copying, "require", lambda self: None)
    batches = loader(dataset, device, 1.0)
    assert differences(list(copies(device, batches, "fast")), stored) > 0
    batches.close()


def test_batches_begin_where_fresh_tensors_do(dataset: Dataset, device: torch.device) -> None:
    batches = loader(dataset, device, 64.0)
    alignment = DEVICE_ALIGNMENT_BYTES if device.type == "cuda" else 64
    for batch in batches.epoch(0, start=64 * 3):
        for name, tensor in batch.fields.items():
            if name != "keys":
                assert tensor.data_ptr() % alignment == 0, name
    batches.close()


def test_delivery_waits_for_nothing(
    dataset: Dataset, device: torch.device, waits_are_errors: Any
) -> None:
    batches = loader(dataset, device, 64.0)
    sums = [batch.fields["values"].sum() for batch in batches.epoch(0)]
    batches.close()
    assert len(sums) == -(-SAMPLES // 64)
