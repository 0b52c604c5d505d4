import json
from typing import Any

import pytest
import torch
from torch import Tensor

from hpctrain.checkpoint.state import UnsavableError
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.training.model.registered_state import RegisteredState


class Counter:
    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "refused" in state:
            raise KeyError("count")
        self.state = state


def registered(**items: Any) -> RegisteredState:
    state = RegisteredState(torch.device("cpu"))
    for name, item in items.items():
        state.add(name, item)
    return state


def test_what_they_know_goes_through_json_and_tensors_bit_for_bit() -> None:
    tensors: dict[str, Tensor] = {}
    average = torch.tensor([0.1, 0.2])
    saved = registered(ema=Counter(count=3, average=average, seen=(1, {"a": None}))).capture(
        tensors
    )
    fresh = Counter()
    notes = registered(ema=fresh).restore(json.loads(json.dumps(saved)), tensors)
    assert notes == []
    assert torch.equal(fresh.state.pop("average"), average)
    assert fresh.state == {"count": 3, "seen": (1, {"a": None})}
    assert [name for name in tensors if not name.startswith("registered/ema")] == []


def test_who_is_new_and_who_is_gone_is_said() -> None:
    saved = registered(old=Counter(a=1), stays=Counter(b=2)).capture({})
    new, stays = Counter(c=3), Counter()
    notes = registered(new=new, stays=stays).restore(saved, {})
    assert notes == [
        "not in the checkpoint, and begun anew: new",
        "in the checkpoint, and not here any more: old",
    ]
    assert (new.state, stays.state) == ({"c": 3}, {"b": 2})


def test_what_cannot_be_saved_or_put_back_is_named() -> None:
    with pytest.raises(UnsavableError, match=r"the state of x: registered/x\.f is a "):
        registered(x=Counter(f=print)).capture({})
    with pytest.raises(CheckpointError, match=r"x refuses the state .*KeyError: 'count'"):
        registered(x=Counter()).restore({"x": {"dict": [["refused", 1]]}}, {})
    state = registered(x=Counter())
    with pytest.raises(ConfigError, match="'x': two objects of this name"):
        state.add("x", Counter())
    with pytest.raises(ConfigError, match="'x': object has no state_dict"):
        registered(x=object())
