"""docs/from-lightning.md has a row for everything that the installed Lightning has."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as lightning
import pytest
from lightning.pytorch import callbacks as theirs
from torch import nn

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
    made = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
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
