"""What is done to batches on the device: normalise, and a user's transform that draws from keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpctrain.data import random
from hpctrain.data.dataset import Field
from hpctrain.data.loading.batch_transform import BatchTransform, Scale
from hpctrain.data.order.order import sample_keys
from hpctrain.data.order.permutation import derive_keys, hash_items
from hpctrain.errors import ConfigError, TrainingError

CPU = torch.device("cpu")
KEYS = sample_keys(7, 2, np.arange(5000))
ON_DEVICE = torch.from_numpy(KEYS)
FIELDS = {
    "image": Field((3, 4, 5), np.dtype("u1")),
    "wind": Field((2,), np.dtype("<f8")),
    "half": Field((), np.dtype("<f2")),
    "wave": Field((2,), np.dtype("<c8")),
}


def test_draws_are_the_hashes_of_the_order() -> None:
    drawn = random.hashes(ON_DEVICE, 3, 2, stream=4).view(torch.uint64).numpy()
    keys = np.array([derive_keys(int(key), np.array([4]))[0] for key in KEYS[:9]], np.uint64)
    assert (drawn[:9].reshape(9, 6) == hash_items(keys, 6)).all()
    assert len(np.unique(drawn)) == drawn.size


@pytest.mark.parametrize(
    "draw",
    [
        lambda keys: random.uniform(keys, 3),
        lambda keys: random.normal(keys, 3),
        lambda keys: random.integers(keys, -5, 6, 2, 2),
        random.normal,
    ],
    ids=["uniform", "normal", "integers", "one each"],
)
def test_what_a_sample_draws_does_not_depend_on_its_batch(draw: Callable[[Tensor], Tensor]) -> None:
    whole = draw(ON_DEVICE)
    for size in (1, 7, 64):
        parts = [draw(ON_DEVICE[at : at + size]) for at in range(0, 700, size)]
        assert torch.equal(torch.cat(parts)[:700], whole[:700])


def test_draws_are_spread_as_they_say() -> None:
    uniform, normal = random.uniform(ON_DEVICE, 20), random.normal(ON_DEVICE, 20)
    assert 0 <= uniform.min() < 1e-4
    assert 1 - 1e-4 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.005
    assert abs(uniform.var() - 1 / 12) < 0.002
    assert abs(normal.mean()) < 0.02
    assert abs(normal.var() - 1) < 0.03
    assert abs((normal**4).mean() - 3) < 0.2
    counts = random.integers(ON_DEVICE, -5, 6, 20).add(5).ravel().bincount()
    assert len(counts) == 11
    assert counts.min() > 0.95 * 100_000 / 11
    streams = random.uniform(ON_DEVICE, 20, stream=1)
    assert abs(torch.corrcoef(torch.stack([uniform.ravel(), streams.ravel()]))[0, 1]) < 0.02
    neighbours = torch.corrcoef(torch.stack([uniform[:-1].ravel(), uniform[1:].ravel()]))
    assert abs(neighbours[0, 1]) < 0.02


def test_keys_differ_by_seed_epoch_and_sample() -> None:
    rows = np.arange(1000)
    keys = [sample_keys(seed, epoch, rows) for seed in (0, 1) for epoch in (0, 1)]
    assert len(np.unique(np.concatenate(keys))) == 4000


@pytest.mark.parametrize(
    ("name", "mean", "std", "dtype", "result"),
    [
        ("image", [127.5], [63.0], torch.float32, torch.float32),
        ("image", [1.5, 100.0, 200.0], [63.0, 0.1, 7.0], torch.float32, torch.float32),
        ("image", [127.5], [63.0], torch.float64, torch.float64),
        ("wind", [1e6, -3.0], [1e-3, 4.0], torch.float32, torch.float64),
        ("half", [0.5], [3.0], torch.float32, torch.float32),
    ],
)
def test_normalised_as_numpy_does(
    name: str, mean: list[float], std: list[float], dtype: torch.dtype, result: torch.dtype
) -> None:
    field = FIELDS[name]
    values = np.random.default_rng(0).integers(0, 256, (50, *field.shape)).astype(field.dtype)
    scale = Scale.of(FIELDS, name, mean, std, CPU, dtype)
    ones = (1,) * (len(field.shape) - 1)
    exact = values.astype(np.float64)
    exact = (exact - np.reshape(mean, (-1, *ones))) / np.reshape(std, (-1, *ones))
    normalised = scale.apply(torch.from_numpy(values.copy()))
    assert normalised.dtype == result
    assert normalised.shape == values.shape
    # Two roundings of the operation, and one of each constant, of values up to 256.
    rounding = 4 * torch.finfo(result).eps * max(256, *np.abs(mean)) / min(std)
    assert np.abs(normalised.double().numpy() - exact).max() <= rounding
    parts = torch.cat([scale.apply(torch.from_numpy(values[i : i + 1].copy())) for i in range(50)])
    assert torch.equal(parts, normalised)


@pytest.mark.parametrize(
    ("name", "mean", "std", "message"),
    [
        ("image", [0.0, 1.0], [1.0], "data.normalize.image.mean has 2 numbers, but .* 3 channels"),
        ("image", [0.0], [1.0] * 4, "data.normalize.image.std has 4 numbers"),
        ("half", [0.0, 1.0], [1.0], "has 2 numbers, but samples of shape () have 1 channels"),
        ("wave", [0.0], [1.0], '"wave" is complex'),
    ],
)
def test_numbers_that_do_not_fit(
    name: str, mean: list[float], std: list[float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("()", r"\(\)")):
        Scale.of(FIELDS, name, mean, std, CPU)


def test_the_transform_sees_normalised_fields_and_the_rest_as_stored() -> None:
    seen: dict[str, Any] = {}

    def transform(*, fields: dict[str, Tensor], keys: Tensor, training: bool) -> dict[str, Tensor]:
        seen.update(fields, keys=keys, training=training)
        return {**fields, "image": fields["image"] + 1}

    scale = Scale.of(FIELDS, "image", [10.0], [2.0], CPU)
    batch_transform = BatchTransform({"image": scale}, transform, ("image", "label"))
    fields = {"image": torch.full((2, 3, 4, 5), 12, dtype=torch.uint8), "label": torch.ones(2)}
    finished = batch_transform.apply(fields, ON_DEVICE[:2], training=False)
    assert (seen["image"] == 1.0).all()
    assert seen["label"] is fields["label"]
    assert torch.equal(seen["keys"], ON_DEVICE[:2])
    assert seen["training"] is False
    assert (finished["image"] == 2.0).all()
    empty = {name: tensor[:0] for name, tensor in fields.items()}
    seen.clear()
    assert (
        batch_transform.apply(empty, ON_DEVICE[:0], training=True)["image"].dtype == torch.float32
    )
    assert not seen


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned NoneType; it has to return the fields"),
        ({"images": torch.ones(2)}, 'no tensor "image", which the task needs; it returned images'),
        ({}, "it returned nothing"),
        ({"image": 3}, 'no tensor "image"'),
        ({"image": torch.ones(3, 2)}, 'made (3, 2) of "image"; there are 2 samples'),
        ({"image": torch.tensor(1.0)}, 'made () of "image"'),
    ],
)
def test_what_a_transform_must_not_return(returned: Any, message: str) -> None:
    batch_transform = BatchTransform({}, lambda **_: returned, ("image",))
    with pytest.raises(TrainingError, match=re.escape(message)):
        batch_transform.apply({"image": torch.ones(2)}, ON_DEVICE[:2], training=True)
