"""Models and an optimizer of the runs in `tests/data`, as somebody may have written them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Noisy(nn.Module):
    """Statistics in a buffer, and a random draw in every pass that is the same on any processor."""

    mean: Tensor

    def __init__(self, features: int = 6, hidden: int = 12, classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(features, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, classes)
        self.register_buffer("mean", torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.training:
            self.mean.lerp_(hidden.detach().mean(0).to(self.mean.dtype), 0.3)
            hidden = hidden * (torch.rand(hidden.shape) > 0.2)
        hidden = (hidden - self.mean).relu()
        output: Tensor = self.last(self.second(hidden).relu())
        return output


class Flat(nn.Module):
    """Two layers on whatever comes in, whatever it is shaped like."""

    def __init__(self, features: int, outputs: int, hidden: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(features, hidden)
        self.last = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.first(x.flatten(1)).tanh())
        return output


class Scheduled(Flat):
    """As a diffusion model: a schedule in float64, one that is saved and one that is not."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs)
        betas = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
        self.register_buffer("kept", (1 - betas).cumprod(0))
        self.register_buffer("derived", (1 - betas).cumprod(0).sqrt(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        step = 10 + (x.detach().flatten(1).sum(1).abs() * 7).long() % 40
        scale = self.get_buffer("kept")[step] + self.get_buffer("derived")[step]
        output: Tensor = super().forward(x) * scale[:, None].to(x.dtype)
        return output


class Rotated(Flat):
    """As a Llama: a complex rotation that is not saved."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs)
        angles = torch.linspace(0.0, 1.5, features)
        self.register_buffer(
            "rotation", torch.polar(torch.ones(features), angles), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        rotated = x.flatten(1) * self.get_buffer("rotation")
        real = torch.view_as_real(rotated).sum(-1) if rotated.is_complex() else rotated
        output: Tensor = super().forward(real)
        return output


class Adapting(Optimizer):
    """As Prodigy: what it has learned of the step length is in its groups, not in its state."""

    elementwise = True

    def __init__(self, params: Iterable[Any], lr: float = 1.0, d0: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr, "d": d0, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            group["d"] = min(1e-2, group["d"] * 1.6)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"] * group["d"])
