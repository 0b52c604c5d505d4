"""Every name that Lightning and Fabric know for precision, accelerator and strategy."""

from __future__ import annotations

import dataclasses
import typing

import lightning.pytorch as lightning
import pytest
from lightning.fabric.connector import _PRECISION_INPUT as OF_FABRIC
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.connectors.accelerator_connector import _PRECISION_INPUT

from hpctrain.config.peer_options import (
    UnsupportedError,
    accelerator_keys,
    precision_keys,
    strategy_keys,
)
from hpctrain.config.schema import Config

PRECISIONS = sorted(
    {
        name
        for names in (_PRECISION_INPUT, OF_FABRIC)
        for words in typing.get_args(names)
        for name in typing.get_args(words)
    },
    key=str,
)
STRATEGIES = sorted({"auto", "dp", *StrategyRegistry, *STRATEGY_REGISTRY})
REFUSED = {
    *("16-true", "transformer-engine", "transformer-engine-float16", "tpu"),
    *("deepspeed_stage_3_offload_nvme",),
    *("single_tpu", "single_xla", "xla", "xla_debug", "xla_fsdp"),
}


def assert_known(keys: dict[str, object]) -> None:
    sections = {field.name: field.type for field in dataclasses.fields(Config)}
    hints = typing.get_type_hints(Config)
    for key in keys:
        section, _, name = key.partition(".")
        assert section in sections
        assert name in {field.name for field in dataclasses.fields(hints[section])}


@pytest.mark.parametrize("name", PRECISIONS, ids=repr)
def test_precision(name: str | int) -> None:
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=r"nearest|bf16-true"):
            precision_keys(name)
        return
    assert_known(precision_keys(name))
    # Lightning's own table of what a short name stands for.
    meant = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
    assert precision_keys(name)["training.precision"] == meant.get(str(name), name)


@pytest.mark.parametrize("name", ["auto", "gpu", *AcceleratorRegistry])
def test_accelerator(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match="no support"):
            accelerator_keys(name)
    else:
        assert_known(accelerator_keys(name))


def test_accelerator_objects() -> None:
    from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator

    assert accelerator_keys(CPUAccelerator()) == {"launch.device": "cpu"}
    assert accelerator_keys(CUDAAccelerator()) == {"launch.device": "cuda"}
    with pytest.raises(UnsupportedError, match="expected one of"):
        accelerator_keys(lightning.Callback())


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(UnsupportedError):
            strategy_keys(name)
        return
    keys = strategy_keys(name)
    assert_known(keys)
    assert ("find_unused_parameters_true" in name) == ("training.unused_parameters" in keys)
    assert ("offload" in name) == keys.get("training.cpu_offload", False)
    assert keys.get("training.strategy", "ddp") == (
        "fsdp" if "fsdp" in name or "deepspeed" in name else "ddp"
    )


def test_unknown_names() -> None:
    with pytest.raises(UnsupportedError, match='did you mean "bf16-mixed"'):
        precision_keys("bf16-mixd")
    with pytest.raises(UnsupportedError, match="expected one of"):
        precision_keys(True)
    with pytest.raises(UnsupportedError, match='did you mean "fsdp"'):
        strategy_keys("fsdpp")
    with pytest.raises(UnsupportedError, match="Gaudi"):
        accelerator_keys("hpu")
