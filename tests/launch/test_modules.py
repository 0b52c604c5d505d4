"""Modules by config: as Lightning itself runs them, and refused where a step cannot do it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import lightning_itself
from helpers.jobs import here, hpctrain
from helpers.module_site import loaders, module_site
from helpers.runs import metrics

pytestmark = pytest.mark.ranks(2)

PAGE = Path(__file__).parents[2] / "docs" / "own-code.md"

ROWS, BATCH = 40, 8

MODULES = """
import lightning as L
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F

CALLS = []


class Lit(L.LightningModule):
    def __init__(self, hidden=16, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3))
        self.train_acc = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.val_acc = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.val_f1 = torchmetrics.F1Score("multiclass", num_classes=3, average="macro")
        self.outputs = []

    def forward(self, x):
        return self.net(x)

    def step(self, batch, stage):
        logits, y = self(batch["x"]), batch["y"].long()
        loss = F.cross_entropy(logits, y)
        self.log(f"{stage}_loss", loss, prog_bar=True)
        return loss, logits, y

    def training_step(self, batch, batch_idx):
        loss, logits, y = self.step(batch, "train")
        self.train_acc(logits, y)
        self.log("train_acc", self.train_acc, on_step=True, on_epoch=True)
        self.log("train_mean", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.log("largest_weight", max(p.abs().max() for p in self.parameters()))

    def validation_step(self, batch, batch_idx):
        loss, logits, y = self.step(batch, "val")
        self.val_acc.update(logits, y)
        self.val_f1.update(logits, y)
        self.outputs.append(loss)
        self.log("val_acc", self.val_acc)
        return loss

    def on_validation_epoch_end(self):
        self.log("val_f1", self.val_f1.compute())
        self.log("val_batches", float(len(self.outputs)))
        self.val_f1.reset()
        self.outputs.clear()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Nested(Lit):
    # Makes layers late and attributes in hooks, reaches into another, looks at gradients.

    def __init__(self):
        super().__init__()
        self.inner = Lit(hidden=4)

    def setup(self, stage):
        self.total = int(self.trainer.estimated_stepping_batches)

    def configure_model(self):
        torch.manual_seed(7)
        self.late = nn.Linear(3, 3)

    def on_fit_start(self):
        self.sum = torch.zeros((), device=self.device)

    def on_train_start(self):
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.late(self.inner(batch["x"])), batch["y"].long())
        self.seen.append(loss.detach())
        self.log("train_loss", loss)
        return {"loss": loss, "more": 1}

    def on_before_optimizer_step(self, optimizer):
        norms = L.pytorch.utilities.grad_norm(self, norm_type=2)
        self.log("norm", norms["grad_2.0_norm_total"])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.sum += outputs["loss"] * outputs["more"]

    def on_train_epoch_end(self):
        self.log("seen", torch.stack(self.seen).mean())
        self.log("sum", self.sum)
        self.seen.clear()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=self.total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def recorded(name):
    inner = getattr(Lit, name)

    def method(self, *args, **keywords):
        if self._trainer is None or not self.trainer.sanity_checking:
            numbers = [each for each in [*args, *keywords.values()] if isinstance(each, int | str)]
            CALLS.append((name, self.global_step, self.current_epoch, *numbers))
        return inner(self, *args, **keywords)

    return method


NAMES = [
    name
    for name in dir(L.LightningModule)
    if (name.startswith("on_") and not name.endswith(("_gpu", "_checkpoint")))
    or name in ("setup", "teardown", "prepare_data", "configure_model", "configure_optimizers")
    or name in ("training_step", "validation_step", "transfer_batch_to_device", "lr_scheduler_step")
]
Recorded = type("Recorded", (Lit,), {name: recorded(name) for name in NAMES})


class Steps(Lit):
    def optimizer_step(self, *args, **keywords):
        return super().optimizer_step(*args, **keywords)


class Clips(Lit):
    def configure_gradient_clipping(self, *args, **keywords):
        pass


class Manual(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Nothing(Lit):
    def training_step(self, batch, batch_idx):
        return None


class Two(Lit):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.net.parameters(), lr=1.0) for _ in range(2)]


class Odd(Lit):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("odd", loss, reduce_fx=torch.median)
        return loss


class Keeps(Lit):
    count = 0
    told = None

    def training_step(self, batch, batch_idx):
        self.count += 1
        return super().training_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint):
        assert checkpoint["state_dict"] and checkpoint["global_step"] >= 0
        checkpoint["count"] = {"steps": self.count, "row": torch.arange(3)}

    def on_load_checkpoint(self, checkpoint):
        self.count = checkpoint["count"]["steps"]
        assert checkpoint["count"]["row"].tolist() == [0, 1, 2]
        CALLS.append(self.count)


class Drops(Lit):
    def on_save_checkpoint(self, checkpoint):
        del checkpoint["state_dict"]["net.0.weight"]


class Stops(Lit):
    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.trainer.should_stop = self.current_epoch == 1


class Leaves(Lit):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 1 else None


class Iterates(Lit):
    def training_step(self, dataloader_iter):
        pass


def a_net():
    return nn.Linear(6, 3)
"""

CONFIG = """
[run]
name = "lit"
[model]
use = "lit_modules:Lit"
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


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with module_site(
        tmp_path, monkeypatch, name="lit_modules", modules=MODULES, config=CONFIG, rows=ROWS
    ) as made:
        yield made


def by_lightning(name: str) -> tuple[list[float], dict[str, float]]:
    """Return the losses of a run of Lightning's, and what it has logged last."""
    import lightning
    import lit_modules

    losses: list[float] = []

    class Steps(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

    with lightning_itself.quietly():
        torch.manual_seed(1234)
        module = getattr(lit_modules, name)()
        trainer = lightning_itself.trainer(
            max_epochs=2,
            devices=1,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            callbacks=[Steps()],
        )
        trainer.fit(module, *loaders(ROWS, BATCH))
    return losses, {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("name", ["Lit", "Nested"])
def test_a_module_trains_and_logs_as_under_lightning(site: Path, name: str) -> None:
    theirs, logged = by_lightning(name)
    here(site, "run.toml", f"model.use=lit_modules:{name}")
    records = metrics(site / "runs" / "lit")
    ours = [record["loss"] for record in records if record["kind"] == "train"]
    assert ours == pytest.approx(theirs, abs=1e-5)
    found = {}
    for record in records:
        found |= record | record.get("logged", {})
    for key, value in logged.items():
        assert found[key] == pytest.approx(value, abs=1e-5), key


def test_hooks_are_called_in_lightnings_order(site: Path) -> None:
    by_lightning("Recorded")
    import lit_modules

    theirs = list(lit_modules.CALLS)
    lit_modules.CALLS.clear()
    here(site, "run.toml", "model.use=lit_modules:Recorded")
    assert len(theirs) > 100
    assert theirs == lit_modules.CALLS


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("Steps", 78, "Steps.optimizer_step"),
        ("Clips", 78, "training.clip_norm"),
        ("Manual", 78, "hpctrain.connect"),
        ("Nothing", 70, "returned None"),
        ("Two", 78, "2 optimizers"),
        ("Odd", 70, 'known are "mean"'),
        ("Drops", 74, "Drops.on_save_checkpoint"),
        ("Leaves", 70, "-1"),
        ("Iterates", 78, "dataloader_iter"),
        ("a_net", 78, "has no training_step of its own"),
    ],
)
def test_what_a_step_cannot_do_is_refused_with_its_place(
    site: Path, name: str, code: int, told: str
) -> None:
    said = here(site, "run.toml", f"model.use=lit_modules:{name}", code=code)
    assert told in said
    if code == 78 and name not in ("a_net", "Manual"):
        assert "lit_modules.py" in said


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("optimizer.use=sgd", "optimizer.lr: missing"),
        ("scheduler.use=cosine", "leave [scheduler] out"),
        ("checkpoint.keep_best=val_los", "did you mean val_loss"),
    ],
)
def test_what_the_config_says_beside_a_module(site: Path, section: str, told: str) -> None:
    assert told in here(site, "run.toml", section, code=78)


def test_an_optimizer_beside_the_modules_own_is_refused(site: Path) -> None:
    said = here(site, "run.toml", "optimizer.use=sgd", "optimizer.lr=0.1", code=78)
    assert "both say what trains it" in said


def test_a_model_that_is_no_module_needs_a_task(site: Path) -> None:
    (site / "plain.py").write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n    pass\n", encoding="utf-8"
    )
    said = here(site, "run.toml", "model.use=plain:Net", code=78)
    assert "task: missing section" in said
    assert "optimizer: missing section" in said


def test_a_module_adds_to_its_checkpoint_and_gets_it_back(site: Path) -> None:
    here(site, "run.toml", "model.use=lit_modules:Keeps", "training.max_epochs=1")
    import lit_modules

    lit_modules.CALLS.clear()
    here(site, "run.toml", "model.use=lit_modules:Keeps")
    assert lit_modules.CALLS == [5]


def test_a_module_that_asks_for_the_end_gets_it_and_the_next_job_knows(site: Path) -> None:
    overrides = ("model.use=lit_modules:Stops", "training.max_epochs=5")
    assert "trainer.should_stop was set" in here(site, "run.toml", *overrides)
    assert metrics(site / "runs" / "lit")[-1]["step"] == 10
    assert (site / "runs" / "lit" / "checkpoints" / "step-00000010").exists()
    here(site, "run.toml", *overrides)
    assert metrics(site / "runs" / "lit")[-1]["step"] == 10


def test_the_best_checkpoint_is_found_by_what_was_logged(site: Path) -> None:
    said = here(site, "run.toml", "checkpoint.keep_best=val_acc", "training.max_epochs=3")
    records = metrics(site / "runs" / "lit")
    found = {each["step"]: each["val_acc"] for each in records if each["kind"] == "evaluation"}
    best = max(found, key=lambda step: (found[step], -step))
    assert f"best val_acc {found[best]:.4g} at step {best}" in " ".join(said.split())


def test_the_page_does_what_it_says(tmp_path: Path) -> None:
    """docs/own-code.md, "Modules": its files, and its commands on two ranks."""
    page = PAGE.read_text(encoding="utf-8")
    section = page.split("## Modules\n")[1].split("\n## ")[0]
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL))
    (tmp_path / "lit.py").write_text(blocks["python"], encoding="utf-8")
    (tmp_path / "lit.toml").write_text(blocks["toml"], encoding="utf-8")
    pack, train = [line.removeprefix("$ ").split() for line in blocks["console"].splitlines()]
    here(tmp_path, *pack[3:])
    assert train[:3] == ["mpirun", "-np", "2"]
    said = hpctrain(tmp_path, 2, *train[6:]).stderr
    assert "best" in said
    (*_, last) = [
        each for each in metrics(tmp_path / "runs" / "lit") if each["kind"] == "evaluation"
    ]
    assert last["val_accuracy"] > 0.8


def test_check_knows_modules(site: Path) -> None:
    assert "gradients and metrics are finite" in here(site, "check", "run.toml")
