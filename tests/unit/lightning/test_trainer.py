"""A script's Trainer in one process: the same as Lightning's, which is asked for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from helpers import lightning_itself
from helpers.runs import metrics
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hpctrain.errors import ConfigError
from hpctrain.lightning import Trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning would like workers, srun and more

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}


class Net(lightning.LightningModule):
    def __init__(self, width: int = 8, lr: float = 0.1, names: Any = ("a",)) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
        self.losses: list[float] = []

    def step(self, batch: list[Tensor], name: str) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log(f"{name}_loss", loss)
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.step(batch, "val")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.step(batch, "test")

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Any]:
        return {"output": self.net(batch[0]), "batch": batch_idx}

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        }


class Losses(lightning.Callback):
    """What each step logs."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.found.append(float(trainer.callback_metrics["train_loss"]))


def samples(count: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def loaders(batch_size: int = 8) -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(samples(), batch_size), DataLoader(samples(18), 8)


def net(seed: int = 3) -> Net:
    torch.manual_seed(seed)
    return Net(names=None)  # which TOML has no word for


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


def theirs(tmp_path: Path, **options: Any) -> lightning.Trainer:
    return lightning_itself.trainer(default_root_dir=tmp_path, **QUIET, **options)


def run_folder(trainer: Trainer) -> Path:
    assert trainer.log_dir is not None
    return Path(trainer.log_dir)


def test_losses_metrics_and_predictions_are_those_of_lightning(tmp_path: Path) -> None:
    here, there, seen = net(), net(), Losses()
    ours = Trainer(max_epochs=2, gradient_clip_val=0.5, **QUIET)
    ours.fit(here, *loaders())
    other = theirs(tmp_path, max_epochs=2, gradient_clip_val=0.5, callbacks=[seen])
    other.fit(there, *loaders())
    lines = [line["logged"]["train_loss"] for line in metrics(run_folder(ours), "train")]
    assert lines == pytest.approx(seen.found, abs=1e-6)
    assert ours.callback_metrics.keys() == other.callback_metrics.keys()
    for name, value in other.callback_metrics.items():
        assert float(ours.callback_metrics[name]) == pytest.approx(float(value), abs=1e-6)
    assert (ours.global_step, ours.max_epochs) == (other.global_step, 2)
    for mine, other_one in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(mine, other_one, atol=1e-6, rtol=0)

    last = loaders()[1]
    assert ours.validate(here, last)[0].keys() == other.validate(there, last)[0].keys()
    found, expected = ours.test(here, last), other.test(there, last)
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    mine, others = ours.predict(here, last), other.predict(there, last)
    assert mine is not None
    assert [each["batch"] for each in mine] == [each["batch"] for each in others] == [0, 1, 2]
    for each, reference in zip(mine, others, strict=True):
        torch.testing.assert_close(each["output"], reference["output"], atol=1e-6, rtol=0)


def test_what_is_left_of_a_run_is_read_by_lightning() -> None:
    best = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    model, trainer = net(), Trainer(max_epochs=3, callbacks=best, **QUIET)
    trainer.fit(model, *loaders())
    assert trainer.checkpoint_callback is best
    assert best.best_model_path.endswith("best.ckpt")
    found = Net.load_from_checkpoint(best.best_model_path, weights_only=True)
    assert found.hparams == model.hparams
    assert trainer.validate(found, loaders()[1]) == trainer.validate(
        net(9), loaders()[1], ckpt_path="best"
    )
    evaluations = metrics(run_folder(trainer), "evaluation")
    assert float(best.best_model_score) == pytest.approx(
        min(line["val_loss"] for line in evaluations)
    )
    trainer.save_checkpoint("mine.ckpt")
    saved = Net.load_from_checkpoint("mine.ckpt", weights_only=True)
    assert torch.equal(saved.net[0].weight, found.net[0].weight)
    # Its weights, for a new run.
    other = net(5)
    Trainer(max_steps=1, overrides=["training.max_bad_steps=3"], **QUIET).fit(
        other, *loaders(), ckpt_path="mine.ckpt"
    )
    assert not torch.equal(other.net[0].weight, net(5).net[0].weight)
    torch.testing.assert_close(other.net[0].weight, saved.net[0].weight, atol=0.2, rtol=0)


def test_a_second_start_begins_anew_and_the_last_can_be_gone_on_from() -> None:
    whole, parts, again = net(), net(), net(7)
    Trainer(max_epochs=3, **QUIET).fit(whole, *loaders())
    first = Trainer(max_epochs=2, **QUIET)
    first.fit(parts, *loaders())
    assert run_folder(first).name == "version_1"
    second = Trainer(max_epochs=3, **QUIET)
    second.fit(again, *loaders(), ckpt_path="last")
    assert run_folder(second) == run_folder(first)
    for mine, expected in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, expected)


def test_a_job_that_is_started_again_finds_its_complete_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the script goes on with trained weights, as if they had been trained just now."""
    monkeypatch.setenv("HPCTRAIN_TOKEN", "t")
    monkeypatch.setenv("HPCTRAIN_ATTEMPT", "1")
    model, again = net(), net(7)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(model, *loaders())
    monkeypatch.setenv("HPCTRAIN_ATTEMPT", "2")
    other = Trainer(max_epochs=1, **QUIET)
    other.fit(again, *loaders())
    assert run_folder(other) == run_folder(trainer)
    for mine, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, expected)


def test_accumulated_batches_are_one_step() -> None:
    once, twice = net(), net()
    Trainer(max_epochs=1, **QUIET).fit(once, *loaders(8))
    trainer = Trainer(max_epochs=1, accumulate_grad_batches=2, **QUIET)
    trainer.fit(twice, *loaders(4))
    assert trainer.global_step == 5
    for mine, expected in zip(twice.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=0)


class WithLoaders(Net):
    """One that makes its own data, in its own hooks."""

    def prepare_data(self) -> None:
        self.called = ["prepare_data"]

    def setup(self, stage: str) -> None:
        self.called.append(f"setup {stage}")
        self.samples = samples()

    def train_dataloader(self) -> DataLoader[Any]:
        self.called.append("train_dataloader")
        return DataLoader(self.samples, 8)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, 8)

    test_dataloader = val_dataloader


def test_a_module_with_its_own_loaders() -> None:
    torch.manual_seed(3)
    model, trainer = WithLoaders(), Trainer(max_epochs=1, **QUIET)
    trainer.fit(model)
    assert model.called == ["prepare_data", "setup fit", "train_dataloader"]
    assert trainer.global_step == 5
    assert "val_loss" in trainer.callback_metrics
    assert trainer.test(model)[0].keys() == {"test_loss"}
    assert model.called == ["prepare_data", "setup test"]


@pytest.mark.parametrize("value", [True, 2])
def test_fast_dev_run(value: bool | int) -> None:
    trainer = Trainer(fast_dev_run=value, **QUIET)
    trainer.fit(net(), *loaders())
    assert trainer.global_step == int(value)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda t: t.fit(nn.Linear(1, 1), *loaders()), "Linear is not a module with a training"),
        (lambda t: t.fit(net()), "no data to train with"),
        (lambda t: t.fit(net(), list(loaders())), "2 loaders in a list"),
        (lambda t: t.fit(net(), {"a": loaders()[0]}), "one loader in a dict"),
        (lambda t: t.fit(net(), loaders()[0], datamodule=object()), "leave out one of them"),
        (lambda t: t.fit(net(), *loaders(), ckpt_path="best"), '"last", or from a checkpoint'),
        (lambda t: t.fit(net(), *loaders(), ckpt_path="last"), "no fit has left a checkpoint"),
        (lambda t: t.fit(net(), *loaders(), ckpt_path="absent.ckpt"), "no such file"),
        (lambda t: t.test(dataloaders=loaders()[1]), "which module"),
        (lambda t: t.test(net(), loaders()[1], ckpt_path="best"), "has not run fit"),
        (lambda t: t.test(net()), "there is no test_dataloader"),
        (lambda t: t.save_checkpoint("x.ckpt"), "no module yet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_calls_that_cannot_be_had(call: Any, told: str) -> None:
    trainer = Trainer(max_epochs=1, **QUIET)
    with pytest.raises(ConfigError, match=told):
        call(trainer)


class Kept(Logger):
    """A service's, which fails at its first line."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []
        self.arguments: Any = None
        self.ended = ""
        self.fails = True

    def log_hyperparams(self, params: Any, *arguments: Any, **more: Any) -> None:
        self.arguments = params

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.fails:
            self.fails = False
            raise ConnectionError("no service")
        self.lines.append((step, dict(metrics)))

    def finalize(self, status: str) -> None:
        self.ended = status


def test_a_logger_is_handed_every_line(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    model = net()
    trainer = Trainer(max_epochs=1, logger=kept, callbacks=[LearningRateMonitor()], **QUIET)
    trainer.fit(model, *loaders())
    assert trainer.logger is kept is model.logger
    assert kept.arguments == {"width": 8, "lr": 0.1, "names": None}
    assert [step for step, _ in kept.lines] == [1, 2, 3, 4, 5, 5]
    assert {"train_loss", "loss", "lr", "epoch"} <= kept.lines[0][1].keys()
    assert kept.lines[-1][1].keys() == {"epoch", "val_loss"}
    assert kept.ended == "success"
    assert "ConnectionError: no service" in caplog.text
    # What is done in another way is said.
    assert "LearningRateMonitor: metrics.jsonl has lr in every line" in caplog.text


def test_overrides_are_keys_of_the_config() -> None:
    trainer = Trainer(max_epochs=1, overrides=["checkpoint.keep_last=1", "run.seed=5"], **QUIET)
    trainer.fit(net(), *loaders())
    assert "seed = 5" in (run_folder(trainer) / "config.toml").read_text()
    with pytest.raises(ConfigError, match="did you mean"):
        Trainer(max_epochs=1, overrides=["checkpoint.keep_lst=1"], **QUIET).fit(net(), *loaders())


def test_attributes_that_are_not_there_name_the_page() -> None:
    with pytest.raises(AttributeError, match=r"docs/from-lightning.md has a row"):
        _ = Trainer(**QUIET).fit_loop


class Forked(Net):
    """Logs under the names that Lightning ends by _step and _epoch, and beside the loggers."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.step(batch, "train")
        self.log("both", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("unwritten", loss, logger=False, on_step=True, on_epoch=True)
        self.log("largest", batch[0].max(), reduce_fx="max", on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.known = self.global_step, self.current_epoch
        self.step(batch, "val")
        self.log("end", float(-self.current_epoch), on_step=True, on_epoch=True)


class Logging(lightning.Callback):
    """Logs by itself, as Lightning's callbacks may."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.log("of_callback", 2.0, on_step=False, on_epoch=True)


def what_is_found_after(make: Any, tmp_path: Path) -> dict[str, Any]:
    kept = ModelCheckpoint(tmp_path / "kept", monitor="end", mode="max", save_top_k=2)
    stopping = EarlyStopping("end", mode="max", patience=3)
    last = ModelCheckpoint(save_last=True)
    torch.manual_seed(3)
    module, (train, validation) = Forked(), loaders()
    trainer = make(max_epochs=9, callbacks=[kept, stopping, last, Logging()])
    trainer.fit(module, train, validation)
    found = {
        "best": [sorted(map(float, kept.best_k_models.values())), float(kept.best_model_score)],
        "kth": float(kept.kth_value),
        "saved": [
            sorted(torch.load(path, weights_only=False)["global_step"] for path in paths)
            for paths in (kept.best_k_models, [last.last_model_path])
        ],
        "stopped": (stopping.stopped_epoch, float(stopping.best_score), stopping.wait_count),
        "logged": {key: float(value) for key, value in trainer.logged_metrics.items()},
        "shown": {key: float(value) for key, value in trainer.progress_bar_metrics.items()},
        "callback": {key: float(value) for key, value in trainer.callback_metrics.items()},
    }
    found["validated"] = trainer.validate(module, validation, verbose=False)
    found["known"] = module.known, (trainer.global_step, trainer.current_epoch)
    return found


def test_callbacks_and_metrics_after_a_run_are_those_of_lightning(tmp_path: Path) -> None:
    with lightning_itself.quietly():
        expected = what_is_found_after(
            lambda **options: theirs(tmp_path, num_sanity_val_steps=0, **options), tmp_path
        )
    found = what_is_found_after(lambda **options: Trainer(**QUIET, **options), tmp_path)
    # Steps of an evaluation have no lines of their own here.
    del expected["logged"]["end_step"]
    for name in ("best", "kth", "saved", "stopped", "known"):
        assert found[name] == expected[name], name
    for name in ("logged", "shown", "callback"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6), name
    assert found["validated"] == [pytest.approx(expected["validated"][0], abs=1e-6)]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from samples(8)


def test_a_stream_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"Stream is a stream.*hpctrain data pack"):
        Trainer(max_epochs=1, **QUIET).fit(net(), DataLoader(Stream(), 4))
