"""What a command line chooses for a script, in the words that scripts of others use.

`python -m hpctrain run` sets one variable a choice; `hpctrain.connect()` and
`hpctrain.lightning.Trainer` read them here, and take what the script itself has left open. So one
script runs on a laptop's CPU and on GPUs in another precision without a line of it being changed.

Precisions, accelerators and strategies have Lightning's names too. Each is one of ours, or refused
with the nearest one that is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, get_args

from hpctrain.config.schema import Precision
from hpctrain.errors import ConfigError
from hpctrain.utils.text import did_you_mean

T = TypeVar("T")

ACCELERATOR, PRECISION, STRATEGY = (
    "HPCTRAIN_ACCELERATOR",
    "HPCTRAIN_PRECISION",
    "HPCTRAIN_STRATEGY",
)
"""What holds a choice, as it was typed."""

PREPARING = "HPCTRAIN_PREPARE"
"""Set to 1 by `python -m hpctrain prepare`: the script is to fetch its data, and train nothing."""

_ACCELERATORS = {"auto": "auto", "cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "xpu": "xpu"}
_NO_ACCELERATORS = {
    "mps": 'nobody has run hpctrain on an Apple GPU yet; "cpu" trains there',
    "tpu": 'there are no TPUs for hpctrain; "gpu" and "cpu" are there',
    "hpu": 'there are no Gaudi accelerators for hpctrain; "gpu" and "cpu" are there',
}
_PRECISIONS = {
    **{name: name for name in get_args(Precision)},
    "64": "64-true",
    "32": "32-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
}
_NO_PRECISIONS = {
    "16-true": "weights in float16 lose every small update; the nearest are bf16-true, 16-mixed",
    "transformer-engine": "there are no FP8 layers here; the nearest is bf16-mixed",
    "transformer-engine-float16": "there are no FP8 layers here; the nearest is 16-mixed",
}

_DDP: dict[str, Any] = {"strategy": "ddp"}
_FSDP: dict[str, Any] = {"strategy": "fsdp"}
# Gradients and optimizer state are spread, parameters stay whole between forward and backward.
_STAGE_2: dict[str, Any] = {**_FSDP, "reshard_after_forward": False}
_OFFLOAD: dict[str, Any] = {"cpu_offload": True}
_STRATEGIES: dict[str, dict[str, Any]] = {
    "auto": {},
    "single_device": _DDP,
    # One batch over all devices, whose gradients are those of the whole: ddp does it, a process
    # a device.
    "dp": _DDP,
    **{
        f"ddp{how}{unused}": {**_DDP, **allowed}
        for how in ("", "_spawn", "_fork", "_notebook")
        for unused, allowed in (
            ("", {}),
            ("_find_unused_parameters_false", {}),
            ("_find_unused_parameters_true", {"unused_parameters": "allow"}),
        )
    },
    "fsdp": _FSDP,
    "fsdp_cpu_offload": {**_FSDP, **_OFFLOAD},
    "deepspeed": _STAGE_2,
    "deepspeed_stage_1": _STAGE_2,
    "deepspeed_stage_1_offload": {**_STAGE_2, **_OFFLOAD},
    "deepspeed_stage_2": _STAGE_2,
    "deepspeed_stage_2_offload": {**_STAGE_2, **_OFFLOAD},
    "deepspeed_stage_3": _FSDP,
    "deepspeed_stage_3_offload": {**_FSDP, **_OFFLOAD},
}
_NO_STRATEGIES = {
    "deepspeed_stage_3_offload_nvme": "nothing is kept on disks during a step; the nearest is "
    "fsdp_cpu_offload",
    "model_parallel": "tensors are not cut for tensor parallelism; the nearest is fsdp",
    "zero1": "nothing spreads the optimizer's state alone; the nearest is deepspeed_stage_2",
    **{
        name: f"there are no TPUs for hpctrain; the nearest is {nearest}"
        for name, nearest in (
            *(("xla", "ddp"), ("xla_debug", "ddp"), ("xla_fsdp", "fsdp")),
            *(("single_xla", "single_device"), ("single_tpu", "single_device")),
        )
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What was chosen for a script; None or empty is what is left to it.

    Attributes:
        accelerator: as `launch.device` has it.
        precision: as `training.precision` has it.
        training: the strategy, as keys of `[training]`: {"strategy": "fsdp", ...}.
    """

    accelerator: str | None = None
    precision: Precision | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


def choices(env: Mapping[str, str] | None = None) -> Choices:
    """Return what the environment of this process chooses.

    Raises:
        ConfigError: if a variable holds what nothing is called, or what is not there.
    """
    env = os.environ if env is None else env

    def chosen(variable: str, read: Callable[[str], T]) -> T | None:
        if not (text := env.get(variable)):
            return None
        try:
            return read(text)
        except ConfigError as error:
            raise ConfigError(f"{variable}={text}: {error}", everywhere=True) from error

    return Choices(
        accelerator=chosen(ACCELERATOR, device_of),
        precision=chosen(PRECISION, precision_of),
        training=chosen(STRATEGY, training_of) or {},
    )


def as_options(env: Mapping[str, str] | None = None) -> list[str]:
    """Return the options of `python -m hpctrain run` that the environment stands for."""
    env = os.environ if env is None else env
    named = {"--accelerator": ACCELERATOR, "--precision": PRECISION, "--strategy": STRATEGY}
    return [part for option, name in named.items() if env.get(name) for part in (option, env[name])]


def is_preparing(env: Mapping[str, str] | None = None) -> bool:
    """Tell whether this process is to fetch data, and to train nothing."""
    return (os.environ if env is None else env).get(PREPARING) == "1"


def device_of(accelerator: str) -> str:
    """Return `launch.device` for an accelerator.

    Raises:
        ConfigError: if there is none of that name.
    """
    return _named("accelerator", accelerator, _ACCELERATORS, _NO_ACCELERATORS)


def precision_of(precision: str | int) -> Precision:
    """Return `training.precision` for a precision, such as 16, "bf16" or "32-true".

    Raises:
        ConfigError: if there is none of that name.
    """
    return cast("Precision", _named("precision", str(precision), _PRECISIONS, _NO_PRECISIONS))


def training_of(strategy: str) -> dict[str, Any]:
    """Return the keys of `[training]` for a strategy.

    Raises:
        ConfigError: if there is none of that name.
    """
    return dict(_named("strategy", strategy, _STRATEGIES, _NO_STRATEGIES))


def _named(kind: str, name: str, ours: Mapping[str, T], others: Mapping[str, str]) -> T:
    word = name.strip().lower()
    if word in ours:
        return ours[word]
    if word in others:
        raise ConfigError(f"{kind} {name!r}: {others[word]}")
    near = did_you_mean(word, ours, quote='"')
    raise ConfigError(f"there is no {kind} {name!r}{near or ': ' + ', '.join(ours)}")
