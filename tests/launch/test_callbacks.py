"""Callbacks and LR schedulers in whole jobs: as under Lightning, and on from any checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import lightning_itself
from helpers.jobs import here, hpctrain, in_turn
from helpers.module_site import loaders, module_site
from helpers.runs import metrics

PAGE = Path(__file__).parents[2] / "docs" / "own-code.md"

ROWS, BATCH = 41, 8

MODULES = '''
import json
from copy import deepcopy

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler


class Net(L.LightningModule):
    def __init__(self, schedule="cycle"):
        super().__init__()
        self.save_hyperparameters()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.head(self.body(batch["x"]).relu()), batch["y"].long())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.head(self.body(batch["x"]).relu()), batch["y"].long())
        self.log("val_loss", loss)

    def configure_optimizers(self):
        groups = [
            {"params": self.body.parameters()},
            {"params": self.head.parameters(), "lr": 0.02, "name": "head"},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        if self.hparams.schedule == "plateau":
            plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val_loss"}
        steps = self.trainer.estimated_stepping_batches
        cycle = lr_scheduler.OneCycleLR(optimizer, max_lr=[0.02, 0.04], total_steps=steps)
        return [optimizer], [{"scheduler": cycle, "interval": "step"}]


class EMACallback(L.Callback):
    """As public repositories write it: weights are swapped for evaluations."""

    def __init__(self, decay=0.9, file=None):
        self.decay, self.file = decay, file
        self.ema_state_dict, self.backup = None, None

    def on_fit_start(self, trainer, pl_module):
        if self.ema_state_dict is None:
            self.ema_state_dict = deepcopy(pl_module.state_dict())

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, value in pl_module.state_dict().items():
            self.ema_state_dict[name].mul_(self.decay).add_(value, alpha=1 - self.decay)

    def on_validation_epoch_start(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        self.backup = deepcopy(pl_module.state_dict())
        pl_module.load_state_dict(self.ema_state_dict)

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        pl_module.load_state_dict(self.backup)
        self.backup = None

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        trainer.strategy.barrier()  # it is called on every rank
        checkpoint["ema_state_dict"] = self.ema_state_dict

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.ema_state_dict = checkpoint["ema_state_dict"]

    def on_train_end(self, trainer, pl_module):
        if self.file and trainer.is_global_zero:
            numbers = {name: value.tolist() for name, value in self.ema_state_dict.items()}
            with open(self.file, "w") as file:
                json.dump(numbers, file)


class LogSamples(L.Callback):
    """Writes what the model makes of some samples, every epoch."""

    def __init__(self, file):
        self.file, self.batch = file, None

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.batch = batch

    def on_validation_epoch_end(self, trainer, pl_module):
        with torch.no_grad():
            hidden = pl_module.body(self.batch["x"].to(pl_module.device))
            samples = pl_module.head(hidden.relu())[:4]
        pl_module.log("sample_mean", samples.mean())
        line = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": [group["lr"] for group in trainer.optimizers[0].param_groups],
            "samples": samples.tolist(),
        }
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\\n")


class Breaks(L.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        raise ZeroDivisionError("of its own")

    def on_exception(self, trainer, pl_module, exception):
        print("told of", repr(exception))


class Plain:
    """Of no base class, beside a task of the config."""

    def __init__(self, file):
        self.file, self.calls, self.losses = file, [], []

    def on_train_start(self, trainer, model):
        self.calls.append(["start", trainer.global_step])

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.calls.append([batch_idx, trainer.global_step])

    def on_validation_end(self, trainer, model):
        self.calls.append(["evaluation", trainer.current_epoch])

    def on_before_backward(self, trainer, model, loss):
        raise AssertionError

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]

    def on_train_end(self, trainer, model):
        with open(self.file, "w") as file:
            json.dump([self.calls, self.losses], file)
'''

CONFIG = """
[run]
name = "here"
[model]
use = "callback_modules:Net"
[data]
train = "rows"
validation = "rows"
global_batch_size = 8
shuffle = false
[training]
max_epochs = 2
[logging]
every_steps = 1
progress = "none"
"""

CALLBACKS = """
[[callbacks]]
use = "callback_modules:EMACallback"
decay = 0.8
file = "ema-here.json"
[[callbacks]]
use = "callback_modules:LogSamples"
file = "samples-here.jsonl"
"""

BY_HAND = """
[[callbacks]]
use = "callback_modules:Plain"
file = "calls.json"
[task]
use = "classification"
inputs = ["x"]
target = "y"
[optimizer]
use = "sgd"
lr = 0.1
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with module_site(
        tmp_path, monkeypatch, name="callback_modules", modules=MODULES, config=CONFIG, rows=ROWS
    ) as made:
        monkeypatch.chdir(tmp_path)
        yield made


def by_lightning(schedule: str) -> dict[str, float]:
    import callback_modules

    with lightning_itself.quietly():
        torch.manual_seed(1234)
        module = callback_modules.Net(schedule)
        trainer = lightning_itself.trainer(
            max_epochs=2,
            devices=1,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            callbacks=[
                callback_modules.EMACallback(0.8, "ema-there.json"),
                callback_modules.LogSamples("samples-there.jsonl"),
            ],
        )
        trainer.fit(module, *loaders(ROWS, BATCH))
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.ranks(1)
@pytest.mark.parametrize("schedule", ["cycle", "plateau"])
def test_callbacks_run_unedited_with_lightnings_numbers(site: Path, schedule: str) -> None:
    theirs = by_lightning(schedule)
    (site / "run.toml").write_text(CONFIG + CALLBACKS, encoding="utf-8")
    here(site, "run.toml", f"model.schedule={schedule}")
    for there, ours in (("ema-there.json", "ema-here.json"),):
        first, second = (json.loads((site / name).read_text()) for name in (there, ours))
        assert first.keys() == second.keys()
        for name, values in first.items():
            assert second[name] == pytest.approx(np.array(values), abs=1e-5), name
    lines = [
        [json.loads(line) for line in (site / f"samples-{name}.jsonl").read_text().splitlines()]
        for name in ("there", "here")
    ]
    assert len(lines[0]) == 2
    for first, second in zip(*lines, strict=True):
        assert (first["epoch"], first["step"]) == (second["epoch"], second["step"])
        assert second["lr"] == pytest.approx(first["lr"], rel=1e-12)
        assert second["samples"] == pytest.approx(np.array(first["samples"]), abs=1e-5)
    last = metrics(site / "runs" / "here", "evaluation")[-1]
    for name in ("val_loss", "sample_mean"):
        assert last[name] == pytest.approx(theirs[name], abs=1e-5)


@pytest.mark.ranks(1)
def test_what_a_callback_raises_ends_the_job_with_its_place(site: Path) -> None:
    text = CONFIG + '[[callbacks]]\nuse = "callback_modules:Breaks"\n'
    (site / "run.toml").write_text(text, encoding="utf-8")
    ended = hpctrain(site, 0, "run.toml", code=70)
    said = ended.stdout + ended.stderr
    assert "told of ZeroDivisionError('of its own')" in said
    assert 'callback_modules.py", line' in said
    assert said.rstrip().splitlines()[-1] == "ZeroDivisionError: of its own"


@pytest.mark.ranks(1)
def test_callbacks_beside_a_task_of_the_config(site: Path) -> None:
    (site / "run.toml").write_text(CONFIG + BY_HAND, encoding="utf-8")
    sizes = ("model.in_features=6", "model.out_features=3")
    words = ("model.use=mlp", "data.global_batch_size=21", *sizes)
    said = here(site, "run.toml", *words)
    assert "callback Plain: on_before_backward is not called: beside a task" in said
    calls, losses = json.loads((site / "calls.json").read_text())
    first = [["start", 0], [0, 1], [1, 2], ["evaluation", 0], [0, 3], [1, 4], ["evaluation", 1]]
    assert calls == first
    logged = [record["loss"] for record in metrics(site / "runs" / "here", "train")]
    assert losses == pytest.approx(logged, rel=1e-6)
    here(site, "run.toml", *words, "training.max_epochs=3")
    calls, _ = json.loads((site / "calls.json").read_text())
    assert calls == [*first, ["start", 4], [0, 5], [1, 6], ["evaluation", 2]]


def page_block(first_words: str) -> str:
    """Return the fenced block of the docs that begins with these words."""
    blocks = re.findall(r"```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = (block for block in blocks if block.startswith(first_words))
    return found


@pytest.mark.ranks(1)
def test_the_callback_of_the_docs(site: Path) -> None:
    (site / "averages.py").write_text(page_block("# averages.py"), encoding="utf-8")
    table = page_block('[[callbacks]]\nuse = "averages:Average"')
    (site / "run.toml").write_text(CONFIG + table, encoding="utf-8")
    words = ["run.toml", "model.schedule=plateau"]
    here(site, *words, "run.name=whole")
    here(site, *words, "training.max_epochs=1")
    here(site, *words)
    whole, resumed = (metrics(site / "runs" / name, "evaluation") for name in ("whole", "here"))
    assert len(whole) == 2
    assert whole == resumed


@pytest.mark.ranks(3)
def test_ranks_go_on_in_mid_epoch_bit_for_bit(site: Path) -> None:
    """From a checkpoint inside an epoch, with the averages of a callback, and spread parameters."""
    (site / "run.toml").write_text(CONFIG, encoding="utf-8")
    (site / "ema.toml").write_text(CONFIG + CALLBACKS, encoding="utf-8")
    runs = {"cycle": ("ema.toml", "ddp"), "plateau": ("run.toml", "fsdp")}
    lines = []
    for schedule, (config, strategy) in runs.items():
        words = [config, f"model.schedule={schedule}", f"training.strategy={strategy}"]
        words += ["data.global_batch_size=10", "data.shuffle=true"]
        saves = ["checkpoint.every_steps=3", "checkpoint.keep_last=99"]
        resume = f"checkpoint.resume=runs/{schedule}/checkpoints/step-00000003"
        lines.append([*words, *saves, f"run.name={schedule}"])
        lines.append([*words, resume, f"run.name={schedule}-resumed"])
    for ended in in_turn(site, 3, *lines):
        assert ended.code == 0, ended.output
    for schedule in runs:
        whole, resumed = (
            [each for each in metrics(site / "runs" / name) if each["step"] > 3]
            for name in (schedule, f"{schedule}-resumed")
        )
        assert {"lr", "lr/head"} <= whole[0].keys()
        assert whole == resumed
    moved_to_other_ranks(site)


def moved_to_other_ranks(site: Path) -> None:
    """The same runs go on in mid-epoch on two ranks, fsdp's with ddp, and that one with fsdp."""
    words = ["data.global_batch_size=10", "data.shuffle=true"]
    saves = ["checkpoint.every_steps=3", "checkpoint.keep_last=99"]
    lines = []
    for name, config, strategy, source in (
        ("cycle-moved", "ema.toml", "ddp", "cycle/checkpoints/step-00000003"),
        ("plateau-moved", "run.toml", "ddp", "plateau/checkpoints/step-00000003"),
        ("plateau-again", "run.toml", "fsdp", "plateau-moved/checkpoints/step-00000006"),
    ):
        schedule = name.partition("-")[0]
        lines.append(
            [
                config,
                f"model.schedule={schedule}",
                f"training.strategy={strategy}",
                *words,
                *saves,
                f"checkpoint.resume=runs/{source}",
                f"run.name={name}",
            ]
        )
    for (*_, name), ended in zip(lines, in_turn(site, 2, *lines), strict=True):
        assert ended.code == 0, ended.output
        moved = metrics(site / "runs" / name.partition("=")[2])
        whole = metrics(site / "runs" / name.partition("=")[2].partition("-")[0])
        expected = [each for each in whole if each["step"] >= moved[0]["step"]]
        assert len(moved) == len(expected) > 4
        for here_now, there in zip(moved, expected, strict=True):
            for key, value in there.items():
                if key in ("loss", "lr", "val_loss", "train_loss", "logged", "samples_seen"):
                    assert here_now[key] == pytest.approx(value, rel=1e-5), (name, key)
