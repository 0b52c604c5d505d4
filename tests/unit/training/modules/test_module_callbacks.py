"""Callbacks of any class: found, refused where nothing would call them, and saved."""

import json
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as theirs
from torch import Tensor, nn

from hpctrain.errors import ConfigError
from hpctrain.training.model.registered_state import RegisteredState
from hpctrain.training.modules import callbacks as ours


class Plain:
    def on_train_start(self, trainer: Any, module: nn.Module) -> None:
        trainer.order.append("plain")


class Inherits(L.Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Of Lightning 1."""


def test_every_hook_of_lightning_is_called_or_said_not_to_be() -> None:
    there = {name for name in vars(L.Callback) if not name.startswith("_")}
    assert there - {"state_key"} == {*ours.CALLED, *ours.NOT_CALLED}


def test_every_callback_of_lightning_has_a_word() -> None:
    shipped = {
        name
        for name, kind in vars(theirs).items()
        if isinstance(kind, type) and issubclass(kind, L.Callback)
    }
    free = {"Callback", "LambdaCallback", "BasePredictionWriter"}
    assert shipped == {*ours.KEYS, *free}


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (theirs.ModelCheckpoint(monitor="x"), r"What does its work here is \[checkpoint\]"),
        (theirs.EarlyStopping(monitor="x"), r"\[early_stopping\]"),
        (type("Mine", (theirs.StochasticWeightAveraging,), {})(1e-2), "training.ema_decay"),
        (Plain, r"is a class: bring an object of it, Plain\(...\)"),
        (object(), "object has no method that is the name of a hook"),
        (
            type("Slip", (), {"on_train_batch_stop": lambda self: None})(),
            "has on_train_batch_stop, which is the name of no hook.*did you mean on_train_batch_",
        ),
        (
            type("Sane", (), {"on_sanity_check_end": lambda self: None})(),
            "Sane has on_sanity_check_end, so that it would never be called",
        ),
    ],
)
def test_what_would_never_be_called_is_refused(callback: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)here.*{message}"):
        ours.check_callback(callback, "here")


@pytest.mark.parametrize(
    "callback",
    [Plain(), Inherits(), L.Callback(), theirs.LambdaCallback(on_train_start=lambda *_: None)],
)
def test_any_class_will_do(callback: Any) -> None:
    ours.check_callback(callback, "here")


def test_only_own_hooks_count() -> None:
    assert ours.hooks_of(Plain()) == ["on_train_start"]
    assert set(ours.hooks_of(Inherits())) == {"on_train_epoch_end", "on_sanity_check_start"}
    assert [note.partition(" is not called: ")[::2] for note in ours.notes_of([Inherits()])] == [
        ("callbacks: Inherits", ""),
        ("callback Inherits: on_sanity_check_start", ours.NOT_CALLED["on_sanity_check_start"]),
        ("callback Inherits: on_epoch_end", "it is the name of no hook"),
    ]


def test_a_module_brings_callbacks_in_place_of_others_of_their_class() -> None:
    class Net(nn.Module):
        def configure_callbacks(self) -> Any:
            return [second]

    first, second, third = Plain(), Plain(), Inherits()
    assert ours.with_those_of_module([first, third], Net()) == [third, second]
    assert ours.with_those_of_module([first, third], nn.Linear(1, 1)) == [first, third]


class Trainer:
    current_epoch, global_step = 2, 7


class BothWays:
    def __init__(self) -> None:
        self.average = torch.zeros(2)
        self.count = 0
        self.seen: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["count"] = self.count

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        self.count, self.seen = checkpoint["count"], dict(checkpoint)


def registered(callbacks: list[Any]) -> RegisteredState:
    states = RegisteredState(torch.device("cpu"))
    ours.register(callbacks, states, Trainer(), nn.Linear(1, 1))
    return states


def test_what_callbacks_know_is_saved_by_both_ways() -> None:
    first = [BothWays(), Plain(), BothWays()]
    first[0].average, first[0].count = torch.tensor([0.1, 0.2]), 3
    first[2].count = 5
    tensors: dict[str, Tensor] = {}
    saved = json.loads(json.dumps(registered(first).capture(tensors)))
    assert set(saved) == {"callback BothWays", "callback BothWays 2"}
    second = [BothWays(), Plain(), BothWays()]
    Trainer.current_epoch = Trainer.global_step = 0  # a job begins
    assert registered(second).restore(saved, tensors) == []
    assert torch.equal(second[0].average, first[0].average)
    assert (second[0].count, second[2].count) == (3, 5)
    assert second[0].seen == {"epoch": 2, "global_step": 7, "count": 3}


def test_the_rest_of_a_checkpoint_is_named_where_it_is_asked_for() -> None:
    class Asks:
        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
            checkpoint["state_dict"].clear()

    with pytest.raises(KeyError, match=r"pl_module\.state_dict"):
        registered([Asks()]).capture({})
