"""Words of a command line, and of Lightning's, for accelerators, precisions and strategies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
from lightning.fabric.plugins.precision import precision as of_fabric
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from hpctrain.config.choices import (
    Choices,
    as_options,
    choices,
    device_of,
    precision_of,
    training_of,
)
from hpctrain.config.schema import TrainingSection
from hpctrain.errors import ConfigError


def answer_of(read: Callable[[Any], Any], name: object) -> Any:
    """What a name is here, or why it is nothing."""
    try:
        return read(name)
    except ConfigError as error:
        return str(error)


def test_what_the_environment_chooses() -> None:
    assert choices({}) == Choices()
    chosen = choices(
        {
            "HPCTRAIN_ACCELERATOR": "gpu",
            "HPCTRAIN_PRECISION": "bf16",
            "HPCTRAIN_STRATEGY": "deepspeed_stage_2_offload",
        }
    )
    assert (chosen.accelerator, chosen.precision) == ("cuda", "bf16-mixed")
    assert chosen.training == {
        "strategy": "fsdp",
        "reshard_after_forward": False,
        "cpu_offload": True,
    }
    with pytest.raises(ConfigError, match=r'HPCTRAIN_STRATEGY=fdsp: .*did you mean "fsdp"'):
        choices({"HPCTRAIN_STRATEGY": "fdsp"})


def test_every_precision_of_lightning_is_one_of_ours_or_refused_with_the_nearest() -> None:
    names = (
        *get_args(of_fabric._PRECISION_INPUT_STR),
        *get_args(of_fabric._PRECISION_INPUT_STR_ALIAS),
        *get_args(of_fabric._PRECISION_INPUT_INT),
    )
    found = {name: answer_of(precision_of, name) for name in names}
    assert {name for name, value in found.items() if "nearest" in value} == {
        "16-true",
        "transformer-engine",
        "transformer-engine-float16",
    }
    assert found["16"] == found[16] == "16-mixed"
    assert found["bf16"] == "bf16-mixed"
    assert found[64] == "64-true"
    assert found["32-true"] == "32-true"
    assert "bf16-true" in found["16-true"]


def test_every_strategy_of_lightning_is_one_of_ours_or_refused_with_the_nearest() -> None:
    names = {*STRATEGY_REGISTRY.available_strategies(), *StrategyRegistry.available_strategies()}
    fields = set(TrainingSection.__dataclass_fields__)
    found = {name: answer_of(training_of, name) for name in names}
    refused = {name: value for name, value in found.items() if isinstance(value, str)}
    assert all("nearest" in value for value in refused.values()), refused
    assert {name for name in refused if "xla" not in name and "tpu" not in name} == {
        "deepspeed_stage_3_offload_nvme"
    }
    for name in names - set(refused):
        assert found[name]["strategy"] in ("ddp", "fsdp")
        assert set(found[name]) <= fields
    assert training_of("ddp_find_unused_parameters_true")["unused_parameters"] == "allow"
    assert training_of("deepspeed_stage_3") == {"strategy": "fsdp"}
    assert training_of("auto") == {}


@pytest.mark.parametrize(
    ("accelerator", "device"), [("gpu", "cuda"), ("CUDA", "cuda"), ("cpu", "cpu"), ("auto", "auto")]
)
def test_accelerators(accelerator: str, device: str) -> None:
    assert device_of(accelerator) == device


@pytest.mark.parametrize("accelerator", ["tpu", "mps", "hpu", "cup"])
def test_accelerators_that_are_not_there(accelerator: str) -> None:
    with pytest.raises(ConfigError, match="cpu"):
        device_of(accelerator)


def test_what_was_chosen_is_an_option_again() -> None:
    """So that a command that a run shows does the same again."""
    env = {"HPCTRAIN_PRECISION": "bf16", "HPCTRAIN_STRATEGY": "fsdp", "HPCTRAIN_ACCELERATOR": ""}
    assert as_options(env) == ["--precision", "bf16", "--strategy", "fsdp"]
    assert as_options({}) == []
