"""What public scripts do and what could be passed over in silence: done, told, or refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hpctrain.errors import ConfigError
from hpctrain.lightning import Trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=4)


class Module(lightning.LightningModule):
    def __init__(self, optimizer: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        make = self.hparams.optimizer or functools.partial(torch.optim.SGD, lr=0.0)
        return make(self.parameters())


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


class Counts(lightning.Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


def test_callbacks_may_come_and_go_before_fit() -> None:
    there, gone, later = Counts(), Counts(), Counts()
    trainer = Trainer(max_epochs=9, callbacks=[there, gone], **QUIET)
    trainer.callbacks.remove(gone)
    trainer.callbacks.append(later)
    trainer.callbacks += [EarlyStopping("val_loss", patience=2)]
    trainer.fit(Module(), loader(), loader())
    # An lr of zero: nothing becomes better than in the first epoch.
    assert (there.steps, gone.steps, later.steps) == (6, 0, 6)
    assert trainer.early_stopping_callback.stopped_epoch == 2
    trainer.callbacks = [LearningRateFinder()]
    with pytest.raises(ConfigError, match="short runs with max_steps compare several"):
        trainer.fit(Module(), loader())


def test_a_tuner_is_refused_with_what_does_its_work() -> None:
    trainer = Trainer(max_epochs=1, **QUIET)
    with pytest.raises(ConfigError, match=r"LearningRateFinder.*compare several"):
        Tuner(trainer).lr_find(Module(), loader())
    with pytest.raises(AttributeError, match="hpctrain check"):
        Tuner(Trainer(max_epochs=1, **QUIET)).scale_batch_size(Module(), loader())


@pytest.mark.parametrize("name", ["max_epochs", "limit_val_batches", "precision", "logger"])
def test_arguments_are_not_set_afterwards(name: str) -> None:
    trainer = Trainer(max_epochs=1, **QUIET)
    with pytest.raises(ConfigError, match=rf"Trainer\({name}=\.\.\.\), a new one"):
        setattr(trainer, name, None)


class Steers(Module):
    def on_train_epoch_start(self) -> None:
        self.trainer.accumulate_grad_batches = 2


class Ends(Module):
    def validation_epoch_end(self, outputs: Any) -> None: ...


class Turns(Module):
    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any: ...


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (Steers, "accumulate_grad_batches cannot be set.*should_stop"),
        (Ends, "Ends.validation_epoch_end .*py, line.*in on_validation_epoch_end"),
        (Turns, "takes optimizer_idx, .*several optimizers are an own loop"),
    ],
)
def test_what_would_change_nothing_ends_the_script(module: type, told: str) -> None:
    with pytest.raises((ConfigError, AttributeError), match=told):
        Trainer(max_epochs=1, **QUIET).fit(module(), loader())


class Misspelt(Module):
    def on_train_epoch_ends(self) -> None:
        raise AssertionError

    def on_epoch_end(self) -> None:
        raise AssertionError


def test_names_of_no_hook_are_in_the_header(caplog: pytest.LogCaptureFixture) -> None:
    Trainer(max_epochs=1, **QUIET).fit(Misspelt(), loader())
    for name in ("on_train_epoch_ends", "on_epoch_end"):
        (line,) = [each for each in caplog.text.splitlines() if f"Misspelt.{name} (" in each]
        assert "the name of no hook; did you mean on_train_epoch_end?" in line


def test_the_best_file_serves_the_same_script_whatever_the_module_was_made_with() -> None:
    """A function among the hyperparameters is in the file, and no file is executed."""
    trainer = Trainer(max_epochs=1, **QUIET)
    module = Module(functools.partial(torch.optim.SGD, lr=0.1))
    trainer.fit(module, loader(), loader())
    best = trainer.checkpoint_callback.best_model_path
    trained = module.layer.weight.detach().clone()
    nn.init.zeros_(module.layer.weight)
    trainer.validate(module, loader(), ckpt_path=best)
    assert torch.equal(module.layer.weight, trained)
    with pytest.raises(Exception, match="holds more than tensors"):
        Trainer(max_epochs=1, **QUIET).validate(module, loader(), ckpt_path=best)


class Data(lightning.LightningDataModule):
    """Shares its batch size out among the ranks, as Lightning has each of them load its own."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, Any] = {}

    def prepare_data(self) -> None:
        self.known["prepared"] = self.trainer.is_global_zero

    def setup(self, stage: str) -> None:
        trainer = self.trainer
        self.known[stage] = trainer.max_epochs, trainer.global_rank, trainer.state.fn
        if stage == "fit":
            with pytest.raises(AttributeError, match="known once the data are there"):
                _ = trainer.estimated_stepping_batches
        self.size = 4 // trainer.world_size

    def collate(self, rows: list[Any]) -> Any:
        return torch.utils.data.default_collate(rows)

    def train_dataloader(self) -> DataLoader[Any]:
        samples = TensorDataset(torch.ones(8, 1))
        return DataLoader(samples, batch_size=self.size, collate_fn=self.collate, num_workers=1)

    val_dataloader = train_dataloader


def test_a_datamodule_knows_the_run() -> None:
    data = Data()
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(Module(), datamodule=data)
    assert data.known == {"prepared": True, "fit": (1, 0, "fit")}
    assert data.trainer.estimated_stepping_batches == 2
    trainer.validate(datamodule=data)
    assert data.known["validate"] == (1, 0, "validate")
