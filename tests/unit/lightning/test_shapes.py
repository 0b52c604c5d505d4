"""Programs of the shapes that public ones have, unedited under Lightning and here: the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from helpers import lightning_itself
from programs.language_model import WORDS, LanguageModel, Text
from programs.lit_mnist import DigitsDataModule, LitMNIST
from programs.shapes import PROGRAMS, Program
from torch.utils.data import DataLoader

from hpctrain.lightning import Trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's, and of torchmetrics'

OPTIONS = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False}


class Seeds(pl.Callback):
    """Has both draw the same, and keeps the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        torch.manual_seed(1000 + trainer.global_step)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        torch.manual_seed(index)

    on_test_batch_start = on_validation_batch_start


def digits() -> Program:
    """The chapter's, with its dropout and its Adadelta, from the same weights in the same order."""
    return LitMNIST(), DigitsDataModule(batch_size=32, samples=96, shuffle=False), []


def words() -> Program:
    """The tutorial's transformer, likewise."""
    return LanguageModel(WORDS), [DataLoader(Text(60), 20), DataLoader(Text(25), 20)], []


ALL = {**PROGRAMS, "digits": digits, "words": words}


class Ran(NamedTuple):
    """What came of a program: losses of the steps, the newest metrics, and those of a test."""

    losses: list[float]
    logged: dict[str, float]
    tested: dict[str, float]


def run(make: Any, name: str) -> Ran:
    torch.manual_seed(7)
    module, data, callbacks = ALL[name]()
    seeds = Seeds()
    trainer = make(callbacks=[*callbacks, seeds], **OPTIONS)
    trainer.fit(module, *(data if isinstance(data, list) else [data]))
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    tested = trainer.test(module, data, verbose=False)[0] if name == "segmentation" else {}
    return Ran(seeds.losses, logged, tested)


@pytest.mark.parametrize("name", ALL)
def test_a_program_of_this_shape(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    with lightning_itself.quietly():
        theirs = run(
            lambda **options: lightning_itself.trainer(num_sanity_val_steps=0, **options), name
        )
    ours = run(Trainer, name)
    assert len(theirs.losses) >= 6
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-5)
    assert ours.logged == pytest.approx(theirs.logged, abs=1e-5)
    assert ours.tested == pytest.approx(theirs.tested, abs=1e-5)
