"""Arguments of Lightning's Trainer as keys of a config.

Each argument becomes keys, is accepted because it has nothing left to decide here, or is refused
with the nearest choice. Pure: no torch, no Lightning, no communication; objects are known by the
names of their classes and by their attributes.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.config.choices import Choices, device_of, precision_of, training_of
from hpctrain.errors import ConfigError
from hpctrain.lightning.keys import Keys, seconds_of
from hpctrain.lightning.launching import asked_ranks
from hpctrain.lightning.objects import Loggers, sorted_callbacks, strategy_keys
from hpctrain.utils.text import did_you_mean

NEVER = 1_000_000_000
"""Steps between two lines of metrics that are not asked for."""

_ENVIRONMENT = "PL_TRAINER_"
_ACCELERATORS = {"CPUAccelerator": "cpu", "CUDAAccelerator": "cuda", "MPSAccelerator": "mps"}
_DEFAULT_EPOCHS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerArguments:
    """What Lightning's Trainer takes, with its defaults, and the overrides that only ours takes."""

    accelerator: Any = "auto"
    strategy: Any = "auto"
    devices: Any = "auto"
    num_nodes: int = 1
    precision: Any = None
    logger: Any = None
    callbacks: Any = None
    fast_dev_run: int | bool = False
    max_epochs: int | None = None
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: Any = None
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    limit_predict_batches: int | float | None = None
    overfit_batches: int | float = 0.0
    val_check_interval: Any = None
    check_val_every_n_epoch: int | None = 1
    num_sanity_val_steps: int | None = None
    log_every_n_steps: int | None = None
    enable_checkpointing: bool | None = None
    enable_progress_bar: bool | None = None
    enable_model_summary: bool | None = None
    accumulate_grad_batches: Any = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    deterministic: Any = None
    benchmark: bool | None = None
    inference_mode: bool = True
    use_distributed_sampler: bool = True
    profiler: Any = None
    detect_anomaly: bool = False
    barebones: bool = False
    plugins: Any = None
    sync_batchnorm: bool = False
    reload_dataloaders_every_n_epochs: int = 0
    default_root_dir: Any = None
    enable_autolog_hparams: bool = True
    model_registry: str | None = None
    overrides: Sequence[str] = ()
    """Keys of the config for which Lightning has no word: "checkpoint.every_minutes=30"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """What the arguments come to.

    Attributes:
        keys: of the config, by name with a dot.
        devices: ranks that every node is to have; None: as many as there are.
        num_nodes: nodes there are to be; None: as many as there are.
        callbacks: those that are called.
        checkpoints: ModelCheckpoint objects, for what they tell after the run.
        stoppings: EarlyStopping objects, likewise.
        loggers: that are given every line of metrics.
        shown_loggers: what a module finds as its loggers; None among them: the run's own.
        notes: what was accepted and is done in another way here.
    """

    keys: Keys
    devices: int | None
    num_nodes: int | None
    callbacks: Sequence[Any]
    checkpoints: Sequence[Any]
    stoppings: Sequence[Any]
    loggers: Sequence[Any]
    shown_loggers: Sequence[Any]
    notes: Sequence[str]


def parse(given: Mapping[str, Any], env: Mapping[str, str] | None = None) -> TrainerArguments:
    """Return the arguments by their names.

    Raises:
        ConfigError: if there is none of a name, or the environment holds some for Lightning.
    """
    known = [each.name for each in dataclasses.fields(TrainerArguments)]
    problems = [
        f"{name}: the Trainer has no such argument{did_you_mean(name, known)}"
        for name in given
        if name not in known
    ]
    problems += [
        f"{variable} is set in the environment, which is not read here: give the Trainer "
        f"{variable.removeprefix(_ENVIRONMENT).lower()}=..., and unset it"
        for variable in (os.environ if env is None else env)
        if variable.startswith(_ENVIRONMENT)
    ]
    _raise(problems)
    return TrainerArguments(**given)


def mapped(given: TrainerArguments, chosen: Choices | None = None) -> Mapped:
    """Return what the arguments come to.

    Args:
        given: the arguments.
        chosen: what the command line chooses for what the script leaves open.

    Raises:
        ConfigError: with every argument that cannot be had, and the nearest that can.
    """
    if given.barebones:
        given = _barebones(given)
    keys: Keys = {}
    problems: list[str] = []
    for rule in _RULES:
        try:
            keys |= rule(given)
        except ConfigError as error:
            problems.append(str(error))
    num_devices, num_nodes = None, None
    try:
        num_devices, num_nodes = asked_ranks(given.devices, given.num_nodes, given.strategy)
    except ConfigError as error:
        problems.append(str(error))
    found = sorted_callbacks(given.callbacks)
    problems += found.problems
    loggers = Loggers.of(given.logger)
    _raise(problems)
    return Mapped(
        keys=_chosen(given, chosen or Choices()) | keys | loggers.keys | found.keys,
        devices=num_devices,
        num_nodes=num_nodes,
        callbacks=found.called,
        checkpoints=found.checkpoints,
        stoppings=found.stoppings,
        loggers=loggers.handed,
        shown_loggers=loggers.shown,
        notes=found.notes,
    )


def _raise(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(f"Trainer: {problems[0]}", everywhere=True)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"Trainer: {len(problems)} mistakes\n{lines}", everywhere=True)


def _chosen(given: TrainerArguments, chosen: Choices) -> Keys:
    """Return what the command line chooses, of what the script leaves open."""
    keys: Keys = {}
    if given.accelerator == "auto" and chosen.accelerator is not None:
        keys["launch.device"] = chosen.accelerator
    if given.precision is None and chosen.precision is not None:
        keys["training.precision"] = chosen.precision
    if given.strategy == "auto":
        keys |= {f"training.{name}": value for name, value in chosen.training.items()}
    return keys


def _barebones(given: TrainerArguments) -> TrainerArguments:
    """Return the arguments with all off that takes time beside the steps."""
    contradicting = [
        name
        for name in (
            *("enable_checkpointing", "logger", "enable_progress_bar", "log_every_n_steps"),
            *("fast_dev_run", "detect_anomaly", "profiler"),
        )
        if getattr(given, name)
    ]
    if contradicting:
        raise ConfigError(
            f"Trainer: barebones=True turns {', '.join(contradicting)} off: leave out one of them",
            everywhere=True,
        )
    return dataclasses.replace(
        given,
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        log_every_n_steps=0,
    )


def _number_format(given: TrainerArguments) -> Keys:
    return {} if given.precision is None else {"training.precision": precision_of(given.precision)}


def _device(given: TrainerArguments) -> Keys:
    value = given.accelerator
    if not isinstance(value, str):
        name = type(value).__name__
        if name not in _ACCELERATORS:
            raise ConfigError(f'accelerator={name}(...): expected "auto", "cpu" or "gpu"')
        value = _ACCELERATORS[name]
    return {} if value == "auto" else {"launch.device": device_of(value)}


def _strategy(given: TrainerArguments) -> Keys:
    value = given.strategy
    if isinstance(value, str):
        return {f"training.{name}": item for name, item in training_of(value).items()}
    return strategy_keys(value)


def _length(given: TrainerArguments) -> Keys:
    keys: Keys = {}
    epochs, steps = given.max_epochs, given.max_steps
    if steps is None or steps < -1:
        raise ConfigError(f"max_steps={steps!r}: expected a whole number; -1: no limit")
    if epochs == 0 or steps == 0:
        raise ConfigError(
            "max_epochs=0 and max_steps=0 train nothing: trainer.validate and trainer.test evaluate"
        )
    if epochs is not None and epochs != -1:
        keys["training.max_epochs"] = epochs
    if steps != -1:
        keys["training.max_steps"] = steps
    if not keys and epochs == -1:
        raise ConfigError(
            "max_epochs=-1: a run needs an end, which schedules and the progress count to: give "
            "max_epochs or max_steps a number that is large enough, and max_time the time"
        )
    if not keys:
        keys["training.max_epochs"] = _DEFAULT_EPOCHS
    if given.max_time is not None:
        keys["run.max_seconds"] = seconds_of("max_time", given.max_time)
    least = {"training.min_epochs": given.min_epochs, "training.min_steps": given.min_steps}
    return keys | {key: value for key, value in least.items() if value not in (None, 0)}


def _validation(given: TrainerArguments) -> Keys:
    """Return how often to evaluate, as far as that needs no length of the data."""
    every = given.check_val_every_n_epoch
    if given.limit_val_batches is not None and given.limit_val_batches == 0:
        return {"training.evaluate_every_epochs": 0}
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ConfigError(f"check_val_every_n_epoch={every!r}: expected a whole number from 1")
    value = given.val_check_interval
    if isinstance(value, str | dict | datetime.timedelta):
        raise ConfigError(
            f"val_check_interval={value!r}: evaluations come after steps or epochs, never by the "
            "clock, which differs from run to run: give a number of batches"
        )
    if value is not None and (value <= 0 or (value > 1 and value % 1)):
        raise ConfigError(
            f"val_check_interval={value!r}: expected a part of the epoch or a number of batches"
        )
    if every is None:
        if not isinstance(value, int):
            raise ConfigError(
                f"val_check_interval={value!r} without check_val_every_n_epoch: expected a whole "
                "number of batches"
            )
        return _every_steps(value, given.accumulate_grad_batches)
    return {"training.evaluate_every_epochs": every}


def evaluation_keys(given: TrainerArguments, batches: int | None) -> Keys:
    """Return how often to evaluate within an epoch of so many batches; None: not known.

    Raises:
        ConfigError: if the epoch is no multiple of what is between two evaluations.
    """
    value, every = given.val_check_interval, given.check_val_every_n_epoch
    if every is None or value is None or (isinstance(value, float) and value == 1.0):
        return {}
    if batches is None:
        raise ConfigError(
            f"Trainer: val_check_interval={value!r}: the length of an epoch is not known yet; give "
            "it in batches, with check_val_every_n_epoch=None",
            everywhere=True,
        )
    wanted = int(value) if value > 1 or isinstance(value, int) else max(1, int(batches * value))
    if wanted == batches:
        return {}
    if every != 1 or batches % wanted:
        raise ConfigError(
            f"Trainer: val_check_interval={value!r} is every {wanted} of the {batches} batches of "
            "an epoch, counted from its beginning; here evaluations come after equal numbers of "
            f"steps: check_val_every_n_epoch=None with val_check_interval={wanted} does so",
            everywhere=True,
        )
    return {
        "training.evaluate_every_epochs": 0,
        **_every_steps(wanted, given.accumulate_grad_batches),
    }


def _every_steps(batches: int, accumulated: int) -> Keys:
    if batches % accumulated:
        raise ConfigError(
            f"val_check_interval={batches} batches are not a whole number of steps of "
            f"accumulate_grad_batches={accumulated}"
        )
    return {
        "training.evaluate_every_epochs": 0,
        "training.evaluate_every_steps": batches // accumulated,
    }


def _limits(given: TrainerArguments) -> Keys:
    """Return how much of the data is taken; Lightning counts batches before accumulation."""
    accumulated = given.accumulate_grad_batches
    keys: Keys = {}
    if given.fast_dev_run:
        keys["training.fast_dev_run"] = given.fast_dev_run
    for name, key in _LIMITS.items():
        value = getattr(given, name)
        is_part = isinstance(value, float)
        if value in (None, 0) or (is_part and value == 1.0):
            continue
        if isinstance(value, bool) or value < 0 or (is_part and value > 1 and value % 1):
            raise ConfigError(f"{name}={value!r}: expected a part of the data or a number of them")
        if is_part and value < 1:
            keys[key] = value
            continue
        if name != "limit_val_batches" and isinstance(accumulated, int) and value % accumulated:
            raise ConfigError(
                f"{name}={value!r} batches are not a whole number of steps of "
                f"accumulate_grad_batches={accumulated}"
            )
        keys[key] = int(value) // (1 if name == "limit_val_batches" else accumulated)
    if given.limit_train_batches == 0 and given.limit_train_batches is not False:
        raise ConfigError("limit_train_batches=0 trains nothing: trainer.validate evaluates")
    return keys


_LIMITS = {
    "limit_train_batches": "training.limit_train_batches",
    "limit_val_batches": "training.limit_validation_batches",
    "overfit_batches": "training.overfit_batches",
}


def _accumulation(given: TrainerArguments) -> Keys:
    value = given.accumulate_grad_batches
    if isinstance(value, dict):
        raise ConfigError(
            f"accumulate_grad_batches={value!r}: a schedule of it would change the global batch in "
            "mid-run: give one number"
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"accumulate_grad_batches={value!r}: expected a whole number from 1")
    return {}


def _clipping(given: TrainerArguments) -> Keys:
    value, algorithm = given.gradient_clip_val, given.gradient_clip_algorithm
    named = "norm" if algorithm is None else str(getattr(algorithm, "value", algorithm)).lower()
    if named not in ("norm", "value"):
        raise ConfigError(f'gradient_clip_algorithm={algorithm!r}: expected "norm" or "value"')
    if value is None or value <= 0:
        return {}
    return {f"training.clip_{named}": float(value)}


def _arithmetic(given: TrainerArguments) -> Keys:
    if given.deterministic not in (None, False, True):
        raise ConfigError(
            f"deterministic={given.deterministic!r}: True refuses what torch cannot do with equal "
            "bits, False allows it; there is nothing in between"
        )
    return {
        **_profile(given.profiler),
        **({"training.detect_anomaly": True} if given.detect_anomaly else {}),
        "run.deterministic": bool(given.deterministic),
        "training.cudnn_benchmark": bool(given.benchmark),
        "training.sync_batchnorm": bool(given.sync_batchnorm),
    }


def _profile(profiler: Any) -> Keys:
    """Return the keys for a profiler: what takes time by phase is in metrics.jsonl in any case."""
    name = profiler if isinstance(profiler, str) else type(profiler).__name__
    if profiler is None or name in ("simple", "SimpleProfiler", "PassThroughProfiler"):
        return {}
    if name in ("pytorch", "PyTorchProfiler"):
        return {"profile.active_steps": 3}
    raise ConfigError(
        f'profiler={profiler!r}: profiler="pytorch" traces three steps, and metrics.jsonl has the '
        "seconds of every phase"
    )


def _logging(given: TrainerArguments) -> Keys:
    every = given.log_every_n_steps
    keys: Keys = {"logging.every_steps": 50 if every is None else every or NEVER}
    if given.enable_progress_bar is False:
        keys["logging.progress"] = "none"
    return keys


def _checkpoints(given: TrainerArguments) -> Keys:
    if given.enable_checkpointing is False:
        return {"checkpoint.every_epochs": 0, "checkpoint.keep_last": 1}
    return {}


def _plugins(given: TrainerArguments) -> Keys:
    plugins = given.plugins if isinstance(given.plugins, list | tuple) else [given.plugins]
    for plugin in filter(None, plugins):
        bases = [base.__name__ for base in type(plugin).__mro__]
        # Which rank this is, the launch finds out and proves.
        if "ClusterEnvironment" not in bases:
            raise ConfigError(
                f"plugins={type(plugin).__name__}(...): precision=, strategy= and the run folder "
                "say what plugins would; one of your own has no place here"
            )
    return {}


def _refused(given: TrainerArguments) -> Keys:
    problems = [
        f"{name}={getattr(given, name)!r}: {way_out}"
        for name, (off, way_out) in _NOT_HERE.items()
        if getattr(given, name) not in off
    ]
    if problems:
        raise ConfigError("\n  ".join(problems))
    return {}


_NOT_HERE: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "reload_dataloaders_every_n_epochs": (
        (0,),
        "a run has one order of its data, from its first epoch on: what changes is for __getitem__",
    ),
    "model_registry": ((None,), "nothing is uploaded"),
}
"""Arguments without a counterpart: the values that ask for nothing, and the way out."""


_RULES: tuple[Callable[[TrainerArguments], Keys], ...] = (
    _device,
    _number_format,
    _strategy,
    _length,
    _validation,
    _accumulation,
    _limits,
    _clipping,
    _arithmetic,
    _logging,
    _checkpoints,
    _plugins,
    _refused,
)
