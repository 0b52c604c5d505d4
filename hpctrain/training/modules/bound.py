"""A module with what it is given: a trainer, hooks and logs, and batches as its steps take them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from typing_extensions import Self

from hpctrain.config import Config
from hpctrain.errors import ConfigError
from hpctrain.launch.process_group import World
from hpctrain.training.components import Brought
from hpctrain.training.metric_objects import MetricObjects
from hpctrain.training.modules.data_trainer import DataTrainer
from hpctrain.training.modules.hooks import Hooks, refuse_unknown_ways
from hpctrain.training.modules.log import Logs
from hpctrain.training.modules.overrides import is_module, is_own
from hpctrain.training.modules.stand_in import TrainerStandIn, attach, note_device
from hpctrain.training.position import StopAt


class BoundModule:
    """A module that has been given what Lightning gives it.

    Attributes:
        module: the bare one.
        trainer: what it knows as `self.trainer`.
        logs: what it logs.
        hooks: its hooks, and those of callbacks.
        objects: the torchmetrics objects that it holds.
        takes_index: whether a step takes the number of its batch, by name.
        inputs: fields of a batch that are cast to the run's precision; none: all, if that casts
            the model, as Lightning has it.
    """

    inputs: Sequence[str]

    def __init__(self, batch: Literal["dict", "tuple"]) -> None:
        """Begin without a module.

        Args:
            batch: what a step gets of HDF5 files: a dict by field, or a tuple in their order.
        """
        self._batch = batch

    def bind(self, module: nn.Module, config: Config, world: World, stop_at: StopAt) -> None:
        """Take the module, and give it its trainer and its hooks.

        Raises:
            ConfigError: if it is none, or does what cannot be done here.
        """
        if not is_module(module):
            raise ConfigError(
                f"model.use: {type(module).__name__} has no training_step of its own, so what to "
                "train it for has to be said: by [task] and [optimizer], or by a training_step"
            )
        refuse_unknown_ways(module)
        self.module = module
        self.trainer = TrainerStandIn(config, world, stop_at, module)
        self.trainer.state.begin("fit")
        self.logs = Logs(world.communicator, world.device)
        self.hooks = Hooks(module, self.trainer, self.logs)
        self._world = world
        self._stop_at = stop_at
        attach(module, self.trainer, self.logs)
        self.takes_index = {
            name: _takes_index(getattr(module, name))
            for name in ("training_step", "validation_step", "test_step", "predict_step")
            if callable(getattr(module, name, None))
        }

    def know(self, brought: Brought) -> None:
        """Have the module know by its trainer what was brought."""
        self.trainer.know_loggers(brought.shown_loggers)
        # A module that makes its loaders itself is no datamodule.
        is_own = getattr(brought.datamodule, "of_module", False)
        self.trainer.datamodule = None if is_own else brought.datamodule
        introduced = getattr(brought.datamodule, "trainer", None)
        if isinstance(introduced, DataTrainer):
            introduced.bind(self.trainer)
        self.trainer.know_loaders(brought.given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a task of a copy of the module, for trials: it has the same trainer and logs."""
        copied = copy.copy(self)
        copied.module = copy.deepcopy(self.module, memo)
        attach(copied.module, self.trainer, self.logs)
        return copied

    def set_up(self, stage: str = "fit") -> None:
        """Have the module make what it makes by itself: `setup`, `configure_model`."""
        hooks = self.hooks
        hooks.call("setup", stage)
        hooks.trial = True  # until the training proper begins
        hooks.call("configure_model")
        # Layers may have come that know neither their trainer nor where to log.
        attach(self.module, self.trainer, self.logs)

    def prepare_data(self) -> None:
        """Have the module fetch what it needs. On one rank of each node, or of all."""
        self.hooks.call("prepare_data")

    @property
    def prepare_data_per_node(self) -> bool:
        """Whether each node fetches for itself."""
        return bool(getattr(self.module, "prepare_data_per_node", True))

    @property
    def scheduler_step(self) -> Callable[[Any, Any], None] | None:
        """How an LR scheduler is stepped; None: as torch's are."""
        if not self.hooks.has("lr_scheduler_step"):
            return None
        return lambda scheduler, metric: self.hooks.call("lr_scheduler_step", scheduler, metric)

    def begin(self, optimizer: Optimizer, uses: Sequence[Any] = ()) -> None:
        """Take note of what was built, before the first pass.

        Args:
            optimizer: the one that trains the module.
            uses: its LR schedulers.
        """
        self.trainer.optimizers = [optimizer]
        self.trainer.lr_scheduler_configs = list(uses)
        self.trainer.strategy._lightning_optimizers = [optimizer]
        note_device(self.module, self._world.device)
        self.objects = MetricObjects(self, self._world.device)
        self.objects.keep_local()
        self.trainer.state.stage = "train"
        self.hooks.call("on_fit_start")

    @property
    def validates(self) -> bool:
        """Whether there is a `validation_step`."""
        return is_own(self.module, "validation_step")

    def batch(self, fields: Any) -> Any:
        """Return a batch as the module's steps take it."""
        batch: Any = fields
        if self._batch == "tuple":
            batch = tuple(fields[name] for name in self.inputs or fields)
        hooks, loader = self.hooks, self.logs.loader or 0
        if hooks.has("on_before_batch_transfer"):
            batch = hooks.call("on_before_batch_transfer", batch, loader)
        if hooks.has("transfer_batch_to_device"):
            batch = hooks.call("transfer_batch_to_device", batch, self._world.device, loader)
        if hooks.has("on_after_batch_transfer"):
            batch = hooks.call("on_after_batch_transfer", batch, loader)
        return batch


def _takes_index(step: Callable[..., Any]) -> bool:
    """Tell whether a step takes a batch and an index, whatever their names."""
    kinds = [item.kind for item in inspect.signature(step).parameters.values()]
    positional = [kind for kind in kinds if kind.name.startswith("POSITIONAL")]
    return len(positional) > 1 or inspect.Parameter.VAR_POSITIONAL in kinds
