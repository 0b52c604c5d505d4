"""How a run begins: weights from elsewhere, a config that has changed, saves by the clock."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hpctrain.config import Config, load, to_toml
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.models.mlp import MLP
from hpctrain.training.checkpointing.initialize import choose, read_weights
from hpctrain.training.rank_zero import SAVE_DUE, SaveClock
from hpctrain.training.record import reported_changes


def weights(prefix: str = "") -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {prefix + name: item.clone() for name, item in MLP(3, 2).state_dict().items()}


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return MLP(3, 2)


def initialize(
    model: nn.Module, given: dict[str, Tensor], names: dict[str, str], *, strict: bool
) -> str:
    fitting, told = choose(model, given, names, strict=strict)
    model.load_state_dict(fitting, strict=False)
    return told


@pytest.mark.parametrize("kind", ["safetensors", "state_dict", "lightning", "wrapped"])
def test_files_of_every_kind_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.ckpt")
    if kind == "safetensors":
        save_file(weights(), path)
    else:
        content: Any = {
            "state_dict": weights(),
            "lightning": {"epoch": 3, "state_dict": weights(), "optimizer_states": [{"lr": 1.0}]},
            "wrapped": {"model": weights(), "step": 5},
        }[kind]
        torch.save(content, path)
    found = read_weights(path)
    assert found.keys() == weights().keys()
    model = fresh()
    assert initialize(model, found, {}, strict=True) == "4 of 4 tensors"
    assert all(torch.equal(item, weights()[name]) for name, item in model.state_dict().items())


def test_files_that_are_none_are_refused_and_nothing_is_executed(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"state_dict": weights(), "hyper_parameters": argparse.Namespace(lr=1)}, path)
    with pytest.raises(CheckpointError, match=r"holds more than tensors.*convert it once"):
        read_weights(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        read_weights(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError):
        read_weights(path)
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError):
        read_weights(tmp_path)


def test_names_are_mapped_by_the_longest_beginning() -> None:
    model, names = fresh(), {"net.": "layers.", "net.head.": "layers.fc2."}
    given = {
        name.replace("layers.fc2.", "net.head.").replace("layers.", "net."): item
        for name, item in weights().items()
    }
    initialize(model, given, names, strict=True)
    assert all(torch.equal(item, weights()[name]) for name, item in model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (weights("model."), r'0 of 4 .*\{ "model." = "" \}'),
        (
            {name.removeprefix("layers."): item for name, item in weights().items()},
            r'\{ "" = "layers." \}',
        ),
        (weights() | {"extra": torch.zeros(1)}, r"only in the file: extra.*strict = false"),
        (
            {name: item for name, item in weights().items() if "bias" not in name},
            "only in the model: layers.fc1.bias, layers.fc2.bias",
        ),
        (weights() | {"layers.fc2.bias": torch.zeros(9)}, "of another shape: layers.fc2.bias"),
    ],
)
def test_what_does_not_fit_is_named_with_the_fix(given: dict[str, Tensor], message: str) -> None:
    model = fresh()
    with pytest.raises(ConfigError, match=message):
        initialize(model, given, {}, strict=True)
    assert all(torch.equal(item, fresh().state_dict()[n]) for n, item in model.state_dict().items())


def test_what_is_left_out_is_told() -> None:
    model, given = fresh(), weights()
    given["layers.fc2.weight"] = torch.zeros(7, 64)
    told = initialize(model, given, {}, strict=False)
    assert told == "3 of 4 tensors (of another shape: layers.fc2.weight)"
    assert torch.equal(model.state_dict()["layers.fc1.bias"], given["layers.fc1.bias"])
    with pytest.raises(ConfigError, match="0 of 4"):
        initialize(model, {"a": torch.zeros(1)}, {}, strict=False)


CONFIG = """
[run]
name = "test"
[model]
use = "mlp"
in_features = 3
[task]
use = "regression"
inputs = ["x"]
[data]
train = "."
global_batch_size = 8
[optimizer]
use = "sgd"
lr = 0.1
momentum = 0.9
[training]
max_steps = 1
"""


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def config(*overrides: str) -> Config:
        path = tmp_path / "c.toml"
        path.write_text(CONFIG, encoding="utf-8")
        return load(str(path), overrides)

    return config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        (["logging.every_steps=3", "checkpoint.keep_last=9", "launch.device=cpu"], []),
        (["optimizer.lr=0.2"], ["optimizer.lr: 0.1 when saved, 0.2 now"]),
        (["optimizer.nesterov=true"], ["optimizer.nesterov: not set when saved, true now"]),
        (
            ["training.max_epochs=3", "scheduler.use=cosine"],
            [
                'scheduler.use: "constant" when saved, "cosine" now',
                "training.max_epochs: not set when saved, 3 now",
            ],
        ),
    ],
)
def test_changes_are_told(config: Any, overrides: list[str], expected: list[str]) -> None:
    assert reported_changes(to_toml(config()), config(*overrides)) == expected


def test_keys_that_an_older_version_did_not_know_are_no_change(config: Any) -> None:
    assert reported_changes(CONFIG, config()) == []


def test_another_optimizer_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match=r'optimizer.use = "adamw", but .* has "sgd"') as raised:
        reported_changes(to_toml(config()), config("optimizer.use=adamw"))
    assert raised.value.everywhere


def test_a_save_is_asked_for_in_time_and_after_a_failure() -> None:
    now, failed = 100.0, False
    clock = SaveClock(2.0, lambda: failed, lambda: now)
    bits = []
    for seconds in (0, 119, 120, 121):
        now = 100.0 + seconds
        bits.append(clock.bit())
    assert bits == [0, 0, SAVE_DUE, SAVE_DUE]
    clock.saved()
    assert clock.bit() == 0
    failed = True
    assert clock.bit() == SAVE_DUE
    never = SaveClock(0.0, lambda: False, lambda: now)
    now += 1e9
    assert never.bit() == 0
