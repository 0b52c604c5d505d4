"""Lightning's strategy objects as keys of a config, by the names of their classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hpctrain.config.choices import training_of
from hpctrain.errors import ConfigError
from hpctrain.lightning.keys import Keys

SINGLE_DEVICE = "single_device"

_HOOKS = {"fp16_compress_hook": "fp16", "bf16_compress_hook": "bf16"}
_SHARDING = {
    "FULL_SHARD": "fsdp",
    "SHARD_GRAD_OP": "deepspeed_stage_2",
    "NO_SHARD": "ddp",
}
_OF_FSDP = (
    *("auto_wrap_policy", "use_orig_params", "limit_all_gathers", "sync_module_states"),
    *("forward_prefetch", "backward_prefetch"),
)
"""What FSDP is told there: the first is understood, the others change nothing that is computed."""
_OF_DDP: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "find_unused_parameters": lambda value: {"unused_parameters": "allow" if value else "error"},
    "static_graph": lambda value: {"static_graph": bool(value)},
    "bucket_cap_mb": lambda value: {} if value is None else {"bucket_mb": float(value)},
    "gradient_as_bucket_view": lambda _: {},  # so it is in any case
    "broadcast_buffers": lambda _: {},  # buffers are each rank's own
}


def strategy_keys(strategy: Any) -> Keys:
    """Return the keys for a strategy object.

    Raises:
        ConfigError: if it is of a class that has no counterpart, or asks for what has none.
    """
    name = type(strategy).__name__
    if name == "SingleDeviceStrategy":
        found = training_of(SINGLE_DEVICE)
    elif name == "DDPStrategy":
        found = _of_ddp(strategy)
    elif name == "FSDPStrategy":
        found = _of_fsdp(strategy)
    elif name == "DeepSpeedStrategy":
        found = _of_deepspeed(strategy)
    else:
        raise ConfigError(
            f'strategy={name}(...): "ddp" and "fsdp" are the strategies here, and Lightning\'s '
            "DDPStrategy, FSDPStrategy and DeepSpeedStrategy are understood"
        )
    keys = {f"training.{key}": value for key, value in found.items()}
    backend = getattr(strategy, "_process_group_backend", None)
    return keys if backend is None else {**keys, "launch.backend": backend}


def _of_ddp(strategy: Any) -> dict[str, Any]:
    found = training_of("ddp")
    for name, value in strategy._ddp_kwargs.items():
        if name not in _OF_DDP:
            raise ConfigError(f"strategy=DDPStrategy({name}={value!r}): leave it to hpctrain")
        found |= _OF_DDP[name](value)
    hook = strategy._ddp_comm_hook
    if hook is not None:
        if getattr(hook, "__name__", "") not in _HOOKS or strategy._ddp_comm_wrapper is not None:
            raise ConfigError(
                "strategy=DDPStrategy(ddp_comm_hook=...): gradients are exchanged as they are, or "
                f"compressed by one of {', '.join(_HOOKS)}"
            )
        found["compress_gradients"] = _HOOKS[hook.__name__]
    if strategy._model_averaging_period is not None:
        raise ConfigError(
            "strategy=DDPStrategy(model_averaging_period=...): ranks are equal after every step"
        )
    return found


def _of_fsdp(strategy: Any) -> dict[str, Any]:
    sharding = getattr(strategy.sharding_strategy, "name", str(strategy.sharding_strategy))
    if sharding not in _SHARDING:
        raise ConfigError(
            f'strategy=FSDPStrategy(sharding_strategy="{sharding}"): parameters are spread over '
            'all ranks; "FULL_SHARD" and "SHARD_GRAD_OP" do so'
        )
    found = training_of(_SHARDING[sharding])
    if getattr(strategy.cpu_offload, "offload_params", False):
        found["cpu_offload"] = True
    if strategy.mixed_precision is not None:
        raise ConfigError(
            'strategy=FSDPStrategy(mixed_precision=...): precision="bf16-mixed" and its kind say it'
        )
    if strategy._activation_checkpointing_kwargs:
        raise ConfigError(
            "strategy=FSDPStrategy(activation_checkpointing_policy=...): modules are named, "
            "overrides=['training.activation_checkpointing=[\"layers.*\"]']"
        )
    for name in strategy.kwargs:
        if name not in _OF_FSDP:
            raise ConfigError(f"strategy=FSDPStrategy({name}=...): parameters are spread over all")
    policy = strategy.kwargs.get("auto_wrap_policy")
    classes = getattr(policy, "_module_classes", None)
    if policy is not None and classes is None:
        raise ConfigError(
            "strategy=FSDPStrategy(auto_wrap_policy=<a function>): units are found, or named by "
            "class: auto_wrap_policy={Block}"
        )
    if classes:
        found["shard"] = sorted(each.__name__ for each in classes)
    return found


def _of_deepspeed(strategy: Any) -> dict[str, Any]:
    config = strategy.config if isinstance(strategy.config, Mapping) else {}
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 2)
    devices = {
        zero.get(part, {}).get("device", "none") for part in ("offload_optimizer", "offload_param")
    }
    name = f"deepspeed_stage_{stage}" + ("" if devices == {"none"} else "_offload")
    return training_of(f"{name}_nvme" if "nvme" in devices else name)
