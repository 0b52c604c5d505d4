"""What is done to a model before training changes how it computes, and not what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.steps import CPU, make_step
from torch import nn

from hpctrain.checkpoint.optimizer_state import SavedOptimizer
from hpctrain.config.schema import TrainingSection
from hpctrain.data.loading.loader import Batch
from hpctrain.data.order.batches import Batching, Begun, Epochs, RankShare
from hpctrain.data.order.order import Order
from hpctrain.errors import ConfigError
from hpctrain.models.convnet import ConvNet
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.preparation import prepare_model

IMAGES = {
    "x": torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(0)),
    "y": torch.arange(8) % 3,
}


def prepared(**section: Any) -> nn.Module:
    torch.manual_seed(0)
    chosen = TrainingSection(max_steps=1, **section)
    number_format = NumberFormat.of(chosen.precision, CPU, channels_last=chosen.channels_last)
    return prepare_model(ConvNet(2, 3, widths=[8, 16]), chosen, number_format, CPU, 1)


def trained(model: nn.Module, steps: int = 4, **options: Any) -> Any:
    step = make_step(model, example={name: item[:1] for name, item in IMAGES.items()}, **options)
    step.dry_run()
    for _ in range(steps):
        step(Batch(fields=IMAGES, size=8, global_size=8, epoch=0, start=0), 0.02)
    return step


def test_activations_that_are_computed_again_give_the_same_gradients() -> None:
    plain, again = prepared(), prepared(activation_checkpointing=("features.?", "classifier"))
    passes = []
    again.features[0].register_forward_hook(lambda *_: passes.append(1))
    assert list(again.state_dict()) == list(plain.state_dict())
    ours, theirs = trained(again), trained(plain)
    for name, item in theirs.model.state_dict().items():
        assert torch.equal(item, ours.model.state_dict()[name]), name
    inner = []
    again.features[0][0].register_forward_hook(lambda *_: inner.append(1))
    again(IMAGES["x"]).sum().backward()
    assert len(inner) == 2  # forward, and once more in backward


def test_a_pattern_that_fits_no_module() -> None:
    with pytest.raises(ConfigError, match='did you mean "classifier"'):
        prepared(activation_checkpointing=("clasifier",))


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9})],
)
def test_channels_last_trains_and_resumes(optimizer: Any, arguments: dict[str, Any]) -> None:
    """Fused kernels walk through memory: restored state has to lie as the parameters do."""
    options = {"optimizer": optimizer, "arguments": arguments}
    plain = trained(prepared(), **options)
    model = prepared(channels_last=True)
    assert any(item.ndim == 4 and not item.is_contiguous() for item in model.parameters())
    step = trained(model, **options)
    for name, item in plain.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], item, rtol=1e-3, atol=1e-4)

    other = trained(prepared(channels_last=True), steps=0, **options)
    other.model.load_state_dict({n: item.contiguous() for n, item in model.state_dict().items()})
    saved = step.optimizer_state.capture(model)
    tensors = {name: item.contiguous() for name, item in saved.tensors.items()}
    other.optimizer_state.restore(other.model, SavedOptimizer(tensors, saved.values))
    batch = Batch(fields=IMAGES, size=8, global_size=8, epoch=0, start=0)
    for _ in range(3):
        step(batch, 0.02)
        other(batch, 0.02)
    for name, item in model.state_dict().items():
        assert torch.equal(item, other.model.state_dict()[name]), name


def test_images_come_with_their_channels_last() -> None:
    number_format = NumberFormat.of("32-true", CPU, channels_last=True)
    cast = number_format.cast({"x": IMAGES["x"].double(), "y": IMAGES["y"]}, ["x"])
    assert cast["x"].dtype == torch.float32
    assert cast["x"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(cast["x"], IMAGES["x"])


@pytest.mark.parametrize("samples", [64, 65, 97])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_smallest_share_is_that_of_some_batch(samples: int, world_size: int) -> None:
    order = Order(samples=samples, seed=1, lanes=8, window=2, block_rows=2)
    smallest = order.smallest_share(16, samples, world_size)
    shares = [
        len(order.positions(start, min(start + 16, samples), rank, world_size))
        for start in range(0, samples, 16)
        for rank in range(world_size)
    ]
    assert smallest <= min(shares)
    if samples % 16:
        assert smallest == min(shares)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("begin", [0, 16, 32, 48, 59])
def test_the_smallest_share_of_an_epoch_that_goes_on_in_other_batches(
    begin: int, drop_last: bool
) -> None:
    """Its last batch may be smaller than any of an epoch that begins with these batches."""
    order = Order(samples=64, seed=1, lanes=8, window=2, block_rows=2)
    epochs = Epochs(
        order,
        "data",
        Batching(global_batch_size=12, drop_last=drop_last),
        RankShare(0, 4),
        begun=Begun(orders={3: order}, position=begin),
    )
    size = epochs.size
    shares = [
        int(order.shares(start, min(start + 12, size), 4).min())
        for first in (0, begin)
        for start in range(first, size, 12)
    ]
    assert epochs.smallest_share == min(shares)


@pytest.fixture
def of_devices() -> Iterator[Callable[[], list[bool]]]:
    """What torch knows of arithmetic on GPUs: put back at the end, as another test may ask."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def found() -> list[bool]:
        return [cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark]

    before = found()
    cuda.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
    yield found
    cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def test_what_a_gpu_is_told_of_its_arithmetic(of_devices: Callable[[], list[bool]]) -> None:
    """Nothing is on it yet: what is to be spread over ranks stays on the host."""

    def told(device: str, **section: Any) -> list[bool]:
        chosen = TrainingSection(max_steps=1, strategy="fsdp", **section)
        number_format = NumberFormat.of("32-true", CPU)
        prepare_model(ConvNet(2, 3), chosen, number_format, torch.device(device), 2)
        return of_devices()

    assert told("cpu", cudnn_benchmark=True, tf32=True) == [False, False, False]
    assert told("cuda") == [False, False, False]
    assert told("cuda", cudnn_benchmark=True, tf32=True) == [True, True, True]
