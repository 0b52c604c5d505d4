"""Which modules are gathered as one, which rows are whose, and what cannot be spread."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

from hpctrain.checkpoint.format import MODEL, TRAINING, Spread, part_name, rows_of
from hpctrain.errors import ConfigError
from hpctrain.models.convnet import ConvNet
from hpctrain.models.resnet import resnet18
from hpctrain.models.transformer import Transformer
from hpctrain.training.checkpointing.save import group_size
from hpctrain.training.optim.optimizer import refuse_whole_tensors
from hpctrain.training.parallel.fsdp_units import find_units


class Block(nn.Module):
    def __init__(self, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        if weight is not None:
            self.linear.weight = weight


class Pair(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.left = Block()
        self.right = Block(self.left.linear.weight if tied else None)
        self.head = nn.Linear(2, 2)


def transformer() -> nn.Module:
    return Transformer(vocabulary=11, context=4, width=8, depth=3, heads=2)


@pytest.mark.parametrize(
    ("model", "patterns", "units"),
    [
        (transformer(), (), ["blocks.0", "blocks.1", "blocks.2"]),
        (transformer(), ("_Block",), ["blocks.0", "blocks.1", "blocks.2"]),
        (transformer(), ("blocks.[02]",), ["blocks.0", "blocks.2"]),
        (Pair(tied=False), (), ["left", "right"]),
        (Pair(tied=False), ("left", "left.inner.*"), ["left", "left.inner.0", "left.inner.1"]),
        (Pair(tied=True), (), ["left.inner.0", "left.inner.1", "right.inner.0", "right.inner.1"]),
        (ConvNet(in_channels=1, num_classes=3), (), []),
    ],
)
def test_units(model: nn.Module, patterns: tuple[str, ...], units: list[str]) -> None:
    assert find_units(model, patterns) == units


def test_the_blocks_of_a_resnet_are_units() -> None:
    model = resnet18(num_classes=10)
    units = find_units(model, ())
    assert len(units) == 8
    assert len({type(model.get_submodule(name)) for name in units}) == 1


@pytest.mark.parametrize(
    ("model", "patterns", "message"),
    [
        (transformer(), ("block.*",), r'training.shard = "block\.\*": fits no module'),
        (transformer(), ("_Blok",), r'did you mean "_Block"'),
        (transformer(), ("blocks",), r'fits no module .* did you mean "blocks\.'),
        (Pair(tied=True), ("left",), r"left cannot be .* shares a parameter with right\.linear"),
    ],
)
def test_what_cannot_be_spread(model: nn.Module, patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_units(model, patterns)


def test_rows_are_those_of_torch_and_each_is_somebodys() -> None:
    for length, ranks in itertools.product(range(1, 23), range(1, 7)):
        bounds = [rows_of(length, ranks, rank) for rank in range(ranks)]
        chunks = torch.arange(length).chunk(ranks)
        expected = [(int(chunk[0]), int(chunk[-1]) + 1) for chunk in chunks]
        assert bounds[: len(chunks)] == expected
        assert all(first == stop for first, stop in bounds[len(chunks) :])


def test_rows_are_found_whoever_has_written_them() -> None:
    worlds = itertools.product((1, 5, 14), (1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3))
    for length, before, after, group in worlds:
        tensor = torch.arange(length)
        rows = [tensor[slice(*rows_of(length, before, rank))] for rank in range(before)]
        parts = [torch.cat(rows[first : first + group]) for first in range(0, before, group)]
        spread = Spread(ranks=before, shapes={MODEL: {"x": (length,)}, TRAINING: {}}, group=group)
        assert spread.parts == len(parts)
        assert Spread.of({"spread": spread.to_json()}) == spread
        for rank in range(after):
            first, stop = rows_of(length, after, rank)
            found = [
                parts[part][begin:end]
                for part, begin, end in spread.pieces(MODEL, "x", first, stop)
            ]
            joined = torch.cat(found) if found else tensor[:0]
            assert torch.equal(joined, tensor[first:stop])
    assert part_name(MODEL, 3) == "model-00003.safetensors"


def test_groups_of_ranks_keep_to_the_files_that_there_may_be() -> None:
    assert group_size(1000, 0) == 1
    for ranks, most in itertools.product((1, 2, 3, 30, 31, 1000, 4096), (5, 6, 7, 64, 9999)):
        group = group_size(ranks, most)
        files = 2 * -(-ranks // group) + 3
        assert files <= most
        # and no rank has more to take over than that asks for
        assert group == 1 or 2 * -(-ranks // (group - 1)) + 3 > most


@pytest.mark.parametrize(
    "kind",
    [
        schedulefree.AdamWScheduleFree,
        schedulefree.RAdamScheduleFree,
        schedulefree.SGDScheduleFree,
        torch.optim.NAdam,
    ],
)
def test_rows_are_trained_as_the_whole(kind: Any) -> None:
    refuse_whole_tensors(kind([nn.Parameter(torch.zeros(1))], lr=0.1))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 5, generator=generator)
    gradients = [torch.randn(6, 5, generator=generator) for _ in range(8)]

    def trained(first: int, stop: int) -> Tensor:
        rows = nn.Parameter(start[first:stop].clone())
        optimizer = kind([rows], lr=0.1)
        if hasattr(optimizer, "train"):
            optimizer.train()
        for gradient in gradients:
            rows.grad = gradient[first:stop].clone()
            optimizer.step()
        return rows.detach()

    assert torch.equal(torch.cat([trained(0, 2), trained(2, 6)]), trained(0, 6))


class Mine(torch.optim.SGD):
    elementwise = True


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        (torch.optim.AdamW, True),
        (torch.optim.SGD, True),
        (Mine, True),
        (torch.optim.Adafactor, False),
        (type("Other", (torch.optim.SGD,), {}), False),
    ],
)
def test_optimizers_work_by_elements(kind: type[torch.optim.Optimizer], fits: bool) -> None:
    optimizer = kind(nn.Linear(2, 2).parameters(), lr=0.1)
    if fits:
        refuse_whole_tensors(optimizer)
        return
    with pytest.raises(ConfigError, match="elementwise = True"):
        refuse_whole_tensors(optimizer)
