"""Models and tasks as people write them, in float64, each drawing nothing at random by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, CLASSES, TOKENS = 6, 4, 11
Fields = Mapping[str, Tensor]


class PerSample:
    """A task whose loss is a sum over samples."""

    inputs = ("x",)
    metrics: ClassVar[dict[str, str]] = {"loss": "min"}
    counts_samples = True

    def losses(self, model: Any, fields: Fields) -> Tensor:
        """Return the loss of each sample, (samples,)."""
        return F.cross_entropy(model(fields["x"]), fields["y"], reduction="none")

    def loss(self, model: Any, fields: Fields) -> tuple[Tensor, Any]:
        return self.losses(model, fields).sum(), len(fields["x"])

    def evaluate(self, model: Any, fields: Fields) -> dict[str, tuple[Tensor, Any]]:
        return {"loss": self.loss(model, fields)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class VAE(nn.Module):
    """Reached by methods only; its forward pass is for those who sample."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(Block(), nn.Linear(WIDTH, 4))
        self.dec = nn.Sequential(nn.Linear(2, WIDTH), Block())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.enc(x).chunk(2, -1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.dec(z)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("a task that calls methods has no need of forward")


class VAETask(PerSample):
    def losses(self, model: VAE, fields: Fields) -> Tensor:
        mean, logvar = model.encode(fields["x"])
        decoded = model.decode(mean + fields["noise"] * (logvar / 2).exp())
        kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1)
        return (decoded - fields["x"]).square().sum(1) + kl


class Encoder(nn.Module):
    """An encoder that is called by a method; two of them are units by their class."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(WIDTH, 3)

    def encode(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.normalize(self.out(x), dim=-1)


class CLIP(nn.Module):
    """Two encoders and a scale without dimensions, as OpenAI's."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = Encoder(), Encoder()
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.bias = nn.Parameter(torch.tensor(-0.5), requires_grad=False)


class CLIPTask(PerSample):
    """Pairs within a sample, so that the loss is a sum over samples."""

    def losses(self, model: CLIP, fields: Fields) -> Tensor:
        a, b = model.image.encode(fields["x"]), model.text.encode(fields["noise"].repeat(1, 3))
        logits = model.logit_scale.exp() * (a * b).sum(1) + model.bias
        return F.binary_cross_entropy_with_logits(
            logits, (fields["y"] % 2).to(logits.dtype), reduction="none"
        )


class GPT(nn.Module):
    """The output layer is the embedding; a position table is read by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.positions = nn.Parameter(torch.randn(8, WIDTH) * 0.1)
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.head(x)
        return output


class GPTTask(PerSample):
    inputs = ("tokens",)

    def losses(self, model: GPT, fields: Fields) -> Tensor:
        tokens = fields["tokens"]
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(1)


class Reader(nn.Module):
    """A block whose weight the model reads besides calling it, and a schedule of its own."""

    abar: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("abar", torch.linspace(0.9, 0.1, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.out(x @ self.blocks[0].linear.weight)  # type: ignore[union-attr]
        return output


class ReaderTask(PerSample):
    """Calls the model twice, reads a buffer of it, and adds a penalty on its parameters."""

    def losses(self, model: Reader, fields: Fields) -> Tensor:
        scale = model.abar[fields["y"]][:, None]
        logits = model(fields["x"] * scale) + model(fields["x"])
        penalty = sum(item.square().sum() for item in model.parameters())
        return F.cross_entropy(logits, fields["y"], reduction="none") + 0.01 * penalty


class MoE(nn.Module):
    """Experts that run only where a sample is sent to them."""

    def __init__(self, experts: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(Block() for _ in range(experts))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == index)
            if rows.numel():
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, slots, None])
        output: Tensor = self.head(x + out)
        return output


class Dropped(nn.Module):
    """Layers and an auxiliary head that `plan` leaves out in some steps or passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.auxiliary = nn.Linear(WIDTH, CLASSES)
        self.skipped: frozenset[int] = frozenset()
        self.uses_auxiliary = True

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            if index not in self.skipped:
                x = layer(x)
        output: Tensor = self.head(x)
        return output + self.auxiliary(x) if self.uses_auxiliary else output


def fields_of(count: int, seed: int) -> dict[str, Tensor]:
    """Return a global batch."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(count, WIDTH, generator=draw, dtype=torch.float64),
        "noise": torch.randn(count, 2, generator=draw, dtype=torch.float64),
        "y": torch.randint(CLASSES, (count,), generator=draw),
        "tokens": torch.randint(TOKENS, (count, 7), generator=draw),
    }
