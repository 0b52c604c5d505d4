"""docs/from-lightning.md has a row for everything that the installed Lightning has."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from helpers import lightning_itself
from lightning.pytorch import callbacks as theirs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hpctrain.errors import ConfigError
from hpctrain.lightning import Trainer
from hpctrain.training.data.user_data import NOT_CALLED
from hpctrain.training.modules.hooks import REFUSED

PAGE = Path(__file__).parents[3] / "docs" / "from-lightning.md"

VERDICTS = {"called", "mapped", "refused"}


def tables() -> dict[str, dict[str, str]]:
    """The rows of each table: name, and what it is."""
    found: dict[str, dict[str, str]] = {}
    for section in re.split(r"^##+ ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        title, _, text = section.partition("\n")
        rows: dict[str, str] = {}
        for names, verdict in re.findall(r"^\| (`[^|]+`) \| (\w+) \| [^|]*\|$", text, flags=re.M):
            for name in re.findall(r"`(\w+)`", names):
                assert name not in rows, f"{title}: {name} has two rows"
                rows[name] = verdict
        found[title] = rows
    return found


TABLES = tables()


def public(kind: type, *but: type) -> set[str]:
    inherited = {name for each in but for name in dir(each)}
    return {name for name in dir(kind) if not name.startswith("_")} - inherited


class Module(lightning.LightningModule):
    pass


def compare(title: str, there: set[str], allowed: Mapping[str, str] | None = None) -> None:
    here = TABLES[title]
    assert set(here.values()) <= VERDICTS
    assert not there - set(here), f"{title}: without a row"
    assert not set(here) - there - set(allowed or ()), f"{title}: Lightning has no such thing"


def test_arguments() -> None:
    compare("Arguments of the Trainer", set(inspect.signature(lightning.Trainer).parameters))


def test_callbacks() -> None:
    compare("Callbacks of Lightning", set(theirs.__all__) - {"Callback"})


@pytest.mark.filterwarnings("ignore")
def test_trainer() -> None:
    made = lightning_itself.trainer(enable_checkpointing=False)
    set_there = {name for name in vars(made) if not name.startswith("_")}
    compare("The Trainer", public(lightning.Trainer) | set_there)


def test_module() -> None:
    set_there = {name for name in vars(Module()) if not name.startswith("_")}
    there = public(lightning.LightningModule, nn.Module) | set_there
    compare("LightningModule", there, {"forward": "of torch.nn.Module"})


def test_datamodule() -> None:
    set_there = {name for name in vars(lightning.LightningDataModule()) if name[0] != "_"}
    shared = {"prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices"}
    compare("LightningDataModule", (public(lightning.LightningDataModule) | set_there) - shared)


def test_callback() -> None:
    compare("Callback", public(lightning.Callback))


CALLED: list[str] = []


def noted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that says that it was called, and does what Lightning's own does."""

    @functools.wraps(plain)
    def hook(self: Any, *arguments: Any, **keywords: Any) -> Any:
        CALLED.append(name)
        return plain(self, *arguments, **keywords)

    return hook


def watched(base: type, hooks: Iterable[str]) -> type:
    """A class that has all of these hooks of its own."""
    return type("Watched", (base,), {name: noted(name, getattr(base, name)) for name in hooks})


def rows_of(title: str, verdict: str) -> set[str]:
    return {name for name, found in TABLES[title].items() if found == verdict}


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(8, 1)), 4)


class Steps(lightning.LightningModule):
    """What trains; the hooks come on top."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).square().mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self(batch[0]).square().mean())

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Data(lightning.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def calls(model: Any, tmp_path: Path, **options: Any) -> set[str]:
    """Which hooks are called by all that a Trainer does."""
    CALLED.clear()
    data = options.pop("datamodule", None)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, log_every_n_steps=1, **options
    )
    trainer.fit(model, datamodule=data)
    trainer.validate(model, datamodule=data)
    trainer.test(model, datamodule=data)
    trainer.predict(model, datamodule=data)
    return set(CALLED)


@pytest.mark.filterwarnings("ignore")
def test_what_the_page_calls_called_is_called_of_a_module(tmp_path: Path) -> None:
    hooks = rows_of("LightningModule", "called")
    # This one needs a run that goes on.
    assert calls(watched(Steps, hooks)(), tmp_path) == hooks - {"on_load_checkpoint"}


@pytest.mark.filterwarnings("ignore")
def test_what_the_page_calls_called_is_called_of_a_callback(tmp_path: Path) -> None:
    hooks = rows_of("Callback", "called")
    found = calls(Steps(), tmp_path, callbacks=watched(lightning.Callback, hooks)())
    # These need a failure, and a run that goes on.
    assert found == hooks - {"on_exception", "on_load_checkpoint", "load_state_dict"}


@pytest.mark.filterwarnings("ignore")
def test_what_the_page_calls_called_is_called_of_a_datamodule(tmp_path: Path) -> None:
    hooks = rows_of("LightningDataModule", "called")
    assert calls(Steps(), tmp_path, datamodule=watched(Data, hooks)()) == hooks


@pytest.mark.parametrize("name", sorted(rows_of("LightningModule", "refused") & set(REFUSED)))
def test_what_the_page_calls_refused_is_refused(name: str, tmp_path: Path) -> None:
    model = watched(Steps, [name])()
    with pytest.raises(ConfigError, match=f"Watched.{name}"):
        Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path).fit(model)


@pytest.mark.parametrize(
    "name", sorted(rows_of("LightningDataModule", "refused") & set(NOT_CALLED))
)
def test_what_the_page_calls_refused_of_a_datamodule_is_refused(name: str, tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    for call in (trainer.fit, trainer.test):
        with pytest.raises(ConfigError, match=f"Watched.{name}"):
            call(Steps(), datamodule=watched(Data, [name])())


@pytest.mark.filterwarnings("ignore")
def test_attributes(tmp_path: Path) -> None:
    """Each is there after a run, or says what stands for it."""
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(Steps())
    there = {name for name in TABLES["The Trainer"] if hasattr(trainer, name)}
    assert there == rows_of("The Trainer", "mapped")
