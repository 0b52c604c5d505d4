"""What modules keep beside their parameters comes back; what cannot is named at the start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpctrain.checkpoint.save import Snapshot, try_snapshot
from hpctrain.checkpoint.state import UnsavableError
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.training.checkpointing.snapshot import (
    capture_extra_states,
    model_tensors,
    refuse_unmade,
    restore_extra_states,
)


class Extra(nn.Linear):
    """Keeps whatever it is given."""

    def __init__(self, kept: Any) -> None:
        super().__init__(2, 2)
        self.kept = kept

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


class OneWay(nn.Linear):
    def get_extra_state(self) -> Any:
        return 1


@pytest.mark.parametrize(
    "kept",
    [
        {"version": 2, "scale": 1.5},
        [torch.arange(3.0), {"history": [torch.ones(2, dtype=torch.bfloat16), None]}, (1, "a")],
        torch.arange(4, dtype=torch.uint8),
        None,
        float("inf"),
    ],
)
def test_extra_states_come_back(kept: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Extra(kept)), Extra({"other": 1}))
    tensors: dict[str, Tensor] = {}
    saved = json.loads(json.dumps(capture_extra_states(model, tensors)))
    other = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Extra(0)), Extra(0))
    restore_extra_states(other, saved, tensors, torch.device("cpu"))
    assert repr(other[1][0].kept) == repr(kept)
    assert other[2].kept == {"other": 1}
    assert {"0.weight", "1.0.weight"} <= model_tensors(model).keys()


def test_the_outermost_module_may_have_one() -> None:
    tensors: dict[str, Tensor] = {}
    assert capture_extra_states(Extra(3), tensors) == {"_extra_state": 3}


def test_extra_states_that_would_not_come_back_are_refused() -> None:
    with pytest.raises(UnsavableError, match=r"1\._extra_state is a builtins\.object"):
        capture_extra_states(nn.Sequential(nn.Linear(1, 1), Extra(object())), {})
    with pytest.raises(UnsavableError, match="no set_extra_state"):
        capture_extra_states(OneWay(1, 1), {})
    with pytest.raises(CheckpointError, match=r"has 0\._extra_state, and the model"):
        restore_extra_states(nn.Linear(1, 1), {"0._extra_state": 1}, {}, torch.device("cpu"))


def add_text(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[prefix + "note"] = "text"


def test_what_a_hook_adds_is_named() -> None:
    model = nn.Linear(1, 1)
    model._register_state_dict_hook(add_text)
    with pytest.raises(UnsavableError, match="note in the state_dict of Linear is a str"):
        model_tensors(model)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (nn.Sequential(nn.LazyLinear(3)), r"0\.weight has no shape .*lazy"),
        (nn.LazyBatchNorm1d(), "has no shape"),
        (nn.Linear(2, 2, device="meta"), "weight is on the device meta"),
    ],
)
def test_parameters_without_numbers_are_named(model: nn.Module, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        refuse_unmade(model)


def snapshot(
    model: Mapping[str, Tensor],
    training: Mapping[str, Tensor] | None = None,
    values: Mapping[str, Any] | None = None,
) -> Snapshot:
    return Snapshot(
        step=0, model=model, training=training or {}, values=values or {}, config_toml=""
    )


class OwnParameter(nn.Parameter):
    """As libraries derive them, to carry attributes."""


def test_what_comes_back_passes_the_trial() -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.bool, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.bfloat16]
    dtypes += [torch.float64, torch.complex64, torch.complex128]
    tensors = {
        str(dtype): torch.randn(3, 5, generator=generator).to(dtype)[:, ::2] for dtype in dtypes
    }
    tensors |= {"empty": torch.zeros(0, 2), "number": torch.tensor(float("nan"))}
    tensors["own"] = OwnParameter(torch.ones(2))
    try_snapshot(snapshot(tensors, {"a": torch.ones(1)}, {"b": [1, {"c": None}]}))


class WithDispatch(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("has no bytes")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (snapshot({"w": torch.zeros(2).to_sparse()}), "w is laid out as torch.sparse_coo"),
        (snapshot({"w": torch.zeros(2, device="meta")}), "w has no numbers"),
        (snapshot({"w": torch.zeros(2).as_subclass(WithDispatch)}), "not a plain tensor"),
        (snapshot({}, {"s": OwnParameter(torch.ones(2))}), "s is a .*OwnParameter"),
        (snapshot({}, values={"thing": object()}), "thing cannot be saved"),
    ],
)
def test_what_would_not_come_back_fails_the_trial(given: Snapshot, what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        try_snapshot(given)
