"""What `trainer.state` and its stages say in every hook: Lightning's words, when it says them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from helpers import lightning_itself
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hpctrain.lightning import Trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's

_STAGES = ("training", "validating", "testing", "predicting", "sanity_checking", "evaluating")
_HOOKS = (
    *("setup", "teardown", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end"),
    *("on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end"),
    *(
        f"on_{stage}_{when}"
        for stage in ("validation", "test", "predict")
        for when in ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")
    ),
)


def said(trainer: Any) -> dict[str, Any]:
    state = trainer.state
    words = {"fn": state.fn, "stage": state.stage, "status": state.status}
    found = {name: word and word.value for name, word in words.items()}
    if state.stage is not None:
        found["asked"] = state.stage.evaluating, state.stage.dataloader_prefix
    flags = {name: getattr(trainer, name) for name in _STAGES}
    return found | flags | {"ended": (state.finished, state.stopped, state.status.stopped)}


class Notes:
    """What a trainer says, by what it is doing, who asked it and where."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def note(self, who: str, hook: str, trainer: Any) -> None:
        if not trainer.sanity_checking:  # here a dry run asks some hooks beforehand
            words = said(trainer)
            self.seen.append((f"{words['fn']}: {who} {hook}", words))


class Module(lightning.LightningModule):
    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.layer, self.notes = nn.Linear(1, 1), [notes]

    def note(self, hook: str) -> None:
        self.notes[0].note("module", hook, self.trainer)

    def configure_model(self) -> None:
        self.note("configure_model")

    def configure_optimizers(self) -> Any:
        self.note("configure_optimizers")
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self.note("training_step")
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor]) -> None:
        self.note("validation_step")

    def test_step(self, batch: list[Tensor]) -> None:
        self.note("test_step")

    def predict_step(self, batch: list[Tensor]) -> Tensor:
        self.note("predict_step")
        return batch[0]


class Data(lightning.LightningDataModule):
    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.notes = notes

    def prepare_data(self) -> None:
        self.notes.note("data", "prepare_data", self.trainer)

    def setup(self, stage: str) -> None:
        self.notes.note("data", f"setup {getattr(stage, 'value', stage)}", self.trainer)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def with_notes(base: type, who: str, notes: Notes) -> Any:
    """A class of all hooks, each of which takes a note."""

    def make(hook: str) -> Any:
        def noted(self: Any, *arguments: Any, **_: Any) -> None:
            notes.note(who, hook, arguments[0] if who == "callback" else self.trainer)

        return noted

    return type("Noting", (base,), {hook: make(hook) for hook in _HOOKS})


def run(make: Any) -> list[tuple[str, dict[str, Any]]]:
    notes = Notes()
    module = with_notes(Module, "module", notes)(notes)
    callback = with_notes(lightning.Callback, "callback", notes)()
    trainer = make(max_epochs=1, callbacks=[callback], enable_checkpointing=False)
    notes.note("script", "before", trainer)
    data = Data(notes)
    for name in ("fit", "validate", "test", "predict"):
        getattr(trainer, name)(module, datamodule=data)
        notes.note("script", f"after {name}", trainer)
    return notes.seen


def test_every_hook_finds_what_lightning_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    options = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu"}
    with lightning_itself.quietly():
        theirs = run(
            lambda **more: lightning_itself.trainer(num_sanity_val_steps=0, **(options | more))
        )
    ours = run(lambda **more: Trainer(**(options | more)))
    expected = dict(theirs)
    assert len(expected) > 100
    assert {name for name, _ in ours} == set(expected)
    for name, words in [*theirs, *ours]:
        assert words == expected[name], name


def test_words_are_those_of_lightnings_enumerations(tmp_path: Path) -> None:
    notes = Notes()
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False)
    assert (trainer.state.status, trainer.state.fn) == (TrainerStatus.INITIALIZING, None)
    trainer.validate(Module(notes), datamodule=Data(notes))
    assert trainer.state.fn == TrainerFn.VALIDATING
    assert trainer.state.fn in (TrainerFn.FITTING, TrainerFn.VALIDATING)
    assert {TrainerFn.VALIDATING: "found"}[trainer.state.fn] == "found"  # type: ignore[index]
    trainer.state.stage = "sanity_check"
    assert trainer.state.stage == RunningStage.SANITY_CHECKING
