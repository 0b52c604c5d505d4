"""Fused kernels are used where they compute what the plain optimizers do, and nowhere else."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from hpctrain.errors import ConfigError
from hpctrain.training.optim.optimizer import (
    FUSED_KERNELS,
    build_optimizer,
    refuses_on_device,
    unknown_because,
)

SIZES = (0, 1, 7, 31, 32, 33, 64, 100, 1023, 8192)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STEPS, LR = 4, 0.5
CPU_VERSION = (2, 13)

ARGUMENTS: dict[type[Optimizer], list[dict[str, Any]]] = {
    SGD: [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.5, "maximize": True},
    ],
    # The plain Adam has no 1e-8 in float16, and divides by 0.
    Adam: [
        {"eps": 1e-3, **more}
        for more in ({}, {"amsgrad": True, "weight_decay": 0.1}, {"maximize": True})
    ],
    AdamW: [
        {"eps": 1e-3, **more}
        for more in ({}, {"amsgrad": True, "weight_decay": 0.1}, {"betas": [0.5, 0.6]})
    ],
    Adagrad: [
        {"eps": 1e-3, **more}
        for more in ({}, {"lr_decay": 0.1, "weight_decay": 0.1}, {"maximize": True})
    ],
}


class Bag(nn.Module):
    """Parameters, whatever they look like."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.items = nn.ParameterList(parameters)


def of_all_sizes(dtype: torch.dtype) -> list[nn.Parameter]:
    """Flat ones, rows of a larger tensor as FSDP has them, and images in another order."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = [draw(size) for size in SIZES]
    tensors += [draw(10, 13)[3:6], draw(200)[1:78], draw(6, 5).t()]
    tensors.append(draw(4, 3, 5, 5).to(memory_format=torch.channels_last))
    return [nn.Parameter(item) for item in tensors]


def trained(
    kind: type[Optimizer], dtype: torch.dtype, arguments: dict[str, Any], *, wide: bool = False
) -> tuple[Optimizer, list[Tensor]]:
    """Train on drawn gradients, with `wide` in float64 on the same numbers."""
    model = Bag(of_all_sizes(dtype))
    if wide:
        model.double()
    optimizer = build_optimizer(kind, model, LR, arguments)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        for item in model.items:
            drawn = torch.randn(item.shape, generator=generator).to(dtype)
            item.grad = torch.empty_like(item).copy_(drawn)
        optimizer.step()
    return optimizer, [item.detach().double() for item in model.items]


def cells() -> Iterator[tuple[type[Optimizer], torch.dtype, dict[str, Any]]]:
    for kind, dtype in itertools.product(ARGUMENTS, FLOATS):
        for arguments in ARGUMENTS[kind]:
            yield kind, dtype, arguments


@pytest.mark.parametrize(("kind", "dtype", "arguments"), list(cells()))
def test_what_is_built_computes_what_the_plain_optimizer_does(
    kind: type[Optimizer], dtype: torch.dtype, arguments: dict[str, Any]
) -> None:
    """In torch 2.13 fused SGD leaves most of a bfloat16 tensor on the CPU as it is."""
    optimizer, built = trained(kind, dtype, arguments)
    _, plain = trained(kind, dtype, {**arguments, "fused": False})
    _, exact = trained(kind, dtype, {**arguments, "fused": False}, wide=True)
    known = unknown_because(kind, of_all_sizes(dtype)) is None
    assert refuses_on_device(optimizer) == known
    for ours, theirs, right in zip(built, plain, exact, strict=True):
        if ours.numel():
            allowed = 2 * STEPS * torch.finfo(dtype).eps * right.abs().max()
            assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max() + allowed


def test_every_optimizer_with_fused_kernels_is_compared() -> None:
    found = {
        kind
        for kind in vars(torch.optim).values()
        if inspect.isclass(kind) and "fused" in inspect.signature(kind).parameters
    }
    assert found <= ARGUMENTS.keys()


def test_what_was_only_read_is_marked_as_that() -> None:
    for row in FUSED_KERNELS:
        assert row.measured or row.read
        assert (row.device == "cuda") <= (not row.measured), "no CUDA device was measured"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_choice_of_kernels_that_are_wrong_is_refused(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4).to(dtype)
    with pytest.raises(ConfigError, match=r"fused = true: of SGD on cpu in .*float16"):
        build_optimizer(SGD, model, 0.1, {"fused": True})
    assert build_optimizer(SGD, model.float(), 0.1, {"momentum": 0.9}).param_groups[0]["fused"]


class AlwaysFused(SGD):
    """Chooses for its users."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, fused=True)


class KernelsOfItsOwn(Optimizer):
    def __init__(self, params: Any, lr: float, fused: bool = False) -> None:
        super().__init__(params, {"lr": lr, "fused": fused})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do nothing."""


def test_kernels_that_others_choose_are_looked_at_too() -> None:
    with pytest.raises(ConfigError, match="of AlwaysFused on cpu in bfloat16"):
        build_optimizer(AlwaysFused, nn.Linear(2, 2).bfloat16(), 0.1, {})
    with pytest.raises(ConfigError, match="none of KernelsOfItsOwn"):
        build_optimizer(KernelsOfItsOwn, nn.Linear(2, 2), 0.1, {"fused": True})
    optimizer = build_optimizer(KernelsOfItsOwn, nn.Linear(2, 2), 0.1, {})
    assert not optimizer.param_groups[0]["fused"]


def test_views_with_gaps_get_no_kernels_that_write_into_the_gaps() -> None:
    model = Bag([nn.Parameter(torch.randn(8, 16)[:, ::2]), nn.Parameter(torch.randn(8, 16)[:, :5])])
    for fused in ({}, {"fused": False}):
        optimizer = build_optimizer(AdamW, model, 0.1, dict(fused))
        assert not optimizer.param_groups[0]["fused"]
    with pytest.raises(ConfigError, match="a view with gaps"):
        build_optimizer(AdamW, model, 0.1, {"fused": True})


@pytest.mark.parametrize(
    ("kind", "device", "dtype", "version", "known"),
    [
        (AdamW, "cpu", torch.bfloat16, (2, 13), True),
        (SGD, "cpu", torch.bfloat16, (2, 6), False),
        (SGD, "cpu", torch.float32, (2, 6), True),
        (AdamW, "cpu", torch.float32, (2, 5), False),
        (AdamW, "cpu", torch.float32, (3, 0), False),
        (AdamW, "meta", torch.float32, (2, 13), False),
        (Adam, "cpu", torch.complex64, (2, 13), False),
        (Adam, "cpu", torch.float8_e4m3fn, (2, 13), False),
        (torch.optim.RMSprop, "cpu", torch.float32, (2, 13), False),
    ],
)
def test_kernels_are_known_by_device_dtype_and_version(
    kind: type[Optimizer], device: str, dtype: torch.dtype, version: tuple[int, int], known: bool
) -> None:
    tensor = torch.empty(3, device=device, dtype=dtype)
    assert (unknown_because(kind, [tensor], version) is None) == known


def test_one_parameter_of_another_kind_decides_for_all() -> None:
    mixed = [torch.empty(3), torch.empty(3, dtype=torch.bfloat16)]
    assert unknown_because(AdamW, mixed, CPU_VERSION) is None
    assert unknown_because(SGD, mixed, CPU_VERSION) is not None
