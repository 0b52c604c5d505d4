"""The LR schedulers of a module are stepped where Lightning steps them, and go on as they were."""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from helpers import lightning_itself
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from hpctrain.errors import CheckpointError, TrainingError
from hpctrain.training.model.registered_state import RegisteredState
from hpctrain.training.modules.lr_schedulers import ModuleSchedule
from hpctrain.training.modules.optimizers import configure
from hpctrain.training.position import Position, StopAt

EPOCHS, STEPS, BATCH = 3, 5, 2
SAMPLES = STEPS * BATCH - 1  # the last batch of an epoch is smaller
STOP_AT = StopAt(
    max_epochs=EPOCHS,
    max_steps=None,
    max_samples=None,
    epoch_samples=SAMPLES,
    global_batch_size=BATCH,
)
END = STOP_AT.end(Position())
VAL_LOSS = (3.0, 3.0, 2.0)

Configuration = Callable[[Any], Any]


class Net(L.LightningModule):
    def __init__(self, configuration: Configuration) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.head = nn.Linear(4, 1)
        self.configuration = configuration
        self.seen: list[list[float]] = []

    def configure_optimizers(self) -> Any:
        return self.configuration(self)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        optimizer = self.trainer.optimizers[0]
        self.seen.append([group["lr"] for group in optimizer.param_groups])
        loss: Tensor = (self.layer(batch[0]) + self.head(batch[0])).square().mean()
        self.log("train_loss", 7.0)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", VAL_LOSS[self.current_epoch])


def under_lightning(configuration: Configuration, kind: type[Net] = Net) -> list[list[float]]:
    module = kind(configuration)
    data = DataLoader(TensorDataset(torch.ones(SAMPLES, 4)), batch_size=BATCH)
    with lightning_itself.quietly():
        trainer = lightning_itself.trainer(
            max_epochs=EPOCHS, enable_checkpointing=False, num_sanity_val_steps=0
        )
        trainer.fit(module, data, data)
    return module.seen


class Here:
    """The same steps on the schedule of a run."""

    def __init__(self, configuration: Configuration, kind: type[Net] = Net) -> None:
        self.module = kind(configuration)
        configured = configure(self.module, self.module)
        self.optimizer = configured.optimizer
        own = "lr_scheduler_step" in vars(kind)
        self.schedule = ModuleSchedule(
            configured, STOP_AT, self.module.lr_scheduler_step if own else None
        )
        self.place = Position()
        self.saved = RegisteredState(torch.device("cpu"))
        self.saved.add("lr_schedulers", self.schedule.states)

    def run(self, steps: int) -> list[list[float]]:
        seen = []
        for _ in range(steps):
            self.schedule(self.place, END)
            seen.append([group["lr"] for group in self.optimizer.param_groups])
            size = min(BATCH, SAMPLES - self.place.position)
            epoch = self.place.epoch
            self.place = self.place.after(size, SAMPLES)
            self.schedule.advance(self.place)
            if self.place.position == 0:
                self.schedule.observe({"val_loss": VAL_LOSS[epoch], "train_loss": 7.0})
            self.schedule.advance_monitored(self.place)
        return seen

    def save(self) -> tuple[Any, dict[str, Tensor], Position]:
        tensors: dict[str, Tensor] = {}
        values = json.loads(json.dumps(self.saved.capture(tensors)))
        return values, {key: item.clone() for key, item in tensors.items()}, self.place

    def go_on(self, saved: tuple[Any, dict[str, Tensor], Position]) -> None:
        values, tensors, self.place = saved
        self.saved.restore(values, tensors)


def optimizer_of(module: Net, kind: type[Optimizer] = SGD, **arguments: Any) -> Optimizer:
    groups = [
        {"params": module.layer.parameters(), "lr": 0.4},
        {"params": module.head.parameters(), "name": "head"},
    ]
    return kind(groups, lr=0.1, **arguments)


def uses(
    make: Callable[[Optimizer], Any],
    optimizer: Callable[[Net], Optimizer] = optimizer_of,
    **how: Any,
) -> Configuration:
    """Return a `configure_optimizers` of one scheduler."""

    def configuration(module: Net) -> Mapping[str, Any]:
        made = optimizer(module)
        return {"optimizer": made, "lr_scheduler": {"scheduler": make(made), **how}}

    return configuration


class Halving:
    """A factor that is an object, as LambdaLR takes it too."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, count: int) -> float:
        self.calls += 1
        return 0.5**count


class WarmThen(schedulers.LRScheduler):
    """In the manner of gradual warm-ups: another scheduler is inside."""

    def __init__(self, optimizer: Optimizer, steps: int, after: Any) -> None:
        self.steps, self.after = steps, after
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        factor = (self.last_epoch + 1) / self.steps
        return [base * factor for base in self.base_lrs]

    def step(self, epoch: Any = None) -> None:
        if self.last_epoch < self.steps:
            super().step()
        else:
            self.after.step()


def sequential(optimizer: Optimizer) -> schedulers.SequentialLR:
    warm = schedulers.LinearLR(optimizer, 0.1, total_iters=3)
    return schedulers.SequentialLR(
        optimizer, [warm, schedulers.ExponentialLR(optimizer, 0.8)], milestones=[3]
    )


def cycle(optimizer: Optimizer, total: int = EPOCHS * STEPS) -> schedulers.OneCycleLR:
    return schedulers.OneCycleLR(optimizer, max_lr=[0.4, 0.1], total_steps=total)


def warmed(optimizer: Optimizer, steps: int) -> schedulers.LambdaLR:
    return schedulers.LambdaLR(optimizer, lambda count: min(1.0, (count + 1) / steps))


MAKERS: Mapping[str, Callable[[Optimizer], Any]] = {
    "step": lambda optimizer: schedulers.StepLR(optimizer, 2, gamma=0.3),
    "multistep": lambda optimizer: schedulers.MultiStepLR(optimizer, [2, 3, 3], gamma=0.3),
    "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 6),
    "restarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 2, 2),
    "lambda": lambda optimizer: schedulers.LambdaLR(optimizer, lambda count: 0.9**count),
    "lambdas": lambda optimizer: schedulers.LambdaLR(
        optimizer, [Halving(), partial(lambda by, count: 1 / (1 + by * count), 2.0)]
    ),
    "sequential": sequential,
    "chained": lambda optimizer: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(optimizer, 0.9), schedulers.ConstantLR(optimizer, 0.5, 2)]
    ),
    "inside": lambda optimizer: WarmThen(optimizer, 3, schedulers.ExponentialLR(optimizer, 0.7)),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "how",
    [{"interval": "step"}, {"interval": "epoch"}, {"interval": "step", "frequency": 2}],
    ids=["step", "epoch", "every-2"],
)
def test_every_step_has_lightnings_learning_rates(name: str, how: Mapping[str, Any]) -> None:
    configuration = uses(MAKERS[name], **how)
    assert Here(configuration).run(EPOCHS * STEPS) == under_lightning(configuration)


PLATEAUS: Mapping[str, Configuration] = {
    "epoch": uses(
        lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=0), monitor="val_loss"
    ),
    "every-2": uses(
        lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=0),
        monitor="val_loss",
        frequency=2,
    ),
    "training": uses(
        lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=0, mode="max"),
        monitor="train_loss",
    ),
    "not strict": uses(
        lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=0),
        monitor="elsewhere",
        strict=False,
    ),
    "top-level monitor": lambda module: {
        "optimizer": (made := optimizer_of(module)),
        "lr_scheduler": schedulers.ReduceLROnPlateau(made, patience=0),
        "monitor": "val_loss",
    },
    "beside another": lambda module: (
        [made := optimizer_of(module)],
        [
            {"scheduler": schedulers.ExponentialLR(made, 0.9), "interval": "step"},
            {"scheduler": schedulers.ReduceLROnPlateau(made, patience=0), "monitor": "val_loss"},
        ],
    ),
}


@pytest.mark.parametrize("name", PLATEAUS)
def test_a_plateau_has_lightnings_learning_rates(name: str) -> None:
    configuration = PLATEAUS[name]
    assert Here(configuration).run(EPOCHS * STEPS) == under_lightning(configuration)


class OwnStep(Net):
    """As a scheduler of timm is stepped."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:  # type: ignore[override]
        scheduler.step()
        scheduler.step()


def test_a_module_steps_its_schedulers_in_its_own_way() -> None:
    configuration = uses(MAKERS["sequential"], interval="step")
    theirs = under_lightning(configuration, OwnStep)
    assert Here(configuration, OwnStep).run(EPOCHS * STEPS) == theirs
    assert theirs != under_lightning(configuration)


def test_one_cycle_moves_the_momentum_too() -> None:
    configuration = uses(cycle, partial(optimizer_of, momentum=0.9), interval="step")
    here = Here(configuration)
    momenta = []
    for _ in range(EPOCHS * STEPS):
        momenta.append(here.optimizer.param_groups[0]["momentum"])
        here.run(1)
    assert min(momenta) == pytest.approx(0.85, abs=1e-3)
    assert momenta[0] == 0.95


RESUMED = {
    **{name: uses(make, interval="step") for name, make in MAKERS.items()},
    **PLATEAUS,
    "cycle": uses(cycle, partial(optimizer_of, kind=AdamW), interval="step"),
    "none": optimizer_of,
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_in_mid_epoch_bit_for_bit(name: str) -> None:
    whole = Here(RESUMED[name]).run(EPOCHS * STEPS)
    for stop in (3, STEPS, STEPS + 3):
        first = Here(RESUMED[name])
        before = first.run(stop)
        second = Here(RESUMED[name])
        second.go_on(first.save())
        assert before + second.run(EPOCHS * STEPS - stop) == whole
        assert second.schedule.states.notes == []


def test_rates_that_a_hook_has_set_are_kept() -> None:
    first = Here(optimizer_of)
    first.run(3)
    first.optimizer.param_groups[0]["lr"] = 0.03
    second = Here(optimizer_of)
    second.go_on(first.save())
    assert second.run(1) == [[0.03, 0.1]]


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (
            uses(lambda optimizer: schedulers.StepLR(optimizer, 2, gamma=0.3), interval="step"),
            uses(lambda optimizer: schedulers.StepLR(optimizer, 2, gamma=0.5), interval="step"),
            r"\(StepLR.gamma: 0.3 then, 0.5 now\): the new one holds; lr 0.00324 before and 0.025",
        ),
        (
            uses(MAKERS["cosine"], interval="step"),
            uses(MAKERS["sequential"], interval="step"),
            "CosineAnnealingLR then, SequentialLR now",
        ),
        (
            uses(cycle, interval="step"),
            uses(partial(cycle, total=40), interval="step"),
            "OneCycleLR.total_steps: 15 then, 40 now",
        ),
        (
            uses(MAKERS["cosine"], interval="epoch"),
            uses(MAKERS["cosine"], interval="step", frequency=2),
            "interval: 'epoch' then, 'step' now",
        ),
        (
            uses(partial(warmed, steps=4), interval="step"),
            uses(partial(warmed, steps=8), interval="step"),
            "LambdaLR: its functions are others, or compute with other numbers",
        ),
        (
            uses(MAKERS["lambda"], interval="step"),
            uses(MAKERS["lambda"], partial(optimizer_of, weight_decay=0.1), interval="step"),
            "",
        ),
    ],
    ids=["gamma", "class", "horizon", "interval", "function", "same"],
)
def test_another_schedule_holds_from_the_beginning(
    then: Configuration, now: Configuration, said: str
) -> None:
    first = Here(then)
    first.run(STEPS + 3)
    second = Here(now)
    second.go_on(first.save())
    assert second.run(STEPS) == Here(now).run(2 * STEPS + 3)[STEPS + 3 :]
    notes = "\n".join(second.schedule.states.notes)
    assert bool(notes) == bool(said)
    assert re.search(said, notes)


def test_learning_rates_come_from_the_code() -> None:
    first = Here(optimizer_of)
    first.run(3)
    second = Here(lambda module: optimizer_of(module, momentum=0.5))
    second.optimizer.param_groups[1]["lr"] = 0.1
    other = Here(lambda module: SGD(module.parameters(), lr=0.7))
    other.go_on(first.save())
    assert other.run(1) == [[0.7]]
    assert "lr: [0.4, 0.1] then, [0.7] now" in other.schedule.states.notes[0]


def test_a_plateau_keeps_what_it_has_seen_under_another_patience() -> None:
    def plateau(lr: float, patience: int) -> Configuration:
        return uses(
            lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=patience),
            lambda module: SGD(module.parameters(), lr=lr),
            monitor="val_loss",
        )

    first = Here(plateau(0.4, 0))
    first.run(2 * STEPS)
    second = Here(plateau(0.2, 5))
    second.go_on(first.save())
    scheduler = second.schedule.uses[0].scheduler
    assert (scheduler.best, scheduler.patience) == (3.0, 5)
    assert second.run(1)[0][0] == pytest.approx(0.02)
    assert "patience: 0 then, 5 now" in second.schedule.states.notes[0]


def test_groups_that_differ_are_told() -> None:
    here = Here(uses(MAKERS["step"], interval="step"))
    here.run(3)
    assert here.schedule.rates() == {"lr/head": pytest.approx(0.03)}


def test_a_metric_that_nobody_logs_ends_the_run_with_the_place() -> None:
    here = Here(uses(schedulers.ReduceLROnPlateau, monitor="val_los"))
    with pytest.raises(
        TrainingError, match=r'test_module_schedulers.py, line \d+.*did you mean "?val_loss'
    ):
        here.run(STEPS)


class Hoarder(schedulers.ExponentialLR):
    def __init__(self, optimizer: Optimizer) -> None:
        self.seen = object()
        super().__init__(optimizer, 0.9)


def test_what_cannot_be_saved_is_named_before_the_first_step() -> None:
    with pytest.raises(CheckpointError, match=r"Hoarder.seen is a builtins.object"):
        Here(uses(Hoarder))
