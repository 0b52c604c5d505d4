"""What `configure_optimizers` may return, and what is refused before the first step."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from helpers import optimizer_zoo as zoo
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers

from hpctrain.errors import ConfigError, TrainingError
from hpctrain.training.modules.optimizers import Configured, configure, tried
from hpctrain.training.optim.optimizer import refuses_on_device
from hpctrain.training.optim.trial import TriedOptimizer

Configuration = Callable[["Net"], Any]


class Net(nn.Module):
    """Not Lightning's: only what it has counts."""

    def __init__(self, configuration: Configuration) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.other = torch.zeros(2, requires_grad=True)
        self.configuration = configuration

    def configure_optimizers(self) -> Any:
        return self.configuration(self)


def made(configuration: Configuration) -> Configured:
    torch.manual_seed(0)
    module = Net(configuration)
    return configure(module, module)


def sgd(module: Net) -> SGD:
    return SGD(module.parameters(), lr=0.1)


def step_lr(optimizer: Optimizer) -> schedulers.StepLR:
    return schedulers.StepLR(optimizer, 2)


FORMS: dict[str, Configuration] = {
    "optimizer": sgd,
    "list": lambda module: [sgd(module)],
    "tuple": lambda module: (sgd(module),),
    "dict": lambda module: {"optimizer": sgd(module)},
    "list of a dict": lambda module: [{"optimizer": sgd(module)}],
    "two lists": lambda module: ([one := sgd(module)], [step_lr(one)]),
    "a list and a scheduler": lambda module: ([one := sgd(module)], step_lr(one)),
    "list of lists": lambda module: [[one := sgd(module)], [{"scheduler": step_lr(one)}]],
    "no schedulers": lambda module: ([sgd(module)], []),
    "dict with scheduler": lambda module: {
        "optimizer": (one := sgd(module)),
        "lr_scheduler": step_lr(one),
    },
    "dict with dict": lambda module: {
        "optimizer": (one := sgd(module)),
        "lr_scheduler": {
            "scheduler": step_lr(one),
            "interval": "step",
            "frequency": 3,
            "name": "mine",
        },
    },
    "dicts": lambda module: [{"optimizer": (one := sgd(module)), "lr_scheduler": step_lr(one)}],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_lightning_makes_of_it(form: str) -> None:
    from lightning.pytorch.core import optimizer as theirs

    here = made(FORMS[form])
    optimizers, listed, monitor = theirs._configure_optimizers(FORMS[form](Net(sgd)))
    there = theirs._configure_schedulers_automatic_opt(listed, monitor)
    assert len(optimizers) == 1
    assert [
        (use.interval, use.frequency, use.name, use.monitor, use.reduce_on_plateau, use.strict)
        for use in here.uses
    ] == [
        (use.interval, use.frequency, use.name, use.monitor, use.reduce_on_plateau, use.strict)
        for use in there
    ]
    assert len(here.notes) == 1


REFUSED: dict[str, tuple[Configuration, str]] = {
    "none": (lambda module: None, "returned None"),
    "several": (lambda module: [sgd(module), sgd(module)], "2 optimizers.*hpctrain.connect"),
    "several dicts": (
        lambda module: [{"optimizer": sgd(module)}, {"optimizer": sgd(module)}],
        "2 optimizers",
    ),
    "several and schedulers": (
        lambda module: ([sgd(module), sgd(module)], []),
        "2 optimizers",
    ),
    "nothing": (lambda module: [], "0 optimizers"),
    "closure": (lambda module: LBFGS(module.parameters()), "closure.*hpctrain.connect"),
    "number": (lambda module: 0.1, "returned a float: it returns an optimizer"),
    "mixed": (lambda module: (sgd(module), {}), "a tuple of SGD, dict"),
    "dict of nothing": (lambda module: {"lr_scheduler": None}, 'without "optimizer"'),
    "no torch": (lambda module: {"optimizer": object()}, "a object, which is not"),
    "no scheduler": (
        lambda module: {"optimizer": sgd(module), "lr_scheduler": {"interval": "step"}},
        'no key "scheduler"',
    ),
    "interval": (
        lambda module: {
            "optimizer": (one := sgd(module)),
            "lr_scheduler": {"scheduler": step_lr(one), "interval": "batch"},
        },
        'interval=\'batch\': expected "step" or "epoch"',
    ),
    "frequency": (
        lambda module: {
            "optimizer": (one := sgd(module)),
            "lr_scheduler": {"scheduler": step_lr(one), "frequency": 0},
        },
        "frequency=0",
    ),
    "plateau": (
        lambda module: (
            [one := sgd(module)],
            [schedulers.ReduceLROnPlateau(one)],
        ),
        'ReduceLROnPlateau needs the name of a metric.*"monitor"',
    ),
    "no state": (
        lambda module: {"optimizer": sgd(module), "lr_scheduler": object()},
        "no state_dict and load_state_dict",
    ),
    "not torch's": (
        lambda module: {"optimizer": sgd(module), "lr_scheduler": nn.Linear(1, 1)},
        r"lr_scheduler_step\(self, scheduler, metric\)",
    ),
    "another's": (
        lambda module: ([sgd(module)], [step_lr(sgd(module))]),
        "StepLR is of another optimizer",
    ),
    "no parameter": (
        lambda module: SGD([*module.parameters(), module.other]),
        r"updates 1 tensor of shape \(2,\) that no attribute",
    ),
    "frozen": (
        lambda module: SGD([item.requires_grad_(False) for item in module.parameters()]),
        "no parameter of the optimizer requires a gradient",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_file_and_line(case: str) -> None:
    configuration, message = REFUSED[case]
    with pytest.raises(
        ConfigError,
        match=rf"(?s)test_module_optimizers.py, line \d+, Net.configure_optimizers.*{message}",
    ):
        made(configuration)


def test_what_is_passed_over_is_said() -> None:
    notes = made(
        lambda module: {
            "optimizer": (one := SGD([module.layer.weight], lr=0.1)),
            "lr_scheduler": {
                "scheduler": schedulers.OneCycleLR(one, 0.1, total_steps=9),
                "freq": 2,
            },
            "scheduler": None,
        }
    ).notes
    assert notes[0] == "configure_optimizers: SGD, OneCycleLR every epoch"
    told = [note.partition("Net.configure_optimizers: ")[2] for note in notes[1:]]
    assert told == [
        "scheduler not known here, nor in Lightning, and not used",
        "freq not known here, nor in Lightning, and not used",
        'OneCycleLR is stepped once an epoch; a cycle of steps has interval="step"',
        "the optimizer leaves out layer.bias: they are frozen",
    ]


def test_a_scheduler_of_ones_own_has_lightnings_hook() -> None:
    class Own:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    class WithHook(Net):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step(epoch=1)

    class Lightnings(L.LightningModule):
        layer: nn.Linear

        def configure_optimizers(self) -> Any:
            return own(self)  # type: ignore[arg-type]

    def own(module: Net) -> Any:
        return [one := sgd(module)], [Own(one)]

    module = WithHook(own)
    assert isinstance(configure(module, module).uses[0].scheduler, Own)
    theirs = Lightnings()
    theirs.layer = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="not one of torch's LR schedulers"):
        configure(theirs, theirs)


CHOICES = {
    SGD: {"lr": 0.1, "momentum": 0.9},
    Adam: {"lr": 0.1},
    AdamW: {"lr": 0.1},
    Adagrad: {"lr": 0.1},
}


@pytest.mark.parametrize("kind", CHOICES)
def test_an_optimizer_becomes_fused_before_its_first_step(kind: type[Optimizer]) -> None:
    def trained(optimizer: Optimizer, module: nn.Module) -> list[Tensor]:
        for step in range(3):
            for number, item in enumerate(module.parameters()):
                generator = torch.Generator().manual_seed(100 * step + number)
                item.grad = torch.randn(item.shape, generator=generator)
            optimizer.found_inf = torch.tensor(float(step == 1))  # type: ignore[attr-defined]
            optimizer.step()
        return [item.detach().clone() for item in module.parameters()]

    torch.manual_seed(0)
    module = Net(lambda module: kind(module.parameters(), **CHOICES[kind]))  # type: ignore[call-arg]
    optimizer = configure(module, module).optimizer
    assert refuses_on_device(optimizer)
    torch.manual_seed(0)
    reference = Net(sgd)
    fused = kind(reference.parameters(), **CHOICES[kind], fused=True)  # type: ignore[call-arg]
    pairs = zip(trained(optimizer, module), trained(fused, reference), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


class OwnStep(SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()


@pytest.mark.parametrize(
    "configuration",
    [
        lambda module: AdamW(module.parameters(), foreach=True),
        lambda module: AdamW(module.parameters(), fused=False),
        lambda module: AdamW(module.parameters(), amsgrad=True, differentiable=True),
        lambda module: SGD(module.parameters(), momentum=0.9, dampening=0.1),
        lambda module: torch.optim.RMSprop(module.parameters()),
        lambda module: OwnStep(module.parameters()),
        lambda module: SGD(module.half().parameters()),
    ],
    ids=["foreach", "unfused", "differentiable", "dampened", "unknown", "own step", "half"],
)
def test_an_optimizer_stays_as_it_is_where_fused_kernels_are_not_known_right(
    configuration: Configuration,
) -> None:
    optimizer = made(configuration).optimizer
    assert not refuses_on_device(optimizer)
    assert not any(group.get("fused") for group in optimizer.param_groups)


class Needy(zoo.Plain):
    """In the manner of SAM: what it needs shows in its step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None


class Deaf(zoo.Plain):
    """Takes its rate where it was built."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-self.defaults["lr"])


class Choosy(zoo.Plain):
    """Cannot be built of its groups and their values alone."""

    def __init__(self, params: Any, secret: object, lr: float = 0.1) -> None:
        super().__init__(params, lr)


def shown(kind: Callable[..., Optimizer], *arguments: Any) -> TriedOptimizer | None:
    module = Net(lambda module: kind(module.parameters(), *arguments))
    return tried(configure(module, module), module, rows=False, ranks=2)


@pytest.mark.parametrize(
    "kind", [SGD, AdamW, Adagrad, zoo.ListState, zoo.GroupState, Prodigy, AdamWScheduleFree]
)
def test_an_optimizer_is_tried_on_stand_ins_of_its_groups(kind: type[Optimizer]) -> None:
    found = shown(kind)
    assert found is not None
    assert found.name == kind.__name__
    assert found.place.endswith("Net.configure_optimizers")


def test_what_the_trial_shows_is_told_with_the_place() -> None:
    with pytest.raises(ConfigError, match=r"optimizers.py, line \d+, .*Needy cannot take a step"):
        shown(Needy)
    assert shown(Choosy, object()) is None

    def configuration(module: Net) -> Any:
        optimizer = Deaf(module.parameters())
        return [optimizer], [step_lr(optimizer)]

    module = Net(configuration)
    with pytest.raises(ConfigError, match="StepLR: Deaf does not read `lr`"):
        tried(configure(module, module), module, rows=False, ranks=1)


def test_parameters_that_thaw_in_mid_run_are_named() -> None:
    module = Net(sgd)
    module.layer.bias.requires_grad_(False)
    trained = configure(module, module).trained
    assert trained is not None
    trained.check()
    module.layer.bias.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"layer\.bias: no longer frozen since the run began"):
        trained.check()
    module.layer.bias.requires_grad_(False)
    module.layer.weight.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"layer\.weight: frozen since the run began"):
        trained.check()


def test_groups_that_come_in_mid_run_are_named() -> None:
    module = Net(lambda module: SGD([module.layer.weight], lr=0.1))
    configured = configure(module, module)
    configured.optimizer.add_param_group({"params": [module.layer.bias]})
    assert configured.trained is not None
    with pytest.raises(TrainingError, match="has other groups of parameters than when it was made"):
        configured.trained.check()
