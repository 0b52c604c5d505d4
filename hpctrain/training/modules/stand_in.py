"""`self.trainer` of a module: facts of the run, and nothing that would steer it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from hpctrain.batch.stop import END_DUE
from hpctrain.config import Config
from hpctrain.errors import TrainingError
from hpctrain.launch.process_group import World
from hpctrain.observe.metrics import MetricsWriter
from hpctrain.training.compiler import is_loaded
from hpctrain.training.modules.overrides import inner_modules
from hpctrain.training.modules.run_logger import RunLogger
from hpctrain.training.modules.trainer_state import State
from hpctrain.training.position import Position, StopAt


class Strategy:
    """What modules ask of a strategy: to talk to the other ranks. Collective: all ranks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._lightning_optimizers: list[Optimizer] = []
        self.root_device = world.device
        self.world_size = world.topology.world_size
        self.global_rank = world.topology.rank
        self.local_rank = world.topology.local_rank
        self.is_global_zero = world.topology.is_rank_zero

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        del name
        self._world.communicator.barrier()

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """Return a rank's value on all of them."""
        if src:
            return self._world.communicator.all_gather(value)[src]
        return self._world.communicator.broadcast(value)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return the tensors of all ranks, stacked; on one rank the tensor itself.

        Ranks may have other numbers of rows, since every sample is seen once: then it is one tensor
        of all rows, (1, rows of all ranks, ...), which is flattened to the same as a stack is.

        Raises:
            TrainingError: on every rank, if the tensors differ in more than their rows.
        """
        if self.world_size == 1:
            return tensor
        if group is None or group is dist.group.WORLD:
            return self._of_all_ranks(tensor, sync_grads=sync_grads)
        if sync_grads:
            from torch.distributed.nn.functional import all_gather

            return torch.stack(all_gather(tensor.contiguous(), group))
        pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, tensor.contiguous(), group)
        return torch.stack(pieces)

    def _of_all_ranks(self, tensor: Tensor, *, sync_grads: bool) -> Tensor:
        from hpctrain.training.parallel.gather_rows import gather_rows

        shapes = self._world.communicator.all_gather(list(tensor.shape))
        given = tensor if sync_grads else tensor.detach()
        if all(shape == shapes[0] for shape in shapes):
            return gather_rows(self._world, given.unsqueeze(0), [1] * len(shapes))
        if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            listed = ", ".join(str(tuple(shape)) for shape in shapes)
            raise TrainingError(
                f"all_gather: the ranks have tensors of other shapes, {listed}: what is gathered "
                "may differ in its rows, the first axis, alone",
                everywhere=True,
            )
        return gather_rows(self._world, given, [shape[0] for shape in shapes]).unsqueeze(0)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the mean, or the sum, of a tensor over the ranks."""
        if self.world_size == 1 or not isinstance(tensor, Tensor):
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, group=group)
        is_mean = str(reduce_op).lower() in ("mean", "avg", "none")
        return total / self.world_size if is_mean else total


class PredictLoop:
    """What callbacks that write predictions ask of Lightning's loop, of this rank.

    Attributes:
        keeps: whether outputs are kept.
        return_predictions: whether outputs are kept for the end.
        predictions: outputs of all batches so far, where a callback wants them at the end; of
            several loaders a list for each.
        current_batch_indices: samples of the dataset that the batch is made of.
        epoch_batch_indices: the same of all batches so far, a list for each loader.
    """

    def __init__(self) -> None:
        self.return_predictions = False
        self.current_batch_indices: list[int] = []
        self.epoch_batch_indices: list[list[list[int]]] = []
        self._kept: list[list[Any]] = []
        self.keeps = False

    @property
    def predictions(self) -> list[Any]:
        return self._kept[0] if len(self._kept) == 1 else self._kept

    @property
    def num_dataloaders(self) -> int:
        return len(self._kept)

    def begin(self, loaders: int, callbacks: Sequence[Any]) -> None:
        """Begin with the first batch; what is predicted is kept where a callback wants it."""
        self.keeps = any(hasattr(each, "write_on_epoch_end") for each in callbacks)
        self._kept = [[] for _ in range(loaders)]
        self.epoch_batch_indices = [[] for _ in range(loaders)]

    def begin_batch(self, rows: Sequence[int], loader: int) -> None:
        """Take note of the samples of the batch that comes next."""
        self.current_batch_indices = list(rows)
        if self.keeps:
            self.epoch_batch_indices[loader].append(self.current_batch_indices)

    def keep(self, loader: int, output: Any) -> None:
        """Take the output of a batch, on the host."""
        if self.keeps:
            self._kept[loader].append(output)


_STEERING = frozenset(
    {
        *("max_epochs", "max_steps", "min_epochs", "min_steps", "precision", "fast_dev_run"),
        *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
        *("check_val_every_n_epoch", "val_check_interval", "log_every_n_steps"),
        *("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"),
        *("num_training_batches", "reload_dataloaders_every_n_epochs"),
    }
)
"""What Lightning's loops look at while they run, and what is settled here when a run begins."""


class TrainerStandIn:
    """Facts of the run for a module: what is not here cannot be asked, and says so.

    Attributes:
        should_stop: set by a module or callback: all ranks agree to end here, complete.
    """

    # Modules see what Lightning's own trainer has under these names.
    def __init__(self, config: Config, world: World, stop_at: StopAt, module: nn.Module) -> None:
        topology, training = world.topology, config.training
        self.global_step = self.current_epoch = 0
        self.is_last_batch = False
        self._stop_at = stop_at
        self.lightning_module = self.model = module
        self.world_size = topology.world_size
        self.global_rank = topology.rank
        self.local_rank = topology.local_rank
        self.node_rank = topology.node_rank
        self.num_nodes = topology.num_nodes
        self.num_devices = topology.local_world_size
        self.is_global_zero = topology.is_rank_zero
        self.max_epochs = -1 if training.max_epochs is None else training.max_epochs
        self.max_steps = -1 if training.max_steps is None else training.max_steps
        self.min_epochs, self.min_steps = training.min_epochs, training.min_steps
        self.num_training_batches = stop_at.epoch_steps
        self.num_val_batches: Sequence[int] = ()
        self.know_loaders({})
        self.accumulate_grad_batches = 1
        self.gradient_clip_val = training.clip_norm or training.clip_value
        self.gradient_clip_algorithm = "norm" if training.clip_norm else None
        self.check_val_every_n_epoch = training.evaluate_every_epochs
        self.log_every_n_steps = config.logging.every_steps
        self.precision = training.precision
        folder = str(Path(config.run.directory, config.run.name))
        self.default_root_dir = self.log_dir = folder
        self.strategy = Strategy(world)
        self.predict_loop = PredictLoop()
        self.state = State()
        self.callbacks: list[Any] = []
        self.checkpoint_callback = self.early_stopping_callback = None
        self.progress_bar_callback = None
        self.datamodule: Any = None
        self.loggers: list[Any] = []
        self.optimizers: list[Optimizer] = []
        self.lr_scheduler_configs: list[Any] = []
        self.barebones = self.should_stop = False
        self.fast_dev_run = training.fast_dev_run
        self.enable_validation = True
        self.ckpt_path: str | None = None
        self.callback_metrics: Mapping[str, Tensor] = {}
        self.logged_metrics: Mapping[str, Tensor] = {}
        self.progress_bar_metrics: Mapping[str, float] = {}
        self._is_made = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STEERING and "_is_made" in self.__dict__:
            raise AttributeError(
                f"self.trainer.{name} cannot be set: what a run does is settled when it begins, by "
                "its config or the Trainer's arguments; self.trainer.should_stop = True ends it"
            )
        super().__setattr__(name, value)

    def know_loaders(self, given: Mapping[str, Any]) -> None:
        """Take the loaders as the user has made them, which modules ask for their datasets."""
        made = {name: getattr(each, "iterables", each) for name, each in given.items()}
        self.train_dataloader = made.get("train")
        self.val_dataloaders = made.get("validation")
        self.test_dataloaders = made.get("test")
        self.predict_dataloaders = made.get("predict")

    def know_loggers(self, shown: Sequence[Any]) -> None:
        """Take the loggers of a module; None among them stands for the run's own."""
        own = RunLogger(Path(self.log_dir), writes=self.is_global_zero, trainer=self)
        self.loggers = [own if each is None else each for each in shown]

    def write_to(self, writer: MetricsWriter) -> None:
        """Have the run's own logger write from now on."""
        for each in self.loggers:
            if isinstance(each, RunLogger):
                each.write_to(writer)

    def end_due(self) -> int:
        """Return END_DUE if the run is to end, for the agreement of all ranks."""
        return END_DUE if self.should_stop else 0

    @property
    def estimated_stepping_batches(self) -> int | float:
        """How many optimizer steps the run takes."""
        return self._stop_at.total_steps(Position()) or math.inf

    @property
    def device_ids(self) -> list[int]:
        index = self.strategy.root_device.index
        return [self.local_rank if index is None else index]

    @property
    def logger(self) -> Any:
        return self.loggers[0] if self.loggers else None

    @property
    def training(self) -> bool:
        return self.state.stage == "train"

    @property
    def validating(self) -> bool:
        return self.state.stage == "validate"

    @property
    def testing(self) -> bool:
        return self.state.stage == "test"

    @property
    def predicting(self) -> bool:
        return self.state.stage == "predict"

    @property
    def evaluating(self) -> bool:
        return self.validating or self.testing

    @property
    def sanity_checking(self) -> bool:
        return self.state.stage == "sanity_check"

    def print(self, *args: Any, **keywords: Any) -> None:
        """Print on rank 0."""
        if self.is_global_zero:
            print(*args, **keywords)  # noqa: T201 - what the user asked for

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = sorted(each for each in {*vars(self), *dir(type(self))} if not each.startswith("_"))
        raise AttributeError(
            f"self.trainer.{name}: hpctrain's trainer for modules has no such attribute; it has "
            f"{', '.join(known)}. What steers a run is in its config; for a loop of your own see "
            "docs/own-code.md"
        )

    def __deepcopy__(self, memo: Any) -> TrainerStandIn:
        return self  # copies of a module, such as averages, know the same run


def attach(module: nn.Module, trainer: TrainerStandIn, logs: Any) -> None:
    """Give a module, and those inside it, its trainer, `self.log`, and what is like it."""
    names = ("log", "log_dict", "log_image", "log_histogram")
    given = {name: getattr(logs, name) for name in names}
    if is_loaded():
        # Steps that are compiled leave their graph for it: what it adds up is no constant of one.
        given = {name: torch.compiler.disable(each) for name, each in given.items()}
    for each in inner_modules(module):
        if hasattr(type(each), "trainer"):
            each._trainer = trainer  # type: ignore[assignment]
        else:
            each.trainer = trainer  # type: ignore[assignment]
        each.__dict__.update(given)


def trainer_of(module: object) -> Any:
    """Return what a module knows as its trainer; None before its first run."""
    found = getattr(module, "_trainer", None)
    return found if found is not None else getattr(module, "__dict__", {}).get("trainer")


def note_device(module: nn.Module, device: torch.device) -> None:
    """Tell modules where their parameters are, as `self.device` has it.

    Lightning's base class takes that down when its `to` is called, and nobody calls that here.
    """
    for each in module.modules():
        if any(kind.__name__ == "_DeviceDtypeModuleMixin" for kind in type(each).__mro__):
            each._device = device  # type: ignore[assignment]
            dtypes = [item.dtype for item in each.parameters() if item.is_floating_point()]
            if dtypes:
                each._dtype = dtypes[0]  # type: ignore[assignment]
