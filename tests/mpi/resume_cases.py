"""Run on every rank: jobs that are stopped, fail and go on, one after the other in one process.

Arguments: a folder, and cases as JSON lines of "precision", "scheduler", "stop", "strategy",
"model", "optimizer" and "data". For each, a run that nobody disturbs and one that is stopped or
fails at the named point and is started again have to leave the same metrics and the same
checkpoint, bit for bit: parameters, optimizer, generators of every rank.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tomli_w
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from hpctrain.batch.stop import StopAgreement
from hpctrain.checkpoint import manager
from hpctrain.config import Config
from hpctrain.config.toml import parse
from hpctrain.config.validate import validate
from hpctrain.data import Writer
from hpctrain.data.loading.loader import Batch
from hpctrain.errors import ExitCode, HpctrainError, TrainingError
from hpctrain.launch.failure import Guard, guard
from hpctrain.launch.process_group import control_plane, gathering
from hpctrain.topology import Communicator, Topology
from hpctrain.training.job import train
from hpctrain.training.run import Run
from hpctrain.training.step import TrainStep

ROWS, BATCH, FEATURES = 70, 16, 6
EPOCH_STEPS, EPOCHS = 5, 3  # the last batch of an epoch is smaller
CLOCKED = {"seconds", "samples_per_second", "wall_time"}
OF_THE_RUN = {"meta.json", "config.toml"}  # its name is in them

SCHEDULERS: dict[str, dict[str, Any]] = {
    "constant": {},
    "cosine": {"warmup_steps": 3},
    "plateau": {"patience": 0, "threshold": 0.5},
    "one_cycle": {"unit": "samples", "rise": 0.4},
    "chained": {
        "parts": [{"use": "constant", "until": 1}, {"use": "linear"}],
        "unit": "epochs",
        "warmup_epochs": 0.5,
    },
}

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")
STRATEGIES = ("ddp", "fsdp")
MODELS = {
    "statistics": "Noisy",
    "buffers assigned anew": "AssignsAnew",
    "complex parameters": "Complex",
    "a module": "Logged",
}
OPTIMIZERS = {
    "slots": "adamw",
    "group state": "resume_cases:GroupState",
    "lists": "resume_cases:ListState",
    "two sets of weights": "resume_cases:TwoWeights",
}
DATA = ("files", "a Dataset", "drawn by weights")
STOPS = ("inside an epoch", "in an evaluation", "before a save", "in a save")


class Plain(nn.Module):
    """Several layers, and with small buckets several of these."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 24)
        self.norm: nn.Module = nn.Identity()
        self.drop: nn.Module = nn.Identity()
        self.second = nn.Linear(24, 16)
        self.third = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.norm(self.first(x[:, -FEATURES:])).relu())
        output: Tensor = self.third(self.second(hidden).relu())
        return output


class Centred(nn.Module):
    """A batch norm in small: it has statistics that differ over ranks, and takes a single row."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0).to(self.mean.dtype), 0.3)
        return x - self.mean


class Noisy(Plain):
    """Every rank has its own statistics, and draws its own numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = Centred(), nn.Dropout(0.3)


class Anew(Centred):
    """Assigns its statistics anew, so that they are another tensor after every pass."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.7 * self.mean + 0.3 * x.detach().mean(0).to(self.mean.dtype)
        return x - self.mean


class Logged(Noisy):
    """A module of its own: steps, an optimizer, metrics that add up over an epoch."""

    log: Any

    def __init__(self) -> None:
        import torchmetrics

        super().__init__()
        self.right = torchmetrics.Accuracy("multiclass", num_classes=5)
        self.valid = torchmetrics.Accuracy("multiclass", num_classes=5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, y = self(batch["x"]).float(), batch["y"].long()
        loss = nn.functional.cross_entropy(logits, y)
        self.right.update(logits, y)
        self.log("mean", loss, on_step=True, on_epoch=True)
        self.log("right", self.right, on_step=False, on_epoch=True)
        self.log("largest", loss, on_epoch=True, reduce_fx="max")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.valid.update(self(batch["x"]).float(), batch["y"].long())
        self.log("accuracy", self.valid)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.7)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Turned(nn.Module):
    """Multiplies pairs of numbers with complex parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(12, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.to(self.turn.real.dtype).reshape(len(x), 12, 2)
        turned = torch.view_as_complex(pairs) * self.turn
        return torch.view_as_real(turned).reshape(x.shape).to(x.dtype)


class AssignsAnew(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = Anew(), nn.Dropout(0.3)


class Complex(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = Turned(), nn.Dropout(0.3)


class GroupState(torch.optim.Optimizer):
    """Has its step size in its groups, and finds it out; knows nothing else."""

    elementwise = True

    def __init__(self, params: Any, lr: float, d0: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "d": d0, "seen": [0, None]})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["d"] *= 1.2
            group["seen"][:] = [group["seen"][0] + 1, group["d"]]
            factor = group["lr"] * group["d"] / group["seen"][0]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(factor * self.direction(parameter))

    def direction(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad


class ListState(GroupState):
    """Has a list of moments for each parameter, a number, and nothing in a slot of its own."""

    def direction(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["steps"] = 0
            state["moments"] = [torch.zeros_like(parameter) for _ in range(2)]
        state["steps"] += 1
        for moment, decay in zip(state["moments"], (0.5, 0.9), strict=True):
            moment.mul_(decay).add_(parameter.grad, alpha=1 - decay)
        first, second = state["moments"]
        return first / (1 - 0.5 ** state["steps"]) + second


class TwoWeights(GroupState):
    """Trains with other weights than it evaluates with."""

    def direction(self, parameter: Tensor) -> Tensor:
        slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
        slow.lerp_(parameter, 0.3)
        return super().direction(parameter)

    @torch.no_grad()
    def eval(self) -> None:
        self._move(0.7)

    @torch.no_grad()
    def train(self) -> None:
        self._move(1 - 1 / (1 - 0.7))

    def _move(self, weight: float) -> None:
        for parameter, state in self.state.items():
            if state:
                parameter.lerp_(state["slow"], weight)


class Augmented(Dataset[dict[str, Any]]):
    """Rows with noise from every generator that samples may draw from."""

    def __init__(self, *, noise: bool) -> None:
        self.x, self.y = rows()
        self.noise = noise

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.from_numpy(self.x[index])
        if self.noise:
            noise = np.random.standard_normal(FEATURES + 1)  # noqa: NPY002 - as most people do
            noise *= random.random()
            x = x + 0.1 * torch.randn(FEATURES + 1) + torch.from_numpy(noise.astype(np.float32))
        return {"x": x, "y": self.y[index]}


def augmented(weighted: bool = False) -> Any:
    """Return data to train on as other people bring them."""
    dataset = Augmented(noise=True)
    if not weighted:
        return dataset
    weights = torch.linspace(0.1, 1, ROWS)
    sampler = WeightedRandomSampler(weights.tolist(), ROWS)
    return DataLoader(dataset, batch_size=BATCH, sampler=sampler)


def plain_rows() -> Augmented:
    """Return data to evaluate on."""
    return Augmented(noise=False)


def rows() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return x, whose first column says which sample it is, and y."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((ROWS, FEATURES + 1)).astype(np.float32)
    x[:, 0] = np.arange(ROWS)
    return x, draw.integers(5, size=ROWS)


class Site:
    """Where the jobs of this process run."""

    def __init__(
        self, folder: Path, topology: Topology, communicator: Communicator, job_guard: Guard
    ) -> None:
        self.folder, self.topology, self.communicator = folder, topology, communicator
        self.job_guard = job_guard
        if topology.is_rank_zero and not (folder / "data").exists():
            x, y = rows()
            with Writer(folder / "data") as writer:
                writer.extend({"x": x, "y": y})
        communicator.barrier()

    def job(
        self, name: str, *, signals: Callable[[], int] = lambda: 0, **settings: Any
    ) -> ExitCode:
        """Run one job to its end. Collective: all ranks."""
        text = tomli_w.dumps(config_of(name, self.folder, **settings))
        config, mistakes = validate(parse(text, "run.toml"))
        assert config is not None, mistakes
        return self.train(config, signals)

    def train(self, config: Config, signals: Callable[[], int] = lambda: 0) -> ExitCode:
        """Run a job of this config to its end. Collective: all ranks."""

        class Signals:
            value = property(lambda _: signals())

        flag: Any = Signals()
        with gathering(self.topology, self.communicator, config.launch, self.job_guard) as meeting:
            return train(
                config,
                self.topology,
                self.communicator,
                meeting=meeting,
                signals=flag,
                guard=self.job_guard,
                command=["run.toml"],
            )

    def stop_at(self, step: int) -> Callable[[], int]:
        """Return signals that ask for a stop once `step` is done."""
        self.job_guard.pulse.step_done(0)
        return lambda: int(self.job_guard.pulse.step >= step)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def metrics(self, name: str) -> list[dict[str, Any]]:
        lines = (self.run(name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [
            {key: value for key, value in record.items() if key not in CLOCKED}
            for record in map(json.loads, lines)
        ]


def config_of(
    name: str,
    folder: Path,
    *,
    precision: str = "32-true",
    strategy: str = "ddp",
    scheduler: str = "constant",
    optimizer: str = "slots",
    model: str = "statistics",
    data: str = "files",
    epochs: int = EPOCHS,
) -> dict[str, Any]:
    """Return the tables of a config."""
    tables = {
        "run": {"name": name, "directory": f"{folder}/runs"},
        "model": {"use": f"resume_cases:{MODELS.get(model, model)}"},
        "task": {"use": "classification", "inputs": ["x"], "target": "y"},
        "data": {
            "train": f"{folder}/data",
            "validation": f"{folder}/data",
            "global_batch_size": BATCH,
            "micro_batch_size": 3,  # several passes a step, at every number of ranks
            "lanes": 16,
        },
        "optimizer": {"use": OPTIMIZERS.get(optimizer, optimizer), "lr": 0.01},
        "scheduler": {"use": scheduler, **SCHEDULERS[scheduler]},
        "checkpoint": {
            "every_epochs": 1,
            "every_steps": 3,
            "keep_last": 2,
            "keep_best": "accuracy",
        },
        "logging": {"every_steps": 1, "progress": "none"},
        "training": {
            "max_epochs": epochs,
            "precision": precision,
            "strategy": strategy,
            "clip_norm": 1.0,
            "evaluate_every_steps": 4,
            "bucket_mb": 0.0005,
            **({} if optimizer == "two sets of weights" else {"ema_decay": 0.9}),
        },
    }
    if data != "files":
        tables["data"] |= {
            "train": "resume_cases:augmented",
            "train_arguments": {"weighted": data == "drawn by weights"},
            "validation": "resume_cases:plain_rows",
            "workers": 0,
        }
    if model == "a module":  # which has these itself
        del tables["task"], tables["optimizer"], tables["scheduler"]
    return tables


@contextmanager
def failing(where: str) -> Iterator[None]:
    """Make jobs fail: at the end of the second epoch or while a checkpoint is written."""
    save, write_files = Run.save, manager.write_files

    def no_save(self: Run, place: Any, metrics: Any) -> None:
        if place.step >= 2 * EPOCH_STEPS:  # the evaluation of this step is done
            raise TrainingError("the end, before a save", everywhere=True)
        save(self, place, metrics)

    def half_a_save(folder: Path, snapshot: Any, *others: Any) -> Any:
        if snapshot.step >= 2 * EPOCH_STEPS:
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError("the end, in a save")
        return write_files(folder, snapshot, *others)

    if where == "before a save":
        Run.save = no_save  # type: ignore[method-assign]
    else:
        manager.write_files = half_a_save
    try:
        yield
    finally:
        Run.save = save  # type: ignore[method-assign]
        manager.write_files = write_files


def check(site: Site, stop: str, **settings: Any) -> str | None:
    """Return what of a run differs that was stopped and went on. Collective: all ranks."""
    if site.topology.is_rank_zero:
        shutil.rmtree(site.run("parts"), ignore_errors=True)
    site.communicator.barrier()
    if stop in ("inside an epoch", "in an evaluation"):
        # Posted there, a stop is agreed at the next boundary: that of the next step, or of the
        # first batch that is evaluated behind it.
        step = EPOCH_STEPS + 1 if stop == "inside an epoch" else 2 * EPOCH_STEPS
        code = site.job("parts", signals=site.stop_at(step), **settings)
        if code != ExitCode.STOPPED:
            return f"ended with {code!r} where it was asked to stop"
    else:
        try:
            with failing(stop):
                site.job("parts", **settings)
        except HpctrainError as error:
            if "the end" not in str(error):
                raise
        else:
            return "did not fail where it had to"
    code = site.job("parts", **settings)
    difference = None
    if site.topology.is_rank_zero:
        difference = compare(site) if code == ExitCode.DONE else f"ended with {code!r}"
    return site.communicator.broadcast(difference)


def compare(site: Site) -> str | None:
    ours, whole = site.metrics("parts"), site.metrics("whole")
    if ours != whole:
        first = next((a for a, b in zip(ours, whole, strict=False) if a != b), "their number")
        return f"the metrics differ: {first}"
    name = f"checkpoints/step-{EPOCHS * EPOCH_STEPS:08d}"
    folders = [site.run(run) / name for run in ("parts", "whole")]
    here, there = ({path.name for path in folder.iterdir()} - OF_THE_RUN for folder in folders)
    if here != there or len(here) < 3:
        return f"the files differ: {sorted(here)}, {sorted(there)}"
    for file in sorted(here):
        if (folders[0] / file).read_bytes() != (folders[1] / file).read_bytes():
            return f"{file} differs"
    return None


def grid(site: Site, cases: Sequence[dict[str, str]]) -> None:
    """Check cases; the undisturbed run is made once for all stops."""
    made: dict[str, str] | None = None
    for case in cases:
        settings = {key: value for key, value in case.items() if key != "stop"}
        if settings != made:
            if site.topology.is_rank_zero:
                shutil.rmtree(site.run("whole"), ignore_errors=True)
            site.communicator.barrier()
            assert site.job("whole", **settings) == ExitCode.DONE
            made = settings
        difference = check(site, case["stop"], **settings)
        if site.topology.is_rank_zero:
            print("case", json.dumps({**case, "difference": difference}), flush=True)


def elastic(site: Site, last_step: int) -> None:
    """Train up to a step and tell of every step which samples it had, over all ranks."""
    step_of, call = {"now": 0}, TrainStep.__call__

    def recording(self: TrainStep, batch: Batch, lr: float) -> None:
        rows = batch.fields["x"][: batch.size, 0].long().tolist()
        everyone = site.communicator.all_gather(rows)
        names = sorted(row for rows in everyone for row in rows)
        digest = hashlib.blake2b(repr(names).encode(), digest_size=8).hexdigest()
        if site.topology.is_rank_zero:
            shares = sorted({len(rows) for rows in everyone})
            print("batch", json.dumps([batch.epoch, batch.start, digest, shares]), flush=True)
        call(self, batch, lr)
        step_of["now"] += 1

    TrainStep.__call__ = recording  # type: ignore[method-assign]
    settings = {"precision": "64-true", "model": "Plain", "optimizer": "sgd", "epochs": 4}
    try:
        code = site.job("elastic", signals=site.stop_at(last_step), **settings)
    finally:
        TrainStep.__call__ = call  # type: ignore[method-assign]
    if site.topology.is_rank_zero:
        print("ended", int(code), flush=True)


@contextmanager
def hurried() -> Iterator[None]:
    """Have every boundary be an agreement, and saves wait for nothing."""
    defaults: Any = StopAgreement.__init__.__kwdefaults__
    before = manager._PAUSE_SECONDS, defaults["every_seconds"]
    manager._PAUSE_SECONDS = defaults["every_seconds"] = 0.0
    try:
        yield
    finally:
        manager._PAUSE_SECONDS, defaults["every_seconds"] = before


def main() -> None:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    with hurried(), control_plane() as (topology, communicator), guard(topology) as job_guard:
        site = Site(folder, topology, communicator, job_guard)
        if what == "elastic":
            elastic(site, int(sys.argv[3]))
        else:
            grid(site, [json.loads(case) for case in sys.argv[2:]])


if __name__ == "__main__":
    main()
