"""Modules compiled in the ways that public programs have, the same as when they are not."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from helpers.runs import metrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hpctrain.lightning import Trainer

pytestmark = pytest.mark.filterwarnings("ignore")

# One graph for batches of all sizes. What a backend makes of it matters in one case, traced anew
# for each: a module's own step.
compiled = functools.partial(torch.compile, backend="eager", dynamic=True)


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"largest": batch[0].max()}, on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class ItsStep(Net):
    training_step = torch.compile(Net.training_step, backend="aot_eager")
    validation_step = compiled(Net.validation_step)


class ItsForward(Net):
    forward = compiled(Net.forward)


class APart(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = compiled(self.net)


class Later(Net):
    def setup(self, stage: str) -> None:
        self.training_step = compiled(self.training_step)  # type: ignore[method-assign]


class Itself(Net):
    def on_fit_start(self) -> None:
        self.compile(backend="eager", dynamic=True)


def losses(module: Any) -> tuple[list[Any], Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(22, 4, generator=generator)
    data = TensorDataset(x, (x.sum(1) > 0).long())
    loaders = DataLoader(data, 8), DataLoader(data, 5)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
    trainer = Trainer(max_epochs=2, **quiet)
    trainer.fit(module, *loaders)
    (run,) = {Path(str(trainer.log_dir))}
    lines = metrics(run, "train") + metrics(run, "epoch") + metrics(run, "evaluation")
    left = ("seconds", "samples_per_second", "wall_time", "kind")
    return [{k: v for k, v in line.items() if k not in left} for line in lines], trainer


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


def test_compiled_modules_train_and_log_as_others() -> None:
    expected, _ = losses(Net())
    assert expected[-1]["val"] > 0
    for make in (ItsStep, ItsForward, APart, Later, Itself):
        found, _ = losses(make())
        for line, reference in zip(found, expected, strict=True):
            assert _flat(line) == pytest.approx(_flat(reference), rel=1e-5), make.__name__


def test_a_module_given_as_compiled_is_its_module() -> None:
    expected, _ = losses(Net())
    wrapped: Any = compiled(Net())
    found, trainer = losses(wrapped)
    assert [_flat(each) for each in found] == [pytest.approx(_flat(each)) for each in expected]
    best = trainer.checkpoint_callback.best_model_path
    loaded = Net.load_from_checkpoint(best, weights_only=True)
    assert all(
        torch.equal(item, wrapped._orig_mod.state_dict()[name])
        for name, item in loaded.state_dict().items()
    )
    assert trainer.validate(
        wrapped, DataLoader(TensorDataset(torch.ones(2, 4), torch.ones(2).long()))
    )


def _flat(line: Any) -> dict[str, float]:
    return {**{k: v for k, v in line.items() if isinstance(v, float)}, **line.get("logged", {})}
