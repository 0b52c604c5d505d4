"""Objects of Lightning's own classes as keys of the config: callbacks, strategies, loggers.

A callback class of the user's is called, whatever it inherits from; only the classes that Lightning
itself ships are known here, by name and module, and their work is done by keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpctrain.config.choices import training_of
from hpctrain.errors import ConfigError
from hpctrain.lightning.keys import Keys

KEEP_ALL = 1_000_000_000

_PACKAGES = ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks")


@dataclass(slots=True, kw_only=True)
class Sorted:
    """The callbacks of a Trainer by what becomes of them.

    Attributes:
        keys: of the config, in place of them.
        called: those that are called.
        checkpoints: ModelCheckpoint objects.
        stoppings: EarlyStopping objects.
        notes: what is done in another way.
        problems: why some cannot be had.
    """

    keys: Keys = field(default_factory=dict)
    called: list[Any] = field(default_factory=list)
    checkpoints: list[Any] = field(default_factory=list)
    stoppings: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def sorted_callbacks(given: Any) -> Sorted:
    """Return the callbacks by what becomes of them.

    Args:
        given: one of them, several, or None.
    """
    found = Sorted()
    callbacks = [] if given is None else given if isinstance(given, list | tuple) else [given]
    for callback in callbacks:
        name = name_of(callback)
        if name is None or name in _CALLED:
            found.called.append(callback)
        elif name in _MAPPED:
            _take(found, name, callback)
        elif name in _DONE_ANYWAY:
            found.notes.append(f"{name}: {_DONE_ANYWAY[name]}")
        elif name in _REFUSED:
            found.problems.append(f"callbacks={name}(...): {_REFUSED[name]}")
        else:
            found.called.append(callback)
    return found


def name_of(callback: Any) -> str | None:
    """Return the name of one of Lightning's own callbacks; None for a class of the user's.

    A subclass is what it inherits from, with other arguments; `own_methods` says what else it is.
    """
    for base in type(callback).__mro__:
        if base.__module__.startswith(_PACKAGES):
            return None if base.__name__ == "Callback" else base.__name__
    return None


def own_methods(callback: Any) -> list[str]:
    """Return the methods by which a class of the user's differs from Lightning's that it is of."""
    kinds = type(callback).__mro__
    theirs = next(
        place for place, base in enumerate(kinds) if base.__module__.startswith(_PACKAGES)
    )
    return sorted(
        name
        for kind in kinds[:theirs]
        for name, value in vars(kind).items()
        if callable(value) and not name.startswith("__")
    )


def _take(found: Sorted, name: str, callback: Any) -> None:
    methods = own_methods(callback)
    if methods and name not in _FOR_THE_EYE:
        found.problems.append(
            f"callbacks={type(callback).__name__}(...): keys do the work of {name} here, so that "
            f"its {', '.join(methods)} would never be called: inherit from Callback"
        )
        return
    try:
        keys = _MAPPED[name](callback)
    except ConfigError as error:
        found.problems.append(f"callbacks={name}(...): {error}")
        return
    if name == "ModelCheckpoint":
        found.checkpoints.append(callback)
    if name == "EarlyStopping":
        found.stoppings.append(callback)
    differing = [key for key in keys if key in found.keys and found.keys[key] != keys[key]]
    if differing:
        found.problems.append(
            f"callbacks={name}(...): two callbacks want different {', '.join(differing)}"
        )
    found.keys |= keys


def _model_checkpoint(callback: Any) -> Keys:
    keys: Keys = {}
    top = callback.save_top_k
    if top == 0 and not callback.save_last:
        return {"checkpoint.every_epochs": 0, "checkpoint.keep_last": 1}
    if callback.monitor is not None and top != 0:
        keys["checkpoint.keep_best"] = callback.monitor
        keys["checkpoint.keep_best_mode"] = callback.mode
    if top == -1:
        keys["checkpoint.keep_last"] = KEEP_ALL
    elif top > 1 and callback.monitor is not None:
        keys["checkpoint.keep_best_count"] = top
    seconds = callback._train_time_interval
    if callback._every_n_train_steps:
        keys["checkpoint.every_steps"] = callback._every_n_train_steps
        keys["checkpoint.every_epochs"] = 0
    elif seconds is not None:
        keys["checkpoint.every_minutes"] = seconds.total_seconds() / 60
        keys["checkpoint.every_epochs"] = 0
    else:
        keys["checkpoint.every_epochs"] = callback._every_n_epochs
    return keys


def _early_stopping(callback: Any) -> Keys:
    if callback._check_on_train_epoch_end:
        raise ConfigError(
            "check_on_train_epoch_end=True: evaluations are what it looks at; let one come after "
            "every epoch"
        )
    keys = {
        "monitor": callback.monitor,
        "mode": callback.mode,
        "patience": callback.patience,
        "min_delta": abs(callback.min_delta),  # which Lightning has a sign for
        "stopping_threshold": callback.stopping_threshold,
        "divergence_threshold": callback.divergence_threshold,
        "check_finite": callback.check_finite,
    }
    return {f"early_stopping.{name}": value for name, value in keys.items() if value is not None}


def _progress_bar(callback: Any) -> Keys:
    rate = getattr(callback, "_refresh_rate", getattr(callback, "refresh_rate", 1))
    return {"logging.progress": "none"} if rate == 0 else {}


def _timer(callback: Any) -> Keys:
    seconds = callback._duration
    return {} if seconds is None else {"run.max_seconds": float(seconds)}


def _accumulation(callback: Any) -> Keys:
    if set(callback.scheduling.values()) != {1}:
        raise ConfigError(
            f"scheduling={callback.scheduling!r}: the global batch is one for the whole run: "
            "Trainer(accumulate_grad_batches=...) sets it"
        )
    return {}


_MAPPED: Mapping[str, Callable[[Any], Keys]] = {
    "EarlyStopping": _early_stopping,
    "GradientAccumulationScheduler": _accumulation,
    "ModelCheckpoint": _model_checkpoint,
    "RichProgressBar": _progress_bar,
    "TQDMProgressBar": _progress_bar,
    "Timer": _timer,
}
_FOR_THE_EYE = ("RichProgressBar", "TQDMProgressBar")
"""Of which nothing depends on what a subclass changes."""

_SUMMARY = "the header of the log has the size of the model"
_DONE_ANYWAY = {
    "DeviceStatsMonitor": "metrics.jsonl has what a step takes; device memory is in the summary",
    "LearningRateMonitor": "metrics.jsonl has lr in every line",
    "ModelSummary": _SUMMARY,
    "OnExceptionCheckpoint": "the newest checkpoint is whole, whatever ends the job",
    "ProgressBar": "logging.progress shows where the run is",
    "RichModelSummary": _SUMMARY,
    "SpikeDetection": "a loss far above the last ones is reported in the log",
    "ThroughputMonitor": "metrics.jsonl has samples_per_second in every line",
}
_OTHER_WEIGHTS = (
    "a moving average is a key: overrides=['training.ema_decay=0.999'], evaluated and saved"
)
_CALLED = ("LambdaCallback", "BasePredictionWriter")
"""Lightning's own that do nothing but call the user's code."""
_REFUSED = {
    "BackboneFinetuning": "a run has one set of trained parameters: freeze in two runs, the second "
    "with ckpt_path of the first's weights",
    "BaseFinetuning": "a run has one set of trained parameters: freeze in two runs, the second "
    "with ckpt_path of the first's weights",
    "BatchSizeFinder": "`python -m hpctrain check` shows whether a batch size fits into memory",
    "Checkpoint": "checkpoints are the run's own: ModelCheckpoint says which are kept",
    "EMAWeightAveraging": _OTHER_WEIGHTS,
    "LearningRateFinder": "give the learning rate; short runs with max_steps compare several",
    "ModelPruning": "parameters are not renamed in mid-run: torch.nn.utils.prune after fit",
    "StochasticWeightAveraging": _OTHER_WEIGHTS,
    "WeightAveraging": _OTHER_WEIGHTS,
}


def known() -> Sequence[str]:
    """Return the names of Lightning's callbacks of which something is said here."""
    return sorted({*_MAPPED, *_DONE_ANYWAY, *_REFUSED, *_CALLED})


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
"""What FSDP is given there: the first is understood, the others change nothing that is computed."""
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


_WITH_A_WRITER = "TensorBoardLogger"
_IN_THE_RUN_FOLDER = ("CSVLogger", _WITH_A_WRITER)
"""A run has metrics.jsonl, metrics.csv and, where it is installed, TensorBoard's files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loggers:
    """What becomes of the loggers of a Trainer.

    Attributes:
        keys: where the run is to be.
        handed: those that are handed every line of metrics.
        shown: what a module finds as its loggers; None: the run's own.
    """

    keys: Keys
    handed: Sequence[Any]
    shown: Sequence[Any]

    @classmethod
    def of(cls, given: Any) -> Loggers:
        """Return what becomes of one of them, or several; None is True, and False is none."""
        loggers = list(given) if isinstance(given, list | tuple | set) else [given]
        loggers = [None if logger is True else logger for logger in loggers if logger is not False]
        real = [logger for logger in loggers if logger is not None]
        ours = [logger for logger in real if type(logger).__name__ in _IN_THE_RUN_FOLDER]
        keys: Keys = {}
        if ours:
            # As there: DIRECTORY/NAME/VERSION, where the files of the first logger are.
            first = ours[0]
            parts = [part for part in (first.save_dir, first.name) if part]
            keys["run.directory"] = "/".join(str(part) for part in parts) or "."
            version = getattr(first, "_version", None)
            if version is not None:
                keys["run.name"] = version if isinstance(version, str) else f"version_{version}"
        return cls(
            keys=keys,
            handed=[logger for logger in real if logger not in ours],
            shown=[None if type(each).__name__ == "CSVLogger" else each for each in loggers],
        )

    @staticmethod
    def move(shown: Sequence[Any], version: str) -> None:
        """Have TensorBoard's logger, of which a module asks the writer, be in the run's folder."""
        for each in shown:
            if type(each).__name__ == _WITH_A_WRITER and each._version is None:
                each._version = version
