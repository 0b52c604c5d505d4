"""Groups of parameters: chosen by name, in the optimizer as asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpctrain.checkpoint.optimizer_state import OptimizerState
from hpctrain.config import load, to_toml
from hpctrain.config.registry import BUILTINS, OWN, resolve
from hpctrain.config.schema import ComponentSection, ParameterGroup
from hpctrain.errors import ConfigError
from hpctrain.models.convnet import ConvNet
from hpctrain.training.optim.optimizer import build_optimizer, set_learning_rate


def model() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(1, 3, widths=[8])


def values(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay of every parameter."""
    names = {item: name for name, item in net.named_parameters()}
    return {
        names[item]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for item in group["params"]
    }


def test_the_first_pattern_that_fits_counts() -> None:
    net = model()
    groups = [
        ParameterGroup(pattern="features.0.*", lr_factor=0.5),
        ParameterGroup(pattern="features.*", lr_factor=0.0, weight_decay=0.3),
        ParameterGroup(pattern="*.bias", weight_decay=0.2),
    ]
    optimizer = build_optimizer(
        torch.optim.AdamW,
        net,
        0.1,
        {"weight_decay": 0.01},
        groups=groups,
        decay_norms_and_biases=False,
    )
    set_learning_rate(optimizer, 0.4)
    found = values(optimizer, net)
    assert found["features.0.0.weight"] == (0.2, 0.01)
    assert found["features.0.1.weight"] == (0.2, 0.0)  # a scale of a normalisation
    assert found["features.1.0.weight"] == (0.0, 0.3)
    assert found["features.1.1.bias"] == (0.0, 0.3)  # asked for by name
    assert found["classifier.weight"] == (0.4, 0.01)
    assert found["classifier.bias"] == (0.4, 0.2)
    assert len(found) == len(list(net.parameters()))


def test_a_factor_of_nothing_leaves_parameters_as_they_are() -> None:
    net = model()
    frozen = [ParameterGroup(pattern="features.*", lr_factor=0.0)]
    optimizer = build_optimizer(torch.optim.AdamW, net, 0.1, {}, groups=frozen)
    before = {name: item.clone() for name, item in net.state_dict().items()}
    net(torch.randn(2, 1, 8, 8)).square().sum().backward()
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    for name, item in net.state_dict().items():
        assert torch.equal(item, before[name]) == name.startswith("features")


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([{"pattern": "feature.*"}], {}, "fits no parameter"),
        ([{"pattern": "*"}, {"pattern": "classifier.*"}], {}, "no pattern before it has taken"),
        ([{"pattern": "clasifier.bias"}], {}, 'did you mean "classifier.bias"'),
    ],
)
def test_patterns_that_fit_nothing(
    groups: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    chosen = [ParameterGroup(**group) for group in groups]
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        build_optimizer(torch.optim.AdamW, model(), 0.1, {}, groups=chosen, **options)


def test_an_optimizer_without_weight_decay() -> None:
    class Plain(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        def step(self, closure: Any = None) -> None: ...  # type: ignore[override]

    assert len(build_optimizer(Plain, model(), 0.1, {}).param_groups) == 1
    with pytest.raises(ConfigError, match="Plain has no weight decay"):
        build_optimizer(Plain, model(), 0.1, {}, decay_norms_and_biases=False)


@pytest.mark.parametrize("use", sorted(BUILTINS["optimizer"].keys() - {OWN}))
def test_every_optimizer_trains_and_goes_on_from_its_state(use: str) -> None:
    """The state goes to tensors and back; what follows is equal bit for bit."""

    def train(steps: range, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            net(torch.randn(4, 1, 8, 8, generator=generator)).square().sum().backward()
            optimizer.step()

    target = resolve("optimizer", ComponentSection(use=use))
    groups = [ParameterGroup(pattern="classifier.*", lr_factor=2.0)]
    whole, resumed = model(), model()
    first = build_optimizer(target, whole, 1e-3, {}, groups=groups)
    train(range(3), whole, first)
    second = build_optimizer(target, resumed, 1e-3, {}, groups=groups)
    resumed.load_state_dict(whole.state_dict())
    OptimizerState(second).restore(resumed, OptimizerState(first).capture(whole))
    train(range(3, 6), whole, first)
    train(range(3, 6), resumed, second)
    for name, item in whole.state_dict().items():
        assert torch.equal(item, resumed.state_dict()[name]), name
        assert not torch.equal(item, model().state_dict()[name]), name


CONFIG = """
[run]
name = "test"
[model]
use = "mlp"
[task]
use = "regression"
inputs = ["x"]
[data]
train = "."
global_batch_size = 8
[optimizer]
use = "sgd"
lr = 0.1
[[optimizer.groups]]
pattern = "*.bias"
{line}
[training]
max_steps = 1
"""


def read(tmp_path: Path, line: str) -> Any:
    path = tmp_path / "c.toml"
    path.write_text(CONFIG.format(line=line), encoding="utf-8")
    return load(str(path))


def test_groups_of_the_config_round_trip(tmp_path: Path) -> None:
    config = read(tmp_path, "lr_factor = 2\n[[optimizer.groups]]\npattern = '*'\nweight_decay = 1")
    assert config.optimizer.groups == (
        ParameterGroup(pattern="*.bias", lr_factor=2.0),
        ParameterGroup(pattern="*", weight_decay=1.0),
    )
    path = tmp_path / "again.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load(str(path)) == config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr_facto = 2", "lr_facto = 2: unknown key; did you mean groups.lr_factor?"),
        ("lr_factor = -1", "optimizer.groups.lr_factor = -1: expected a number from 0"),
        ("[[optimizer.groups]]\nlr_factor = 1", "optimizer.groups.pattern: missing; expected a"),
        ("[optimizer.groups2]", "has no"),
    ],
)
def test_mistakes_in_groups_are_told(tmp_path: Path, line: str, message: str) -> None:
    if message == "has no":  # a further key of a component is its argument: known later
        assert read(tmp_path, line).optimizer.arguments == {"groups2": {}}
        return
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, line)
    assert message in str(raised.value)
    assert "line 1" in str(raised.value)
