"""A device is asked for what is its own; a run on CPUs asks none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpctrain import accelerator
from hpctrain.checkpoint.save import HostCopies
from hpctrain.checkpoint.state import restore_rng, rng_to_tensors
from hpctrain.training.model.undisturbed import kept_generators
from hpctrain.training.optim.trial import generator_states

CPU = torch.device("cpu")


class Generators:
    """Stands for torch.xpu, of which nobody here has one: a generator and a current device."""

    def __init__(self) -> None:
        self.state = torch.arange(4, dtype=torch.uint8)
        self.current: torch.device | None = None

    def get_rng_state(self, device: torch.device) -> Tensor:
        assert device == torch.device("xpu", 1)
        return self.state.clone()

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        assert device == torch.device("xpu", 1)
        self.state = state.clone()

    def set_device(self, device: torch.device) -> None:
        self.current = device

    def synchronize(self, device: torch.device) -> None:
        assert device == torch.device("xpu", 1)


def test_the_generator_of_an_intel_gpu_is_saved_and_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, module = torch.device("xpu", 1), Generators()
    monkeypatch.setattr(torch, "xpu", module)
    tensors, values = rng_to_tensors(device)
    before = module.state.clone()
    module.state += 1
    torch.rand(3)
    restore_rng(tensors, values, device)
    assert torch.equal(module.state, before)
    assert torch.equal(torch.get_rng_state(), tensors["torch"])
    accelerator.enter(device)
    assert module.current == device
    # Gone on with on the CPU: there is nothing to put it into.
    restore_rng(tensors, values, CPU)


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("a context was opened on the first GPU")


def test_a_run_on_cpus_asks_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch.cuda, torch.xpu):
        for name in ("is_available", "current_stream", "get_rng_state", "set_device", "_lazy_init"):
            monkeypatch.setattr(module, name, forbidden)
    accelerator.enter(CPU)
    accelerator.synchronize(CPU)
    saved = rng_to_tensors(CPU)
    restore_rng(*saved, CPU)
    with kept_generators(CPU):
        torch.rand(2)
    assert generator_states()
    copies = HostCopies()
    tensors = {"a": torch.ones(3)}
    assert torch.equal(copies.copy("x", tensors)["a"], tensors["a"])
    later = copies.copy_later("y", tensors)
    later.make()
    later.wait()
    assert torch.equal(later.host["a"], tensors["a"])
