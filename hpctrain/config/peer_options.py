"""Values that Lightning and Fabric know for precision, accelerator and strategy, as keys of ours.

For `hpctrain.lightning.Trainer` and for the options of the command line. Each value is mapped to
keys of the config, or refused with the nearest choice.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from hpctrain.utils.text import did_you_mean

Keys = dict[str, Any]
"""Keys of the config with dots, such as "training.precision", and their values."""


class UnsupportedError(ValueError):
    """A value that has no counterpart; the message says why, and what is nearest."""


_PRECISIONS = {
    "16": "16-mixed",
    "16-mixed": "16-mixed",
    "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
    "bf16-true": "bf16-true",
    "32": "32-true",
    "32-true": "32-true",
    "64": "64-true",
    "64-true": "64-true",
}
_NO_FP8 = 'FP8 is not supported; "bf16-mixed" is the nearest'
_NO_PRECISIONS = {
    "16-true": (
        "float16 weights lose small updates, and no loss scale helps against that; "
        '"bf16-true" holds weights in 16 bits, "16-mixed" computes in float16'
    ),
    "transformer-engine": _NO_FP8,
    "transformer-engine-float16": _NO_FP8,
}


def precision_keys(value: str | int | None) -> Keys:
    """Return the keys for a precision, such as 16, "bf16" or "64-true"; None: the default.

    Raises:
        UnsupportedError: if there is no such number format.
    """
    if value is None:
        return {}
    return {"training.precision": _looked_up("precision", value, _PRECISIONS, _NO_PRECISIONS)}


_DEVICES = {
    "auto": "auto",
    "cpu": "cpu",
    "cuda": "cuda",
    "gpu": "mps" if sys.platform == "darwin" else "cuda",
    "mps": "mps",
    "xpu": "xpu",
}
_NO_DEVICES = {
    "hpu": 'there is no support for Gaudi; "cuda" (NVIDIA, AMD), "xpu" (Intel) and "cpu" are there',
    "tpu": 'there is no support for TPUs; "cuda" (NVIDIA, AMD), "xpu" (Intel) and "cpu" are there',
}
_ACCELERATOR_CLASSES = {
    "CPUAccelerator": "cpu",
    "CUDAAccelerator": "cuda",
    "MPSAccelerator": "mps",
    "XLAAccelerator": "tpu",
}


def accelerator_keys(value: Any) -> Keys:
    """Return the keys for an accelerator: its name, or an object of one of Lightning's classes.

    Raises:
        UnsupportedError: if nothing here computes on it.
    """
    name = value if isinstance(value, str) else _ACCELERATOR_CLASSES.get(type(value).__name__, "")
    if not name:
        raise UnsupportedError(f"accelerator={type(value).__name__}(...): {_one_of(_DEVICES)}")
    return {"launch.device": _looked_up("accelerator", name, _DEVICES, _NO_DEVICES)}


_FIND_UNUSED = {"training.strategy": "ddp", "training.unused_parameters": "allow"}
_DDP = {"training.strategy": "ddp"}
_FSDP = {"training.strategy": "fsdp"}
_ZERO2 = {**_FSDP, "training.reshard_after_forward": False}
_OFFLOAD = {**_FSDP, "training.cpu_offload": True}

SINGLE_DEVICE = "single_device"

_STRATEGIES: dict[str, Keys] = {
    "auto": {},
    "dp": _DDP,
    SINGLE_DEVICE: _DDP,
    "ddp": _DDP,
    **{
        f"ddp{start}{unused}": keys
        for start in ("", "_spawn", "_fork", "_notebook")
        for unused, keys in {
            "": _DDP,
            "_find_unused_parameters_false": _DDP,
            "_find_unused_parameters_true": _FIND_UNUSED,
        }.items()
    },
    "fsdp": _FSDP,
    "fsdp_cpu_offload": _OFFLOAD,
    # Stage 1 and stage 2 differ in memory only, and the second takes less.
    "deepspeed": _ZERO2,
    "deepspeed_stage_1": _ZERO2,
    "deepspeed_stage_1_offload": {**_ZERO2, **_OFFLOAD},
    "deepspeed_stage_2": _ZERO2,
    "deepspeed_stage_2_offload": {**_ZERO2, **_OFFLOAD},
    "deepspeed_stage_3": _FSDP,
    "deepspeed_stage_3_offload": _OFFLOAD,
}
_NO_XLA = 'there is no support for TPUs and XLA; "ddp" and "fsdp" are there'
_NO_STRATEGIES = {
    "deepspeed_stage_3_offload_nvme": (
        "nothing is offloaded to disks; deepspeed_stage_3_offload keeps it in host memory"
    ),
    "single_tpu": _NO_XLA,
    "single_xla": _NO_XLA,
    "xla": _NO_XLA,
    "xla_debug": _NO_XLA,
    "xla_fsdp": _NO_XLA,
}


def strategy_keys(value: str) -> Keys:
    """Return the keys for a strategy by its name, such as "ddp_spawn" or "deepspeed_stage_2".

    Raises:
        UnsupportedError: if there is nothing like it.
    """
    return dict(_looked_up("strategy", value, _STRATEGIES, _NO_STRATEGIES))


def _looked_up(
    what: str, value: str | int, known: Mapping[str, Any], refused: Mapping[str, str]
) -> Any:
    name = str(value)
    if isinstance(value, bool) or name not in known:
        problem = refused.get(name) or f"{_one_of(known)}{did_you_mean(name, known, quote=chr(34))}"
        raise UnsupportedError(f"{what}={value!r}: {problem}")
    return known[name]


def _one_of(known: Mapping[str, Any]) -> str:
    shown = [f'"{name}"' for name in known if "find_unused" not in name]
    return f"expected one of {', '.join(shown)}"
