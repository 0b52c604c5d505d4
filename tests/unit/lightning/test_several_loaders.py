"""Several loaders to validate, test and predict with: names, numbers and hooks as Lightning's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
import torchmetrics
from helpers import lightning_itself
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hpctrain.errors import ConfigError, TrainingError
from hpctrain.lightning import Trainer

pytestmark = pytest.mark.filterwarnings("ignore")

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}


def samples(count: int, seed: int, *, labelled: bool = True) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long()) if labelled else TensorDataset(x)


def loader(count: int, seed: int, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(samples(count, seed, **options), batch_size)


class Several(lightning.LightningModule):
    """In-domain samples, others, and some without labels, each with what suits it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.shared = torchmetrics.Accuracy("multiclass", num_classes=2)
        self.each = nn.ModuleList(torchmetrics.Accuracy("multiclass", num_classes=2) for _ in "ab")
        self.kept: list[list[Tensor]] = [[], [], []]
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_validation_epoch_start(self) -> None:
        self.kept = [[], [], []]

    def on_validation_batch_start(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.seen.append((dataloader_idx, batch_idx))

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        self.seen.append(dataloader_idx)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        output = self.net(batch[0])
        self.kept[dataloader_idx].append(output)
        if dataloader_idx == 2:
            self.log("spread", output.std(0, unbiased=False).mean())
            return
        loss = nn.functional.cross_entropy(output, batch[1])
        self.log("loss", loss, prog_bar=True)
        self.log(f"loss_{dataloader_idx}", loss, add_dataloader_idx=False, on_step=True)
        self.shared(output, batch[1])
        self.each[dataloader_idx](output, batch[1])
        self.log_dict({"shared": self.shared, "each": self.each[dataloader_idx]})
        self.log("both", loss, on_step=True, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        self.log("whole", torch.cat([torch.cat(each) for each in self.kept]).abs().mean())

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch[0]), batch_idx, dataloader_idx

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def validation() -> list[DataLoader[Any]]:
    return [loader(10, 2), loader(7, 3, 3), loader(5, 4, labelled=False)]


def several() -> Several:
    torch.manual_seed(1)
    return Several()


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


def test_names_and_numbers_are_those_of_lightning(tmp_path: Path) -> None:
    here, there = several(), several()
    ours = Trainer(max_epochs=2, **QUIET)
    ours.fit(here, loader(12, 1), validation())
    other = lightning_itself.trainer(default_root_dir=tmp_path, max_epochs=2, **QUIET)
    other.fit(there, loader(12, 1), validation())
    found, expected = (each.callback_metrics for each in (ours, other))
    assert found.keys() == expected.keys()
    assert {"loss/dataloader_idx_0", "both_epoch/dataloader_idx_1", "spread/dataloader_idx_2"} <= {
        *found
    }
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), abs=1e-6), name

    for given in (validation, lambda: dict(zip("cab", validation(), strict=True))):
        mine, others = ours.validate(here, given()), other.validate(there, given())
        for one, reference in zip(mine, others, strict=True):
            # Values of the last batch alone are not among those of a whole dataset here.
            wanted = {name: value for name, value in reference.items() if "_step" not in name}
            assert {name: one[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    two = [loader(10, 2), CombinedLoader([loader(6, 5)], "sequential")]
    tested = ours.test(here, [two[0], loader(6, 5)])
    assert tested[1] == pytest.approx(other.test(there, [two[0], loader(6, 5)])[1], abs=1e-6)
    given = CombinedLoader({"a": two[0], "b": loader(6, 5)}, "sequential")
    assert ours.test(here, given) == tested

    mine, others = ours.predict(here, validation()), other.predict(there, validation())
    assert mine is not None
    for batches, references in zip(mine, others, strict=True):
        for (one, *numbers), (reference, *known) in zip(batches, references, strict=True):
            torch.testing.assert_close(one, reference, atol=1e-6, rtol=0)
            assert numbers == known
    last = here.seen[-12:]
    assert last[-1] == 2
    assert here.trainer.predict_dataloaders[1].batch_size == 3


class InData(lightning.LightningDataModule):
    classes = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(12, 1)

    def val_dataloader(self) -> dict[str, DataLoader[Any]]:
        return dict(zip("abc", validation(), strict=True))


class Asks(Several):
    def setup(self, stage: str) -> None:
        assert self.trainer.datamodule.classes == 2

    def on_train_start(self) -> None:
        assert self.trainer.num_val_batches == [3, 2, 2]
        assert [len(each.dataset) for each in self.trainer.val_dataloaders.values()] == [10, 7, 5]
        assert len(self.trainer.train_dataloader.dataset) == 12


def test_a_datamodule_may_have_several_and_a_module_sees_it() -> None:
    torch.manual_seed(1)
    trainer = Trainer(
        max_epochs=1, overrides=["checkpoint.keep_best=loss/dataloader_idx_1"], **QUIET
    )
    trainer.fit(Asks(), datamodule=InData())
    assert trainer.callback_metrics["whole"] > 0
    assert len(trainer.validate()) == 3


class Alone(Several):
    def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """Take no number."""


class Asking(Several):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Ask for it."""


class Twice(Several):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("same", 1.0, add_dataloader_idx=False)


@pytest.mark.parametrize(
    ("module", "given", "message"),
    [
        (
            Alone,
            validation,
            r"there are 3 loaders for validation_step, and Alone\.validation_step ",
        ),
        (Asking, lambda: loader(10, 2), r"there is one loader .* write dataloader_idx=0"),
        (Twice, validation, r'"same", add_dataloader_idx=False\) was called for loaders 0 and 1'),
        (
            Several,
            lambda: CombinedLoader({"a": loader(4, 1), "b": loader(5, 2)}, "max_size"),
            'CombinedLoader.*"max_size".* gives a batch of each',
        ),
    ],
)
def test_what_cannot_be_gone_through_is_refused(module: Any, given: Any, message: str) -> None:
    trainer = Trainer(max_epochs=1, **QUIET)
    with pytest.raises((ConfigError, TrainingError), match=message):
        trainer.fit(module(), loader(12, 1), given())


@pytest.mark.parametrize(
    "given",
    [
        lambda: [loader(4, 1), loader(5, 2)],
        lambda: {"a": loader(4, 1), "b": loader(5, 2)},
        lambda: CombinedLoader([loader(4, 1), loader(5, 2)], "max_size_cycle"),
    ],
)
def test_several_to_train_with_are_refused_with_what_serves_them(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"StackDataset"):
        Trainer(max_epochs=1, **QUIET).fit(several(), given())


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[Any] = []
        self.whole: Any = None

    def write_on_batch_end(self, *given: Any) -> None:
        _, _, prediction, indices, batch, batch_idx, dataloader_idx = given
        self.batches.append(
            (len(prediction[0]), list(indices), len(batch[0]), batch_idx, dataloader_idx)
        )

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Any, indices: Any
    ) -> None:
        self.whole = (
            [len(each) for each in predictions],
            [[list(i) for i in each] for each in indices],
        )


def test_callbacks_that_write_predictions_get_what_lightning_gives_them(tmp_path: Path) -> None:
    found = []
    for make in (Trainer, lightning_itself.trainer):
        writer = Writer()
        options = {} if make is Trainer else {"default_root_dir": tmp_path}
        trainer = make(callbacks=[writer], logger=False, **QUIET, **options)
        trainer.predict(several(), validation()[:2], return_predictions=False)
        found.append((writer.batches, writer.whole))
    assert found[0] == found[1]
    assert found[0][0][0] == (4, [0, 1, 2, 3], 4, 0, 0)
