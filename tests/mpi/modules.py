"""Run on every rank: modules beside the same computation written as a task by hand.

The last batch of an epoch has one sample, so that ranks come to be without one.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import resume_cases
import torch
import torchmetrics
from resume_cases import FEATURES, Site, hurried
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from hpctrain.config.toml import parse
from hpctrain.config.validate import validate
from hpctrain.data import Writer
from hpctrain.errors import ExitCode, TrainingError
from hpctrain.launch.failure import guard
from hpctrain.launch.process_group import control_plane

ROWS, BATCH, CLASSES = 65, 16, 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 24)
        self.drop = nn.Dropout(0.2)
        self.second = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.drop(self.first(x).relu())
        output: Tensor = self.second(hidden)
        return output


class ByHand:
    """The task that the modules below are compared with."""

    metrics: Mapping[str, str] = {"val_loss": "min", "val_accuracy": "max"}
    counts_samples = True

    def __init__(self, inputs: Any, target: Any) -> None:
        self.inputs, self.target = inputs, target
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)

    def loss(self, model: nn.Module, fields: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        y = fields["y"].long()
        return F.cross_entropy(model(fields["x"]), y) * len(y), len(y)

    def evaluate(self, model: nn.Module, fields: Mapping[str, Tensor]) -> dict[str, Any]:
        y = fields["y"].long()
        logits = model(fields["x"])
        self.accuracy.update(logits, y)
        loss = F.cross_entropy(logits, y).double() * len(y)
        return {"val_loss": (loss, len(y)), "val_accuracy": self.accuracy}


class Lit(L.LightningModule):
    """The same, as Lightning's users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.train_accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch["x"], batch["y"].long()
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.train_accuracy.update(logits, y)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        rank = float(self.global_rank)
        self.log_dict({"first": rank, "index": float(batch_idx)}, reduce_fx="min", on_epoch=True)
        self.log("last", rank, reduce_fx="max")
        self.log("seen", float(len(y)), reduce_fx="sum", on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch["x"], batch["y"].long()
        logits = self(x)
        self.accuracy.update(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_accuracy", self.accuracy)
        self.log("smallest", y.min().float(), reduce_fx="min")

    def on_validation_epoch_end(self) -> None:
        self.log("at_the_end", self.accuracy.compute())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Hooked(Lit):
    """Looks at the gradients, which are whole and unscaled."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = [item.grad.norm() for item in self.parameters() if item.grad is not None]
        self.log("hooked_norm", torch.stack([torch.as_tensor(float(n)) for n in norms]).norm())


class Weighted(Lit):
    """A mean over some of its samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        y = batch["y"].long()
        losses = F.cross_entropy(self(batch["x"]), y, reduction="none")
        kept = (y > 1).float()
        weight = kept.sum()
        return {"loss": (losses * kept).sum() / weight.clamp(min=1), "weight": weight}


class WeightedByHand(ByHand):
    counts_samples = False

    def loss(self, model: nn.Module, fields: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        y = fields["y"].long()
        losses = F.cross_entropy(model(fields["x"]), y, reduction="none")
        kept = (y > 1).float()
        weight = kept.sum()
        return (losses * kept).sum() / weight.clamp(min=1) * weight, weight


class Uncertain(nn.Module):
    """A task that learns how much its two losses weigh, and logs them."""

    metrics: Mapping[str, str] = {"loss": "min"}
    counts_samples = True

    def __init__(self, inputs: Any, target: Any) -> None:
        super().__init__()
        self.inputs, self.target = inputs, target
        self.log_variance = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def set_log(self, log: Any) -> None:
        self.log = log

    def weighed(self, model: nn.Module, fields: Any, held: Any) -> tuple[Tensor, int]:
        y = fields["y"].long()
        logits = model(fields["x"]) * held.scale
        entropy = F.cross_entropy(logits, y, reduction="sum")
        self.log("entropy", entropy / len(y), on_epoch=True)
        self.log("seen", float(len(y)), reduce_fx="sum", on_step=False, on_epoch=True)
        self.log("first", y.min(), reduce_fx="min")
        parts = torch.stack([entropy, logits.square().sum()])
        variance = held.log_variance
        return (parts / variance.exp() + len(y) * variance).sum(), len(y)

    def loss(self, model: nn.Module, fields: Any) -> tuple[Tensor, int]:
        return self.weighed(model, fields, self)

    def evaluate(self, model: nn.Module, fields: Any) -> dict[str, Any]:
        loss, samples = self.loss(model, fields)
        return {"loss": (loss.double(), samples)}


class Holding(Net):
    """The model that holds what the task above holds."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.scale = nn.Parameter(torch.tensor(1.0))


class OfModel(Uncertain):
    def __init__(self, inputs: Any, target: Any) -> None:
        super().__init__(inputs, target)
        del self.log_variance, self.scale

    def loss(self, model: nn.Module, fields: Any) -> tuple[Tensor, int]:
        return self.weighed(model, fields, model)


class Half(Lit):
    """Logs something on one rank only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_rank == self.trainer.world_size - 1:
            self.log("mine", loss)
        return loss


def config_of(site: Site, name: str, model: str, strategy: str, task: str | None) -> Any:
    """Return the config of a job."""
    lines = [
        f'[run]\nname = "{name}"\ndirectory = "{site.folder}/runs"',
        f'[model]\nuse = "modules:{model}"',
        f'[data]\ntrain = "{site.folder}/rows"\nvalidation = "{site.folder}/rows"',
        f"global_batch_size = {BATCH}\nmicro_batch_size = 3\nlanes = 16",
        f'[training]\nmax_epochs = 2\nstrategy = "{strategy}"\nclip_norm = 1.0',
        '[logging]\nevery_steps = 1\nprogress = "none"',
    ]
    if task is not None:
        lines += [
            f'[task]\nuse = "modules:{task}"\ninputs = ["x"]\ntarget = "y"',
            '[optimizer]\nuse = "sgd"\nlr = 0.05\nmomentum = 0.9',
        ]
    config, mistakes = validate(parse("\n".join(lines), "run.toml"))
    assert config is not None, mistakes
    return config


def run(site: Site, name: str, model: str, strategy: str, task: str | None = None) -> Any:
    """Run a job, and return the records of its metrics and its last parameters, on rank 0."""
    code = site.train(config_of(site, name, model, strategy, task))
    assert code == ExitCode.DONE
    if not site.topology.is_rank_zero:
        return None, None
    folder = site.run(name) / "checkpoints" / "step-00000010"
    tensors = [load_file(path) for path in sorted(folder.glob("model*.safetensors"))]
    return site.metrics(name), tensors


def steps(records: Any) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == "train"]


def of_kind(records: Any, kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def check_same(site: Site, strategy: str) -> None:
    """See that a module computes what a task by hand does, bit for bit."""
    for model, task in (("Lit", "ByHand"), ("Weighted", "WeightedByHand")):
        ours, ours_end = run(site, f"{model}-{strategy}", model, strategy)
        theirs, theirs_end = run(site, f"{task}-{strategy}", "Net", strategy, task)
        if ours is None:
            continue
        for one, other in zip(steps(ours), steps(theirs), strict=True):
            for key in ("loss", "grad_norm", "lr"):
                assert one[key] == other[key], (model, strategy, key, one, other)
        for one, other in zip(
            of_kind(ours, "evaluation"), of_kind(theirs, "evaluation"), strict=True
        ):
            for key in ("val_loss", "val_accuracy"):
                assert one[key] == other[key], (model, strategy, key, one, other)
            assert one["at_the_end"] == one["val_accuracy"]
            assert one["smallest"] == 0
        for one, other in zip(ours_end, theirs_end, strict=True):
            for name, tensor in other.items():
                assert np.array_equal(one[f"net.{name}"], tensor), (model, strategy, name)


def check_logged(site: Site, strategy: str) -> None:
    """See that what is logged is of all samples, once."""
    records, _ = run(site, f"logged-{strategy}", "Hooked", strategy)
    if records is None:
        return
    last = site.topology.world_size - 1
    sizes = [BATCH] * (ROWS // BATCH) + [ROWS % BATCH]
    for number, record in enumerate(steps(records)):
        logged, size = record["logged"], sizes[number % len(sizes)]
        assert abs(logged["train_loss_step"] - record["loss"]) < 1e-6
        assert logged["seen_step"] == size
        assert logged["first_step"] == 0
        assert logged["index_step"] == number % len(sizes)
        assert logged["last"] == (last if size > last else size - 1)
        if strategy == "ddp":
            assert abs(logged["hooked_norm"] - record["grad_norm"]) < 1e-5
    for number, record in enumerate(of_kind(records, "epoch")):
        assert record["seen"] == record["seen_epoch"] == ROWS
        mine = steps(records)[number * len(sizes) :][: len(sizes)]
        mean = sum(each["loss"] * size for each, size in zip(mine, sizes, strict=True)) / ROWS
        assert abs(record["train_loss_epoch"] - mean) < 1e-6
        right = record["train_accuracy"] * ROWS  # in float32, as torchmetrics divides
        assert abs(right - round(right)) < 1e-4


def check_task(site: Site, strategy: str) -> None:
    """See that a task's own parameters are trained and gone on with, and what it logs is whole."""
    ours, ours_end = run(site, f"own-{strategy}", "Net", strategy, "Uncertain")
    theirs, theirs_end = run(site, f"held-{strategy}", "Holding", strategy, "OfModel")
    parts = config_of(site, f"parts-{strategy}", "Net", strategy, "Uncertain")
    for epochs in (1, 2):
        training = dataclasses.replace(parts.training, max_epochs=epochs)
        assert site.train(dataclasses.replace(parts, training=training)) == ExitCode.DONE
    if ours is None:
        return
    again = site.metrics(f"parts-{strategy}")
    for one, other, third in zip(steps(ours), steps(theirs), steps(again), strict=True):
        assert one["loss"] == third["loss"], (strategy, one, third)
        assert abs(one["loss"] - other["loss"]) < 1e-5, (strategy, one, other)
        for name, value in one["logged"].items():
            assert abs(value - other["logged"][name]) < 1e-5, (strategy, name, one, other)
        assert one["logged"].keys() == {"entropy_step", "first"}
    assert [record["seen"] for record in of_kind(ours, "epoch")] == [ROWS, ROWS]
    for one, other in zip(of_kind(ours, "epoch"), of_kind(again, "epoch"), strict=True):
        assert one["entropy"] == other["entropy"]
    evaluations = [of_kind(each, "evaluation")[-1]["loss"] for each in (ours, theirs)]
    assert abs(evaluations[0] - evaluations[1]) < 1e-5
    own = {name: item for part in ours_end for name, item in part.items()}
    assert abs(float(own["hpctrain_task.scale"]) - 1.0) > 1e-3
    held = {name: item for part in theirs_end for name, item in part.items()}
    assert np.abs(own["hpctrain_task.scale"] - held["scale"]) < 1e-5


def check_names(site: Site) -> None:
    """See that a name that one rank alone logs is told, on all ranks."""
    try:
        site.train(config_of(site, "half", "Half", "ddp", None))
    except TrainingError as error:
        assert 'self.log("mine"): rank 0' in str(error), error
    else:
        raise AssertionError("nobody was told")


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with hurried(), control_plane() as (topology, communicator), guard(topology) as job_guard:
        site = Site(folder, topology, communicator, job_guard)
        if topology.is_rank_zero and not (folder / "rows").exists():
            draw = np.random.default_rng(0)
            x = draw.standard_normal((ROWS, FEATURES)).astype(np.float32)
            with Writer(folder / "rows") as writer:
                writer.extend({"x": x, "y": draw.integers(CLASSES, size=ROWS)})
        communicator.barrier()
        passed = 0
        for strategy in resume_cases.STRATEGIES:
            check_same(site, strategy)
            check_logged(site, strategy)
            check_task(site, strategy)
            passed += 3
        if topology.world_size > 1:
            check_names(site)
            passed += 1
        if topology.is_rank_zero:
            print("passed", passed, flush=True)


if __name__ == "__main__":
    main()
