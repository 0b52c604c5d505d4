"""The step: forward, backward, gradient clipping, update; the all-reduce of the training loss.

Of a global batch, whatever its split over ranks and passes; without a host sync.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from hpctrain.checkpoint.optimizer_state import OptimizerState
from hpctrain.checkpoint.state import HasParameters, Json
from hpctrain.config import Config
from hpctrain.config.schema import TrainingSection
from hpctrain.data.loading.batch import Samples, ShareOfBatch, count_passes, cut, map_tensors
from hpctrain.errors import ConfigError
from hpctrain.launch.process_group import World
from hpctrain.training.dry_run.step import Explain, dry_run, find_coupling
from hpctrain.training.model.precision import LossScale
from hpctrain.training.model.registered_state import RegisteredState
from hpctrain.training.model.undisturbed import Disturbance
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.modules.task_log import TaskLog
from hpctrain.training.nonfinite import RECENT_STEPS, BadBatch, bad_among
from hpctrain.training.optim.ema import EvaluationWeights, WeightAverage, has_modes
from hpctrain.training.parallel.ddp import DDPModel
from hpctrain.training.passes import OwnGradients, Passes
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import check_task
from hpctrain.training.update import Update

if TYPE_CHECKING:  # torch takes its time to load what only sharded runs need
    from hpctrain.training.parallel.fsdp import ShardedModel


class Shapes(Protocol):
    """What a step has to know of the batches to come."""

    @property
    def largest_share(self) -> int:
        """The most samples of any rank in any batch."""
        ...

    @property
    def smallest_share(self) -> int:
        """The fewest."""
        ...

    @property
    def largest_pass(self) -> int | None:
        """The most samples of a pass, where their values bound it; None: the config does."""
        ...

    def example(self, count: int = 1) -> Any:
        """Return one sample so many times, as a pass has them, on the device."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """What a config says of a step.

    Attributes:
        training: clipping, moving average, and how DDP reduces gradients.
        micro_batch_size: at most so many samples in one pass; None: a rank's whole share.
    """

    training: TrainingSection
    micro_batch_size: int | None = None

    @classmethod
    def of(cls, config: Config, shapes: Shapes) -> StepOptions:
        """Return those of a config; where values of samples bound a pass, its bound is theirs."""
        size = shapes.largest_pass or config.data.micro_batch_size
        return cls(training=config.training, micro_batch_size=size)


class TrainStep:
    """Forward, backward, clip, update; call it with a batch and a learning rate.

    The gradient is that of the mean over the global batch, whatever the shares of the ranks: each
    sums over its own samples, and DDP's mean over ranks is undone. All ranks run the same number of
    passes, `grad_accum_steps`; a pass without samples runs one held row with weight 0.

    Attributes:
        model: the bare model, to evaluate and to save.
        optimizer: its optimizer.
        scaler: of the loss, in mixed float16; its state belongs into a checkpoint.
        grad_accum_steps: passes per rank and step.
        rows: samples of the largest pass.
        optimizer_state: what the optimizer has learned.
        registered: whatever else is saved with the run, by name.
        average: moving average of the parameters, updated by the job; None where none is wanted.
        evaluation: the optimizer's own weights for evaluations; None where it has one set only.
        sharded: the parameters where they are spread over the ranks, else None.
        disturbance: what the dry run has seen the model do to itself.
        task_log: what a hand-written task logs; None: it does not.
        syncs: whether every step waits for the device, because the optimizer cannot refuse a bad
            update by itself.
        runner: the task and the model, as an evaluation runs them.
    """

    def __init__(
        self,
        runner: TaskRunner,
        optimizer: Optimizer,
        world: World,
        *,
        options: StepOptions,
        shapes: Shapes,
        example: Any,
        sharded: ShardedModel | None = None,
    ) -> None:
        """Wrap the model. Collective: all ranks.

        Args:
            runner: the task that computes the loss, and the model: on the device, in the dtype of
                its `number_format`, identical on all ranks.
            optimizer: of the model's parameters.
            world: the ranks.
            options: what the config says of a step.
            shapes: of the batches to come.
            example: one sample of them, on the device, as a pass has it.
            sharded: the model where its parameters are spread over the ranks, and the optimizer's
                are those of `sharded`; None: every rank has all of them.

        Raises:
            ConfigError: if the task is none, a model with SyncBatchNorm would meet a pass without
                samples, or weights were to be averaged twice.
        """
        model, task, number_format = runner.model, runner.task, runner.number_format
        training, graphs = options.training, runner.graphs
        check_task(task)
        self._module = task if isinstance(task, ModuleTask) else None
        self.task_log = None if self._module else TaskLog.of(task, world)
        self.grad_accum_steps = count_passes(shapes.largest_share, options.micro_batch_size)
        if shapes.smallest_share < self.grad_accum_steps and world.topology.world_size > 1:
            _refuse_synchronised_statistics(model)
        self.model = model
        self.device = world.device
        self.optimizer = optimizer
        self.optimizer_state = OptimizerState(optimizer, rows=sharded is not None)
        self.registered = RegisteredState(world.device)
        self.sharded = sharded
        self._task = task
        self._world_size = world.topology.world_size
        self._communicator = world.communicator
        self._device = world.device
        self._pulse = world.pulse
        self._arithmetic = number_format.arithmetic()
        self._held = number_format.cast(map_tensors(torch.clone, example), task.inputs)
        self._shapes = shapes
        self._format = number_format
        self.rows = max(1, -(-shapes.largest_share // self.grad_accum_steps))
        self._wrapped: DDPModel | ShardedModel = sharded or DDPModel(
            model, self._world_size, world.device, training
        )
        self.scaler = LossScale(world.device, enabled=number_format.scaled)
        self._passes = Passes(
            task,
            self._wrapped,
            number_format,
            self.scaler,
            self._held,
            self._world_size,
            world.device,
            reused=graphs,
            task_log=self.task_log,
        )
        self.runner = replace(runner, call=self._wrapped.call_alone)
        self._own_gradients: OwnGradients | None = None
        if graphs and (self.grad_accum_steps > 1 or shapes.largest_pass is not None):
            self._own_gradients = OwnGradients(self._wrapped.parameters)
        self._update = Update(
            optimizer,
            clip_norm=training.clip_norm,
            clip_value=training.clip_value,
            scaler=self.scaler,
            device=torch.device("cpu") if sharded and sharded.offloaded else world.device,
            counted=self._wrapped.counted,
            reduce_norm=self._wrapped.reduce_norm,
        )
        self.syncs = self._update.syncs
        self.disturbance = Disturbance()
        self.average = None
        if training.ema_decay is not None:
            self.average = WeightAverage(self._wrapped, training.ema_decay)
        self.evaluation = (
            EvaluationWeights(optimizer, self._wrapped) if has_modes(optimizer) else None
        )
        if self.average is not None and self.evaluation is not None:
            raise ConfigError(
                f"training.ema_decay: {type(optimizer).__name__} averages weights by itself, and "
                "its evaluations have those: leave ema_decay out"
            )
        # Epoch, start, size and this rank's loss of the newest batches; losses stay on the device.
        self._recent: deque[tuple[int, int, int, Tensor | None]] = deque(maxlen=RECENT_STEPS)

    @property
    def bad_steps(self) -> Tensor:
        """Counts of steps that were not applied, see `BadSteps`; belongs into a checkpoint."""
        return self._update.bad_steps.counts()

    @property
    def held(self) -> HasParameters:
        """What this rank holds of the parameters, and updates."""
        return self._wrapped

    @property
    def idle_row(self) -> Any:
        """One held sample, for passes that only keep the others company."""
        return self._held

    @property
    def last_loss(self) -> Tensor | None:
        """The mean loss of this rank's samples in the last step, (); None if it had none."""
        loss_sum, weight = self._passes.loss_sum, self._passes.weight
        return None if loss_sum is None else loss_sum / weight

    def capture_logged(self, tensors: dict[str, Tensor]) -> Json:
        """Return what was logged in the epoch under way, on this rank; None: nobody logs.

        Args:
            tensors: takes the tensors of it.
        """
        logging = self._module or self.task_log
        return None if logging is None else logging.capture(tensors)

    def restore_logged(self, parts: Sequence[tuple[Json, Mapping[str, Tensor]]]) -> None:
        """Have it go on with what `capture_logged` gave on some ranks, all of it together."""
        logging = self._module or self.task_log
        if logging is not None:
            logging.restore(parts)

    def evaluation_weights(self) -> AbstractContextManager[object]:
        """Return the context in which the model has the weights that evaluations are of."""
        chosen = self.average or self.evaluation
        return nullcontext() if chosen is None else chosen.in_model()

    def settle(self) -> None:
        """Have parameters where an update expects them, after passes without a backward one."""
        self._wrapped.settle()

    def before_update(self, do: Callable[[], None]) -> None:
        """Call something once, before the next time that the optimizer's state changes."""
        self._update.call_before(do)

    def communication_seconds(self) -> float:
        """Return how long this rank has waited for gradients after its own were there."""
        return self._wrapped.communication_seconds

    def dry_run(self, explain: Explain = lambda error, fields: None) -> None:
        """Run the model a few times and leave no trace, before the state is restored.

        Collective: all ranks.

        Args:
            explain: as `dry_run` takes it.

        Raises:
            TrainingError: if model, task and data do not fit.
        """
        samples = self.rows
        fields = self._format.cast(self._shapes.example(samples), self._task.inputs)
        self.disturbance = dry_run(
            self._wrapped,
            self._task,
            fields,
            samples,
            arithmetic=self._arithmetic,
            device=self._device,
            communicator=self._communicator,
            explain=explain,
        )
        self._passes.moves = bool(self.disturbance.moved)

    def find_coupling(self, rows: Samples) -> str | None:
        """Return how the loss of a sample depends on the others of its pass; None: it does not.

        Under FSDP, collective: all ranks.

        Args:
            rows: real ones, at least two; as many on every rank.
        """
        wrapped, task = self._wrapped, self._task
        return find_coupling(wrapped, task, rows, self._format, self._device, self.rows)

    def __call__(self, batch: ShareOfBatch, lr: float | None) -> None:
        """Update the parameters by one global batch. Collective: all ranks.

        Args:
            batch: this rank's share.
            lr: learning rate; None: the groups of the optimizer have it.
        """
        self._pulse.tick()  # a batch has come
        module = self._module
        if module is not None:
            module.begin_step(batch.epoch, batch.start, batch.global_size)
        elif self.task_log is not None:
            self.task_log.begin_step()
        self._wrapped.begin()
        self._passes.loss_sum, self._passes.weight = None, 0
        *before, last = batch.cuts or cut(batch.size, self.grad_accum_steps)
        if before:
            with self._wrapped.local():
                for first, stop in before:
                    loss, seed = self._passes.forward(batch, first, stop)
                    if module is not None:
                        module.before_backward()
                    self._wrapped.backward(loss, seed)
                    if module is not None:
                        module.after_backward()
                    if self._own_gradients is not None:
                        self._own_gradients.keep()
        loss, seed = self._passes.forward(batch, *last)
        if self.task_log is not None:
            self.task_log.end_step()
        counts_samples = self._task.counts_samples
        self._pulse.tick()  # what follows waits for the other ranks
        factor = None if counts_samples else self._passes.reduce_weight(batch.global_size)
        if module is not None:
            module.before_backward()
        self._wrapped.backward_and_reduce(loss, seed)
        if module is not None:
            module.after_backward()
        looks = module is not None and module.hooks.has("on_before_optimizer_step")
        look = self._shown_gradients if looks else None
        self._update.apply(self._wrapped.gradients(), lr, factor, look)
        if module is not None:
            module.stepped()
        self._recent.append((batch.epoch, batch.start, batch.global_size, self._passes.loss_sum))

    def _shown_gradients(self) -> list[Tensor]:
        """Show the gradients to whoever has a hook for it, and return what becomes of them."""
        assert self._module is not None
        self._module.before_update()
        return self._wrapped.gradients()

    def read(self) -> dict[str, float]:
        """Return the numbers of the last step, over all ranks. Collective: all ranks.

        One reduction and one host sync.

        Returns:
            loss: the mean over the global batch; grad_norm: before clipping; bad_steps: how many
            in a row, up to this one, had a gradient that was not finite; most_bad_steps: the most
            in a row since the last call; skipped_steps: all that were not applied, an overflow
            that a smaller loss scale cures too.
        """
        while (numbers := self._reduced_numbers()) is None:
            pass  # the ranks have met a name that one of them has logged, and agreed on it
        self._update.bad_steps.look_anew()
        return named_numbers(numbers)

    def _reduced_numbers(self) -> list[float] | None:
        """Return what `read` returns, and have the module's logs take theirs. Collective.

        None where the ranks had to agree on what is logged first.
        """
        logging = self._module or self.task_log
        logs = None if logging is None else logging.logs
        further = 0 if logs is None else logs.width
        numbers = torch.zeros(_NUMBERS + further, dtype=torch.float64, device=self._device)
        if self._passes.loss_sum is not None:
            numbers[0].copy_(self._passes.loss_sum)
            numbers[1] = self._passes.weight
        if logs is not None:
            logs.fill(numbers[_NUMBERS:])
        if self._world_size > 1:
            dist.all_reduce(numbers)
        # These are the same on all ranks already.
        numbers[2].copy_(self._update.grad_norm)
        numbers[3:_NUMBERS].copy_(self._update.bad_steps.counts())
        values = numbers.tolist()
        if logs is not None and not logs.take(values[_NUMBERS:]):
            return None
        return values[:_NUMBERS]

    def recent_batches(self) -> list[tuple[int, int, int]]:
        """Return epoch, start and size of the newest batches, oldest first."""
        return [(epoch, start, size) for epoch, start, size, _ in self._recent]

    def bad_batches(self, step: int) -> list[BadBatch]:
        """Return those of the newest batches that were not applied, oldest first.

        Waits for the device.

        Args:
            step: that the newest batch led to.
        """
        return bad_among(self._update.bad_steps, list(self._recent), step)


_NUMBERS = 6
"""Of every step, before those that a module logs."""


def named_numbers(values: Sequence[float]) -> dict[str, float]:
    """Return what `TrainStep.read` does, of the sum of losses, weight, norm and counts."""
    loss_sum, weight, norm, bad, most, skipped = values
    return {
        "loss": loss_sum / weight if weight else float("nan"),
        "grad_norm": norm,
        "bad_steps": bad,
        "most_bad_steps": most,
        "skipped_steps": skipped,
    }


def _refuse_synchronised_statistics(model: nn.Module) -> None:
    """Refuse models whose ranks would wait in vain for one that has no samples.

    Raises:
        ConfigError: if a module is one.
    """
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ConfigError(
            "the model has SyncBatchNorm, which needs samples on every rank in every pass; in the "
            "last batch of an epoch a rank may have none. Use GroupNorm or BatchNorm, or a "
            "data.global_batch_size that divides the data, with a smaller number of passes"
        )
