"""Attributes of the Trainer by Lightning's names: of its arguments, its ranks and its last run."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hpctrain.config import Config
from hpctrain.config.choices import choices
from hpctrain.errors import ConfigError
from hpctrain.launch.environment import Claim
from hpctrain.lightning.arguments import Mapped, TrainerArguments, mapped
from hpctrain.lightning.folders import Checkpoints
from hpctrain.topology import Topology
from hpctrain.training.modules.trainer_state import State

_OF_ARGUMENTS = (
    *("accumulate_grad_batches", "check_val_every_n_epoch", "fast_dev_run", "gradient_clip_val"),
    *("gradient_clip_algorithm", "limit_predict_batches", "limit_test_batches"),
    *("limit_train_batches", "limit_val_batches", "log_every_n_steps", "max_steps", "min_epochs"),
    *("min_steps", "num_sanity_val_steps", "overfit_batches", "val_check_interval"),
    *("reload_dataloaders_every_n_epochs", "enable_autolog_hparams", "barebones", "profiler"),
)
"""Attributes that are the arguments themselves."""

_FIXED = frozenset(each.name for each in fields(TrainerArguments)) - {"callbacks"} | {"loggers"}
"""What a Trainer is made with, and what nothing would come of if a script set it later."""

_BEFORE = {
    "callback_metrics": {},
    "logged_metrics": {},
    "progress_bar_metrics": {},
    "global_step": 0,
    "current_epoch": 0,
    "should_stop": False,
    "interrupted": False,
    "lr_scheduler_configs": [],
    "optimizers": [],
    "training": False,
    "validating": False,
    "testing": False,
    "predicting": False,
    "evaluating": False,
    "sanity_checking": False,
}
"""Attributes that are of a run, before there is one."""


class Facts:
    """Facts of a Trainer: of its arguments, of the ranks, and of its last run.

    Attributes:
        callbacks: those given, that are called, or whose work keys do.
        loggers: those given.
        model: the module of the last call; `lightning_module` is another name for it.
        datamodule: of the last call.
    """

    def __init__(self, claim: Claim, found: Mapped, given: TrainerArguments) -> None:
        self._given = given
        self._claim = claim
        self._topology: Topology | None = None
        self._config: Config | None = None
        self._show_callbacks(found)
        self._shown_loggers = found.shown_loggers
        self.loggers: list[Any] = [each for each in found.shown_loggers if each is not None]
        self.model: Any = None
        self.datamodule: Any = None
        self.precision = found.keys.get("training.precision", "32-true")
        self.max_epochs = found.keys.get("training.max_epochs", -1)
        self._state = State()
        self._is_made = True

    def _show_callbacks(self, found: Mapped) -> None:
        self.callbacks: list[Any] = [*found.callbacks, *found.checkpoints, *found.stoppings]
        self._callbacks_before = list(self.callbacks)
        self.checkpoint_callbacks: list[Any] = list(found.checkpoints)
        if not self.checkpoint_callbacks and self._given.enable_checkpointing is not False:
            self.checkpoint_callbacks = [Checkpoints()]
        self.early_stopping_callbacks: list[Any] = list(found.stoppings)

    def _understand_callbacks(self) -> Mapped | None:
        """Return what the arguments come to with what a script has done to `callbacks` since.

        Returns:
            None: it has done nothing.

        Raises:
            ConfigError: if one of them cannot be had.
        """
        before, now = self._callbacks_before, self.callbacks
        if [*map(id, before)] == [*map(id, now)]:
            return None
        gone = {id(each) for each in before} - {id(each) for each in now}
        given = self._given.callbacks
        listed = [] if given is None else given if isinstance(given, list | tuple) else [given]
        kept = [each for each in listed if id(each) not in gone]
        known = {id(each) for each in (*listed, *before)}
        added = [each for each in now if id(each) not in known]
        self._given = replace(self._given, callbacks=[*kept, *added])
        found = mapped(self._given, choices())
        self._show_callbacks(found)
        return found

    @property
    def lightning_module(self) -> Any:
        return self.model

    @property
    def checkpoint_callback(self) -> Any:
        return self.checkpoint_callbacks[0] if self.checkpoint_callbacks else None

    @property
    def early_stopping_callback(self) -> Any:
        return self.early_stopping_callbacks[0] if self.early_stopping_callbacks else None

    @property
    def state(self) -> State:
        of_run = stand_in_of(self.model)
        return self._state if of_run is None else of_run.state

    @property
    def logger(self) -> Any:
        """The first; where the run writes by itself, what a module finds as `self.logger`."""
        if not self._shown_loggers or self._shown_loggers[0] is not None:
            return self.loggers[0] if self.loggers else None
        of_run = stand_in_of(self.model)
        if of_run is not None and of_run.logger is not None:
            return of_run.logger
        from hpctrain.training.modules.run_logger import RunLogger

        # There is no run yet: it takes what a script sets, and writes nothing.
        return RunLogger(Path(self.default_root_dir), writes=False, trainer=self)

    @property
    def default_root_dir(self) -> str:
        return str(self._given.default_root_dir or Path.cwd())

    @property
    def log_dir(self) -> str | None:
        """Folder of the last run; None: there was none yet."""
        return None if self._config is None else str(run_folder(self._config))

    @property
    def world_size(self) -> int:
        if self._topology is not None:
            return self._topology.world_size
        return self._claim.world_size or 1

    @property
    def global_rank(self) -> int:
        return self._claim.rank or 0 if self._topology is None else self._topology.rank

    @property
    def local_rank(self) -> int:
        if self._topology is not None:
            return self._topology.local_rank
        return self._claim.local_rank or 0

    @property
    def node_rank(self) -> int:
        return 0 if self._topology is None else self._topology.node_rank

    @property
    def num_nodes(self) -> int:
        return self._given.num_nodes if self._topology is None else self._topology.num_nodes

    @property
    def num_devices(self) -> int:
        if self._topology is not None:
            return self._topology.local_world_size
        return self._claim.local_world_size or 1

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    def print(self, *values: Any, **options: Any) -> None:
        """Print on rank 0."""
        if self.is_global_zero:
            print(*values, **options)  # noqa: T201 - what the user asked for

    def begins(self, model: Any, datamodule: Any, config: Config, topology: Topology) -> None:
        """Take note of the run that is about to begin."""
        self.model, self.datamodule = model, datamodule
        self._config, self._topology = config, topology

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and "_is_made" in self.__dict__:
            argument = "logger" if name == "loggers" else name
            raise ConfigError(
                f"trainer.{name} is set where the Trainer is made: Trainer({argument}=...), a new "
                "one for another fit",
                everywhere=True,
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and not name.endswith("_connector"):
            raise AttributeError(name)
        if name.startswith("_"):
            raise AttributeError(
                f"trainer.{name} is of the inside of Lightning's Trainer, and so is whatever asks "
                "for it: in place of Tuner.scale_batch_size `python -m hpctrain check` tells "
                "whether a batch fits into memory"
            )
        if name in _OF_ARGUMENTS:
            return getattr(self._given, name)
        # What modules see as `self.trainer` knows the run, and still does after its end.
        of_run = stand_in_of(self.__dict__.get("model"))
        if of_run is not None and hasattr(of_run, name):
            return getattr(of_run, name)
        if name in _BEFORE:
            return _BEFORE[name]
        raise AttributeError(
            f"trainer.{name}: hpctrain.lightning.Trainer has no such attribute; "
            "docs/from-lightning.md has a row for every one of Lightning's, with what stands for it"
        )


def run_folder(config: Config) -> Path:
    """Return the folder of the run that a config names."""
    return Path(config.run.directory, config.run.name)


def stand_in_of(model: Any) -> Any:
    """Return what a module has as its `trainer`; None before its first run."""
    if model is None:
        return None
    from hpctrain.training.modules.stand_in import trainer_of

    return trainer_of(model)
