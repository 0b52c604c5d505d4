"""Batches of any structure."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hpctrain.data.loading.batch import map_tensors, moved, named_tensors
from hpctrain.training.model.precision import NumberFormat


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Example:
    image: Tensor
    name: str
    size: int = dataclasses.field(init=False, default=3)


class Graph:
    """As graph libraries have it: no container that anybody knows, but it moves itself."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> Graph:
        return Graph(self.x.to(device))


class Encoding(collections.UserDict[str, Tensor]):
    """As tokenisers return it."""

    def to(self, device: Any) -> Encoding:
        return Encoding({name: item.to(device) for name, item in self.data.items()})


def test_containers_stay_what_they_are() -> None:
    graph = Graph(torch.ones(2))
    data = {
        "a": torch.ones(2),
        "b": [torch.ones(1), "text", None, 3],
        "c": (torch.ones(1),),
        "d": Pair(torch.ones(1), {"e": torch.ones(1)}),
        "f": Example(torch.ones(1), "cat"),
        "g": graph,
        "h": collections.OrderedDict(i=torch.ones(1)),
        "k": collections.defaultdict(list, l=torch.ones(1)),
    }
    made = map_tensors(lambda tensor: tensor * 2, data)
    assert made["a"].tolist() == [2, 2]
    assert made["b"] == [torch.full((1,), 2.0), "text", None, 3]
    assert isinstance(made["c"], tuple)
    assert made["c"][0] == 2
    assert isinstance(made["d"], Pair)
    assert made["d"].y["e"] == 2
    assert isinstance(made["f"], Example)
    assert (made["f"].name, made["f"].size) == ("cat", 3)
    assert made["f"].image == 2
    assert data["f"].image == 1
    assert made["g"] is graph
    assert type(made["h"]) is collections.OrderedDict
    assert made["h"]["i"] == 2
    assert type(made["k"]) is collections.defaultdict
    assert made["k"]["l"] == 2
    assert made["k"]["missing"] == []


def test_objects_move_themselves() -> None:
    device = torch.device("meta")
    made = moved({"g": Graph(torch.ones(2)), "e": Encoding(ids=torch.ones(1)), "s": "x"}, device)
    assert made["g"].x.device == device
    assert made["s"] == "x"
    assert type(made["e"]) is Encoding
    assert made["e"]["ids"].device == device


def test_names_of_tensors() -> None:
    data = ({"image": torch.zeros(1)}, [torch.zeros(2), "text"], Example(torch.zeros(3), "a"))
    found = {name: len(item) for name, item in named_tensors(data)}
    assert found == {"0.image": 1, "1.0": 2, "2.image": 3}
    assert [name for name, _ in named_tensors(torch.zeros(1))] == [""]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true", "bf16-true"])
def test_a_batch_without_named_inputs_is_cast_where_the_model_is(precision: Any) -> None:
    batch = [torch.zeros(2, dtype=torch.float32), {"y": torch.zeros(2, dtype=torch.int64)}]
    cast = NumberFormat.of(precision, torch.device("cpu")).cast(batch, ())
    expected = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
    assert cast[0].dtype == expected.get(precision, torch.float32)
    assert cast[1]["y"].dtype == torch.int64
