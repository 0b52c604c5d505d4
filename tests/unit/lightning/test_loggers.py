"""What public modules do with `self.logger`: done, or refused by name before the first step."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from helpers.runs import metrics
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hpctrain.errors import ConfigError
from hpctrain.lightning import Trainer
from hpctrain.training.modules.run_logger import RunLogger

pytestmark = pytest.mark.filterwarnings("ignore")

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}


class Draws(lightning.LightningModule):
    """An autoencoder that shows its weights, reconstructions and figures, without asking first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def setup(self, stage: str) -> None:
        self.logger.log_hyperparams({"width": 4})
        self.logger.experiment.add_text("about", "a module")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[0])
        if batch_idx == 2:
            self.logger.log_metrics({"own": loss.detach()}, step=self.global_step)
        return loss

    def on_train_epoch_end(self) -> None:
        writer = self.logger.experiment
        for name, item in self.named_parameters():
            writer.add_histogram(name, item, self.current_epoch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            image = self.net(batch[0])[:1].reshape(1, 2, 2)
            self.logger.experiment.add_image("rebuilt", image, self.global_step)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Guarded(Draws):
    def setup(self, stage: str) -> None:
        assert self.logger is None
        assert self.loggers == []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[0])

    def on_train_epoch_end(self) -> None:
        if self.logger is not None:
            raise AssertionError

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


class Foreign(Draws):
    """Weights & Biases', late in an epoch."""

    def on_train_epoch_end(self) -> None:
        self.logger.experiment.log({"weights": 1})
        self.logger.experiment.config["a"] = 1
        self.logger.log_image(key="a", images=[])


class AtOnce(Draws):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.logger.log_image(key="a", images=[])


class Asking(Foreign):
    def on_train_epoch_end(self) -> None:
        if isinstance(self.logger, CSVLogger):
            self.logger.experiment.log({"weights": 1})
        assert not hasattr(self.logger.experiment, "__len__")


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), 4), DataLoader(TensorDataset(x[:6]), 4)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


def fitted(module: lightning.LightningModule, **options: Any) -> Trainer:
    trainer = Trainer(max_epochs=1, **QUIET, **options)
    trainer.fit(module, *loaders())
    return trainer


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_figures_and_numbers_are_in_the_runs_folder() -> None:
    before = Trainer(max_epochs=1, **QUIET)
    before.logger.log_hyperparams({"seen": 1})  # as scripts do before they train
    trainer = fitted(Draws())
    run = Path(str(trainer.log_dir))
    found = events(run / "tensorboard")
    assert found.Tags()["images"] == ["rebuilt"]
    assert [each.step for each in found.Images("rebuilt")] == [4]  # not those of the dry run
    assert set(found.Tags()["histograms"]) == {"net.weight", "net.bias"}
    assert "about/text_summary" in found.Tags()["tensors"]
    # Of several files of a folder TensorBoard reads on in the newest alone.
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert "train/seconds/compute" in found.Tags()["scalars"]
    (line,) = metrics(run, "logger")
    assert (line["step"], line["at"]) == (2, 2)
    assert line["logged"]["own"] == pytest.approx(found.Scalars("own")[0].value)
    assert isinstance(trainer.logger, RunLogger)
    assert trainer.logger.log_dir == str(run)


def test_the_script_has_its_own_tensorboard_logger() -> None:
    mine = TensorBoardLogger("logs", name="mine")
    module = Draws()
    trainer = fitted(module, logger=mine)
    assert module.logger is mine is trainer.logger
    assert Path(mine.log_dir).resolve() == Path(str(trainer.log_dir)).resolve()
    mine.finalize("success")
    assert "rebuilt" in events(Path(mine.log_dir)).Tags()["images"]


def test_none_is_none() -> None:
    assert fitted(Guarded(), logger=False).logger is None


def test_what_another_logger_has_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"self\.logger\.log_image: the logger of a run has no"):
        fitted(AtOnce())
    caplog.clear()
    with caplog.at_level(logging.INFO, "hpctrain"):
        fitted(Foreign())
    at_start, *later = (text for text in caplog.messages if "self.logger." in text)
    assert "self.logger.experiment.log (" in at_start
    assert "test_loggers.py, line" in at_start
    assert [text.partition(":")[0] for text in later] == [
        *("self.logger.experiment.log", "self.logger.experiment.config", "self.logger.log_image")
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "hpctrain"):
        fitted(Asking())
    assert "self.logger." not in caplog.text


def test_without_tensorboard_nothing_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = Path(str(fitted(Draws()).log_dir))
    assert caplog.text.count("TensorBoard is not installed") == 1
    assert metrics(run, "logger")
