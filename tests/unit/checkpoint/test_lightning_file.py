"""`ckpt export RUN x.ckpt`: read by the real Lightning, and by a new run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from helpers import lightning_itself
from torch import Tensor, nn

from hpctrain.checkpoint.lightning_file import export_lightning
from hpctrain.checkpoint.manager import CheckpointManager, Retention
from hpctrain.checkpoint.save import Snapshot
from hpctrain.cli import main
from hpctrain.errors import CheckpointError, ExitCode
from hpctrain.training.checkpointing.initialize import read_weights


class Net(lightning.LightningModule):
    def __init__(self, width: int, rate: float = 0.1, names: list[str] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 2)
        self.tied = self.layer
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def predict_step(self, batch: Tensor) -> Tensor:
        return self.layer(batch)


class Old(lightning.LightningModule):
    """One that keeps all its arguments as one dictionary, as programs of old do."""

    def __init__(self, hparams: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters(hparams)
        self.layer = nn.Linear(hparams["width"], 2)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store = CheckpointManager(
        tmp_path / "run",
        retention=Retention(keep_last=9, metric="loss", mode="min"),
        confirm=lambda: None,
        warn=print,
    )
    for step, loss in ((10, 0.5), (20, 1.0)):
        torch.manual_seed(step)
        store.save(
            Snapshot(
                step=step,
                model=Net(4).state_dict(),
                training={},
                values={"data": {"epoch": step // 10}},
                config_toml=(
                    '[model]\nuse = "nets:Net"\nwidth = 4\nrate = 0.25\nnames = ["a", "b"]\n'
                ),
                metrics={"loss": loss},
            )
        )
        store.finish()
    return tmp_path / "run"


@pytest.mark.parametrize(("best", "step"), [(False, 20), (True, 10)])
def test_lightning_reads_it(run: Path, tmp_path: Path, best: bool, step: int) -> None:
    target = tmp_path / "x.ckpt"
    options = ["--best"] if best else []
    assert main(["ckpt", "export", str(run), str(target), *options]) == ExitCode.DONE
    found = Net.load_from_checkpoint(target, weights_only=True)
    torch.manual_seed(step)
    for name, item in Net(4).state_dict().items():
        assert torch.equal(found.state_dict()[name], item), name
    assert (found.hparams.rate, found.hparams.names) == (0.25, ["a", "b"])
    content = torch.load(target, weights_only=True)
    assert (content["epoch"], content["global_step"]) == (step // 10, step)
    # And the way back: the weights of a new run.
    assert read_weights(target).keys() == found.state_dict().keys()


@pytest.mark.filterwarnings("ignore")  # it would like srun and more workers
def test_lightnings_own_trainer_takes_it(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.ckpt"
    export_lightning(run, target)
    module, data = Net(4), torch.utils.data.DataLoader(torch.randn(4, 4))
    trainer = lightning_itself.trainer()
    found = trainer.predict(module, data, ckpt_path=target)
    assert found is not None
    torch.manual_seed(20)
    assert torch.equal(found[0], Net(4).layer(data.dataset[:1]).detach())


def test_arguments_in_one_dictionary(tmp_path: Path) -> None:
    store = CheckpointManager(
        tmp_path / "run", retention=Retention(keep_last=1), confirm=lambda: None, warn=print
    )
    model = Old({"width": 3}).state_dict()
    config = '[model]\nuse = "nets:Old"\n[model.hparams]\nwidth = 3\n'
    store.save(Snapshot(step=1, model=model, training={}, values={}, config_toml=config))
    store.finish()
    export_lightning(tmp_path / "run", tmp_path / "x.ckpt")
    found = Old.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert torch.equal(found.layer.weight, model["layer.weight"])


def test_a_file_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        export_lightning(run, tmp_path / "nowhere" / "x.ckpt")
