"""Lightning's own callbacks: keys of the config where a key does their work.

A class of the user's is called, whatever it inherits from; only the classes that Lightning itself
ships are known here, by name and module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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

    A subclass is what it inherits from, with other arguments; `own_methods` tells what else it is.
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
    "SpikeDetection": "a loss far above the last ones is told in the log",
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
    "BatchSizeFinder": "`python -m hpctrain check` tells whether a batch size fits into memory",
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
