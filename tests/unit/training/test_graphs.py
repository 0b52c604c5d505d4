"""Steps and evaluations of a model whose results lie where its next ones will, as in CUDA graphs.

No graph can be recorded on a CPU. So a linear layer stands in whose outputs and gradients are in
the same memory each time, which is what a graph does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.one_sample import OneSample
from helpers.worlds import world_of_one
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torchmetrics import SpearmanCorrCoef

from hpctrain.config.schema import TrainingSection
from hpctrain.data.loading.loader import Batch
from hpctrain.training.evaluation import Turn, evaluate
from hpctrain.training.metrics import Gather
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.step import StepOptions, TrainStep
from hpctrain.training.task.runner import TaskRunner

CPU = torch.device("cpu")
WORLD = world_of_one("test")
ROWS, WIDTH = 12, 5


class Memory:
    """What a graph has for its results: one piece for each shape; else a new one each time."""

    def __init__(self, *, recorded: bool) -> None:
        self.recorded = recorded
        self.pieces: dict[tuple[str, torch.Size], Tensor] = {}

    def put(self, what: str, value: Tensor) -> Tensor:
        if not self.recorded:
            return value.clone()
        piece = self.pieces.setdefault((what, value.shape), torch.empty_like(value))
        piece.copy_(value)
        return piece.detach()  # a tensor of its own, so that autograd takes it as it is


class Recorded(torch.autograd.Function):
    """A matrix product with results in such memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, memory: Memory) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x.clone(), weight)
        ctx.memory = memory
        return memory.put("output", x @ weight.T)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        memory: Memory = ctx.memory  # type: ignore[attr-defined]
        return memory.put("input", gradient @ weight), memory.put("weight", gradient.T @ x), None


class Net(nn.Module):
    """A layer, and one that takes part in some passes only."""

    def __init__(self, *, recorded: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator))
        self.second = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator))
        self.memory = Memory(recorded=recorded), Memory(recorded=recorded)

    def forward(self, x: Tensor) -> Tensor:
        for index, weight in enumerate((self.first, self.second)):
            if index and not (x.detach()[0, 0] > 0):
                continue
            x = Recorded.apply(x, weight, self.memory[index])
        return x


class OwnLoss:
    """A task that hands out what the model returns, and keeps nothing of its own."""

    inputs = ("x",)
    metrics = {"first": "min", "total": "min", "rows": "min"}  # noqa: RUF012
    counts_samples = False

    def loss(self, model: nn.Module, fields: Any) -> tuple[Tensor, Tensor]:
        output = model(fields["x"])
        return output.square().sum(), (output.detach() * 0 + 2).sum()

    def evaluate(self, model: nn.Module, fields: Any) -> dict[str, Any]:
        output = model(fields["x"])
        return {
            "first": (output.flatten()[0], output.flatten()[1]),
            "sums": output.flatten()[:WIDTH],
            "all": Gather(output),
        }

    def finish(self, sums: Any) -> dict[str, float]:
        weights = torch.arange(sums["all"].numel(), dtype=torch.float64)
        return {
            "total": sums["sums"].sum().item(),
            "rows": (sums["all"].flatten().double() * weights).sum().item(),
        }


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            fields={"x": torch.randn(ROWS, WIDTH, generator=generator)},
            size=ROWS,
            global_size=ROWS,
            epoch=0,
            start=number * ROWS,
        )
        for number in range(count)
    ]


def trained(*, recorded: bool, graphs: bool, passes: int) -> tuple[Net, list[dict[str, float]]]:
    model = Net(recorded=recorded)
    step = TrainStep(
        TaskRunner(model, OwnLoss(), NumberFormat.of("32-true", CPU), graphs=graphs),
        torch.optim.SGD(model.parameters(), lr=0.01),
        WORLD,
        options=StepOptions(
            training=TrainingSection(clip_norm=1.0, unused_parameters="allow"),
            micro_batch_size=ROWS // passes,
        ),
        shapes=OneSample({"x": torch.ones(1, WIDTH)}, ROWS),
        example={"x": torch.ones(1, WIDTH)},
    )
    numbers = []
    for each in batches(4):
        step(each, 0.01)
        numbers.append(step.read())
    return model, numbers


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_several_passes_add_up(passes: int) -> None:
    """Also of a parameter that has no part in the first of them."""
    plain, expected = trained(recorded=False, graphs=False, passes=passes)
    model, numbers = trained(recorded=True, graphs=True, passes=passes)
    assert same(model, plain)
    assert numbers == expected


def test_without_memory_of_their_own_they_do_not() -> None:
    """The stand-in would show it."""
    plain, _ = trained(recorded=False, graphs=False, passes=3)
    model, _ = trained(recorded=True, graphs=False, passes=3)
    assert not same(model, plain)


def metrics(*, recorded: bool, reused: bool, dtype: torch.dtype) -> dict[str, float] | None:
    model = Net(recorded=recorded).to(dtype)
    number_format = NumberFormat.of("64-true" if dtype == torch.float64 else "32-true", CPU)
    return evaluate(
        TaskRunner(model, OwnLoss(), number_format, graphs=reused),
        [Turn(batches=batches(3))],
        WORLD,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_an_evaluation_keeps_is_its_own(dtype: torch.dtype) -> None:
    expected = metrics(recorded=False, reused=False, dtype=dtype)
    assert metrics(recorded=True, reused=True, dtype=dtype) == expected
    assert metrics(recorded=True, reused=False, dtype=dtype) != expected


class Ranked(OwnLoss):
    """Keeps outputs in lists of an object of torchmetrics."""

    metrics = {"correlation": "max"}  # noqa: RUF012

    def __init__(self) -> None:
        self.correlation = SpearmanCorrCoef()

    def evaluate(self, model: nn.Module, fields: Any) -> dict[str, Any]:
        output = model(fields["x"])
        self.correlation.update(output[:, 0], output[:, 1])
        return {"correlation": self.correlation}

    finish = None  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore:Metric `Spearman")
def test_lists_of_torchmetrics_are_their_own() -> None:
    found = [
        evaluate(
            TaskRunner(
                Net(recorded=recorded), Ranked(), NumberFormat.of("32-true", CPU), graphs=reused
            ),
            [Turn(batches=batches(3))],
            WORLD,
        )
        for recorded, reused in ((False, False), (True, True), (True, False))
    ]
    assert found[0] == found[1] != found[2]
