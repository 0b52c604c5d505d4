"""Models as people bring them: what they hold besides float32 parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from step_world import CLASSES, FEATURES
from torch import Tensor, nn


class Spectral(nn.Module):
    """A layer of a Fourier neural operator: complex weights on the lowest modes."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        scale = 1 / channels
        weight = scale * torch.randn(channels, channels, modes, dtype=torch.cfloat)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(x)
        out = torch.zeros_like(modes)
        out[..., : self.modes] = torch.einsum("bim,iom->bom", modes[..., : self.modes], self.weight)
        return torch.fft.irfft(out, n=x.shape[-1])


class Operator(nn.Module):
    """A Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lift = nn.Conv1d(1, 4, 1)
        self.spectral = nn.ModuleList(Spectral(4, 3) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(2))
        self.head = nn.Linear(4 * FEATURES, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        x = self.lift(features.unsqueeze(1))
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        output: Tensor = self.head(x.flatten(1))
        return output


class Rotary(nn.Module):
    """Attention with rotary positions, kept as a complex buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(FEATURES, CLASSES)
        angles = torch.outer(torch.arange(3.0), 1 / 10 ** torch.arange(2.0))
        self.register_buffer("turns", torch.polar(torch.ones(3, 2), angles), persistent=False)
        self.turns: Tensor

    def _turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 2, 2))
        return torch.view_as_real(pairs * self.turns).flatten(-2)

    def forward(self, features: Tensor) -> Tensor:
        query, key, value = self.qkv(features.view(-1, 3, 4)).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(self._turned(query), self._turned(key), value)
        output: Tensor = self.head(mixed.flatten(1))
        return output


class Diffusion(nn.Module):
    """A schedule in float64, a table of integers and a mask: buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        betas = torch.linspace(1e-4, 2e-2, 50, dtype=torch.float64)
        self.register_buffer("kept", torch.cumprod(1 - betas, 0))
        self.register_buffer("order", torch.arange(FEATURES).flip(0))
        self.register_buffer("mask", torch.arange(FEATURES) % 3 > 0)
        self.register_buffer("wide", torch.ones(1, 1).expand(FEATURES, 1))
        self.register_buffer("single", betas[::49][1:])  # one value, of stride 49
        self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))

    def forward(self, features: Tensor) -> Tensor:
        at = (features[:, 0].abs() * 10).long().clamp(max=49)
        noisy = self.kept[at].sqrt().to(features.dtype)[:, None] * features
        output: Tensor = self.net(noisy[:, self.order] * self.mask * self.wide[:, 0])
        return output


class Mixed(nn.Module):
    """Parameters of several dtypes, one of them in a module with others: complex, wide, single."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, 6)
        self.turn = nn.Parameter(torch.randn(6, dtype=torch.cfloat))
        self.wide = nn.Linear(6, 6, dtype=torch.float64)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        waves = torch.fft.fft(self.first(features)) * self.turn
        output: Tensor = self.last(self.wide(waves.abs().double()).float())
        return output


class Counting(nn.Module):
    """Counters of every kind, moved in every pass: in place, assigned anew, and plain ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(FEATURES, CLASSES)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("assigned", torch.zeros((), dtype=torch.long))
        self.register_buffer("in_place", torch.zeros(2, dtype=torch.int32))
        self.register_buffer("late", None)
        self.calls, self.seen, self.state = 0, [], {"passes": 0, "last": torch.zeros(1)}

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            self.assigned = self.assigned + 1
            self.in_place.add_(1)
            self.late = torch.ones(1) if self.late is None else self.late + 1
            if not hasattr(self, "lazy"):
                self.register_buffer("lazy", torch.zeros(1))
            self.lazy += 1
            self.calls += 1
            self.seen.append(self.calls)
            self.state["passes"] += 1
            self.state["last"] += 1
        output: Tensor = self.net(features)
        return output

    def counts(self) -> set[float]:
        """Return all counters: one number, if they agree."""
        return {
            float(item)
            for item in (
                *(self.assigned, *self.in_place, *self.late, *self.lazy),
                *(self.calls, len(self.seen), self.state["passes"], *self.state["last"]),
            )
        }


class Teacher(nn.Module):
    """A student and a teacher that follows it, moved in the forward pass; and a queue of keys."""

    def __init__(self, how: str = "lerp_") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.student = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))
        self.teacher = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    @torch.no_grad()
    def _follow(self) -> None:
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if self.how == "lerp_":
                mine.lerp_(theirs, 0.25)
            elif self.how == "data":
                mine.data = mine.data * 0.75 + theirs.data * 0.25
            else:
                mine[:] = 0.75 * mine + 0.25 * theirs

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            self._follow()
        with torch.no_grad():
            target = self.teacher(features)
        output: Tensor = self.student(features) + 0.1 * target
        return output


class Normed(nn.Module):
    """Parametrized weights, whose power iteration is a buffer, and statistics of batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parametrizations = nn.utils.parametrizations
        self.first = parametrizations.spectral_norm(nn.Linear(FEATURES, 16))
        self.norm = nn.BatchNorm1d(16)
        self.second = parametrizations.weight_norm(nn.Linear(16, CLASSES))

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.second(self.norm(self.first(features)).relu())
        return output
