"""`run.steps`, `run.step`, `run.log`, `run.evaluation`: what an own loop calls of its run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.optim import Optimizer

from hpctrain.checkpoint.state import restore_rng, rng_to_tensors
from hpctrain.data.loading.batch import ShareOfBatch
from hpctrain.data.order.permutation import derive_key
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.topology import on_rank_zero
from hpctrain.training.evaluation import gather_at_rank_zero
from hpctrain.training.loops.base import LoopWorld
from hpctrain.training.loops.loader import Loader, Samples
from hpctrain.training.loops.step import Counted, LoopStep, NamedStates, summed
from hpctrain.training.loops.stepper import Stepper
from hpctrain.training.metric_objects import MetricObjects
from hpctrain.training.metrics import Totals, quotient
from hpctrain.training.model.undisturbed import evaluating, kept_generators, seed_generators
from hpctrain.training.position import Position
from hpctrain.training.run import Run as JobRun
from hpctrain.training.trainer import Plan, ends_here
from hpctrain.utils.text import listed

_RECORD = {"kind", "step", "epoch", "samples_seen", "seconds", "wall_time"}
"""What a line of metrics.jsonl has of its own."""


class Run:
    """A run that a loop drives: `for batch in run.steps()`.

    Attributes:
        state: objects that are saved with the run and put back: `run.state["ema"] = ema`. Each has
            `state_dict` and `load_state_dict`, of tensors, numbers, texts and containers of these.
        is_resumed: whether the run goes on from a checkpoint.
        stopped: whether all ranks have agreed to stop before the end.
    """

    def __init__(
        self,
        world: LoopWorld,
        step: LoopStep,
        hooks: JobRun,
        plan: Plan,
        data: Any,
        loader: Loader | None,
        *,
        is_resumed: bool,
    ) -> None:
        self.state = NamedStates(step.registered)
        self.is_resumed = is_resumed
        self.stopped = False
        self._world = world
        self._setups = world.setups
        self._step = step
        self._hooks = hooks
        self._plan = plan
        self._data = data
        self._loader = loader
        self._end = plan.stop_at.end(data.place)
        self._passes = step.grad_accum_steps
        is_cut = loader is not None and loader.is_cut
        if (self._passes > 1 or is_cut) and len(step.steppers) > 1:
            raise ConfigError(
                "micro_batch_size, max_tokens: with several optimizers a step is not cut, as each "
                "of them may see what another has updated: leave them out",
                everywhere=True,
            )
        # What a program draws until its first step is drawn again when it goes on.
        self._generators = rng_to_tensors(world.device) if self.is_resumed else None
        self._running: ShareOfBatch | None = None
        self._updated = False
        self._weights: list[Tensor | float] = []
        self._logged: dict[str, list[Counted]] = {}
        self._lr: Any = 0.0
        self._totals: Totals | None = None
        self._fresh: dict[str, float] | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Of the newest evaluation."""
        return self._hooks.metrics

    @property
    def epoch(self) -> int:
        """The running epoch, from 0."""
        return self._hooks.place.epoch

    @property
    def steps_done(self) -> int:
        """Steps since the run began, those of earlier jobs included."""
        return self._hooks.place.step

    @property
    def samples_seen(self) -> int:
        """Samples that all ranks together have trained with since the run began."""
        return self._hooks.place.samples_seen

    @property
    def epoch_ended(self) -> bool:
        """Whether the epoch ends with the running pass; to be asked in the body of the loop."""
        running: Samples | None = self._setups.current
        return running is not None and running.is_last_batch and running.is_last_pass

    def steps(self) -> Iterator[Any]:
        """Yield what each pass of each step is of, from where the run stands to its end.

        Collective: all ranks. After the body of a step it is logged, saved and stopped, where it is
        time. Without a loader the number of the step is yielded, from 0.

        Raises:
            TrainingError: on every rank, if a body has updated nothing, or training diverges.
        """
        self._begin()
        while self._hooks.place.step < self._end.step:
            for share in self._shares():
                self._open(share)
                yield from self._passes_of(share)
                if self._close():
                    self.stopped = True
                    return
                if self._hooks.place.step >= self._end.step:
                    break

    def step(
        self,
        loss: Tensor,
        *,
        samples: int | None = None,
        weight: Tensor | float | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        """Run the backward pass of a loss, and after the last pass of a step its update.

        Collective: all ranks. Gradients are averaged beside the backward pass.

        Args:
            loss: (), a mean over the samples of the pass.
            samples: how many: `batch.size`, as without it. The update is that of the mean over the
                global batch, whatever the ranks' shares.
            weight: what the mean is over, where that depends on the data, such as the number of
                tokens that count; a number, or (). Costs one more reduction a step.
            optimizer: that updates; None: the only one.

        Raises:
            TrainingError: on this rank, if the loss has no backward pass, or it is not said which
                of several optimizers updates.
        """
        if optimizer is None:
            if len(self._step.steppers) > 1:
                raise TrainingError(
                    "run.step updates by one optimizer, and there are several: "
                    "run.step(loss, optimizer=optimizer)"
                )
            optimizer = self._step.steppers[0].optimizer
        running: Samples | None = self._setups.current
        is_last = running is None or running.is_last_pass
        stepper = self._stepper_of(optimizer)
        self._backward(loss, samples, weight, stepper if is_last else None)
        self.update(optimizer)

    def backward(
        self, loss: Tensor, *, samples: int | None = None, weight: Tensor | float | None = None
    ) -> None:
        """Run the backward pass of a loss, as `step` takes it. Under FSDP, collective."""
        self._backward(loss, samples, weight)

    def _backward(
        self,
        loss: Tensor,
        samples: int | None,
        weight: Tensor | float | None,
        before: Stepper | None = None,
    ) -> None:
        if self._running is None:
            raise TrainingError("run.backward and run.step belong into `for batch in run.steps()`")
        running: Samples | None = self._setups.current
        if weight is None:
            if samples is None and running is not None:
                samples = running.size
            factor = self._setups.factor(samples, self._world.world_size)
            self._setups.backward(loss, factor, before)
            counts: Tensor | float = 1.0 if samples is None else samples
        else:
            counts = self._backward_by_weight(loss, weight, before)
        self._step.losses.append((loss.detach(), counts))

    def _backward_by_weight(
        self, loss: Tensor, weight: Tensor | float, before: Stepper | None
    ) -> Tensor | float:
        if len(self._step.steppers) > 1:
            raise TrainingError("weight= is for a loop with one optimizer: weigh the loss yourself")
        if self._setups.is_idle:
            weight = 0.0
        if isinstance(weight, Tensor):
            weight = weight.detach().reshape(())
        nominal = self._world.world_size / self._running_size()
        self._setups.backward(loss, weight * nominal, before)
        self._weights.append(weight)
        return weight

    def update(self, optimizer: Optimizer) -> None:
        """Update by the mean gradients of all ranks, and forget these. Collective: all ranks.

        After the last pass of a step; before it, gradients are only added up.

        Raises:
            TrainingError: on this rank, if no backward pass came before.
        """
        stepper = self._stepper_of(optimizer)
        if not stepper.begun:
            raise TrainingError(
                "run.update without a backward pass: run.backward(loss) in place of loss.backward()"
            )
        running: Samples | None = self._setups.current
        if running is not None and not running.is_last_pass:
            return
        factor = self._by_weights() if self._weights else None
        stepper.apply(factor)
        stepper.clear_gradients()
        if not self._updated:
            self._lr = optimizer.param_groups[0]["lr"]
        self._updated = True

    def _stepper_of(self, optimizer: Optimizer) -> Stepper:
        stepper = self._setups.stepper_of(optimizer)
        if stepper not in self._step.steppers:
            raise TrainingError(f"{type(optimizer).__name__} is of no model of this run")
        return stepper

    def _by_weights(self) -> Tensor:
        """Return what makes a mean over samples one over weights, (). Collective: all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        for weight in self._weights:
            total = total + weight
        if self._world.world_size > 1:
            dist.all_reduce(total)
        # Where nothing at all counts, the gradient is 0 and stays so.
        return self._running_size() / torch.where(total == 0, 1.0, total)

    def _running_size(self) -> int:
        assert self._running is not None
        return self._running.global_size if self._loader is not None else self._world.world_size

    def log(self, *, weight: Tensor | float | None = None, **numbers: Tensor | float) -> None:
        """Have numbers of this pass in the metrics, where the step is logged; else do nothing.

        They are means over all ranks and passes of the step. Nothing waits for the device before.

        Args:
            weight: how much they count; None: the samples of the pass.
            numbers: by name, each the same on all ranks: numbers, or tensors of one.

        Raises:
            TrainingError: on this rank, if one is no number, or a name is taken.
        """
        if taken := _RECORD & numbers.keys():
            raise TrainingError(f"run.log: the name {listed(sorted(taken))} is taken")
        if not self._logs_now():
            return
        running: Samples | None = self._setups.current
        if weight is None:
            weight = 1.0 if running is None else running.size
        for name, value in numbers.items():
            tensor = value.detach() if isinstance(value, Tensor) else value
            if isinstance(tensor, Tensor) and tensor.numel() != 1:
                raise TrainingError(
                    f"run.log({name}=...) is a tensor {tuple(tensor.shape)}: expected one number"
                )
            number = torch.as_tensor(tensor, device=self._world.device).reshape(())
            self._logged.setdefault(name, []).append((number, weight))

    def _logs_now(self) -> bool:
        step = self._hooks.place.step + 1
        return step == self._end.step or self._plan.log.due(replace(self._hooks.place, step=step))

    @contextmanager
    def evaluation(self, split: str = "validation") -> Iterator[None]:
        """Evaluate in the body: no gradients, modules in eval mode, generators kept.

        Collective: all ranks. What `update_metric` was given there is in `metrics` after it, in
        metrics.jsonl, and with the checkpoint of this step.

        Args:
            split: what the data are called.
        """
        totals = self._totals = Totals(_EVALUATION, MetricObjects(_EVALUATION, self._world.device))
        with (
            self._hooks.phases.measure("evaluation"),
            self._step.evaluation_weights(),
            torch.no_grad(),
            kept_generators(self._world.device),
            evaluating([each for model in self._setups.models() for each in model.modules()]),
        ):
            yield
            self._step.settle()
        self._totals = None
        parts = gather_at_rank_zero(totals.part().quotients, self._world)

        def combined() -> dict[str, float]:
            names = list(dict.fromkeys(name for part in parts or () for name in part))
            return {
                name: quotient([part[name] for part in parts or () if name in part])
                for name in names
            }

        metrics = on_rank_zero(self._world.communicator, combined)
        self._hooks.metrics = self._fresh = metrics
        self._hooks.write_evaluation(self._position(), self.epoch, {split: metrics})

    def update_metric(self, **sums: tuple[Tensor | float, Tensor | float]) -> None:
        """Add to metrics: each is (sum, weight), and the quotient of both over all data and ranks.

        Raises:
            TrainingError: on this rank, outside of an evaluation, or if one is something else.
        """
        if self._totals is None:
            raise TrainingError("run.update_metric belongs into `with run.evaluation()`")
        for name, value in sums.items():
            if not isinstance(value, tuple):
                raise TrainingError(
                    f"run.update_metric({name}=...) is {type(value).__name__}: expected a tuple "
                    "(sum, weight), such as (correct.sum(), batch.size)"
                )
        self._totals.add(sums)

    def _begin(self) -> None:
        """Begin where the run stands: what was drawn until here is not part of it."""
        for name in self._step.registered.left_over():
            self._hooks.warn(
                f'the checkpoint has run.state["{name}"], and this program gives no object of that '
                "name"
            )
        if self._generators is not None:
            tensors, values = self._generators
            restore_rng(tensors, values, self._world.device)
        elif self._world.seed is not None:
            # From here every rank draws its own numbers.
            seed_generators(derive_key(self._world.seed, 1 + self._world.rank))
        self._generators = None
        self._hooks.begin(self._hooks.place)

    def _shares(self) -> Iterator[ShareOfBatch]:
        """Yield this rank's shares of the global batches of the running epoch."""
        loader = self._data.train_loader
        yield from loader.epoch(self._hooks.place.epoch, self._hooks.place.position)

    def _open(self, share: ShareOfBatch) -> None:
        self._running = share
        self._updated = False
        self._weights, self._logged = [], {}
        self._step.losses.clear()
        self._step.clear_gradients()

    def _passes_of(self, share: ShareOfBatch) -> Iterator[Any]:
        if self._loader is None:
            self._world.pulse.tick()
            yield self._hooks.place.step
            return
        for samples in self._loader.passes(share, self._passes):
            with ExitStack() as stack:
                if not samples.is_last_pass:
                    for held in self._setups.held():
                        stack.enter_context(held.local() if held.spread else nullcontext())
                yield samples

    def _position(self) -> Position:
        """Return where the run stands once the running step is done."""
        if self._running is None:
            return self._hooks.place
        return self._hooks.place.after(self._running.global_size, self._plan.stop_at.epoch_samples)

    def _close(self) -> bool:
        """End a step: log it and save it where it is time. Collective: all ranks.

        Returns:
            Whether all ranks stop here.

        Raises:
            TrainingError: on every rank that comes here, if nothing was updated.
        """
        if not self._updated:
            raise TrainingError(
                "the loop took a batch and updated nothing by it: call run.step(loss) or "
                "run.update(optimizer) in every step. Gradients of several passes are added up by "
                "world.loader(..., micro_batch_size=...)",
                everywhere=True,
            )
        share = self._running
        assert share is not None
        epoch, place = self.epoch, self._position()
        self._running = None
        self._step.taken(epoch, share.start, share.global_size)
        self._hooks.advanced(place)
        complete = place.step == self._end.step
        if complete or self._plan.log.due(place):
            self._hooks.log(place, epoch, float(self._lr), self._reduced())
        fresh, self._fresh = self._fresh, None
        saves = complete or self._plan.save.due(place)
        return ends_here(place, self._hooks, fresh, complete=complete, saves=saves)

    def _reduced(self) -> dict[str, float]:
        """Return what was logged, over all ranks and passes of the step. Collective: all ranks.

        Raises:
            TrainingError: on every rank, if they have logged other names.
        """
        mine = {}
        for name, items in self._logged.items():
            total, weight = summed(items, self._world.device)
            mine[name] = (0.0 if total is None else float(total), float(weight))
        everyone = self._world.communicator.all_gather(mine)
        for rank, each in enumerate(everyone):
            if each.keys() != everyone[0].keys():
                other = listed(sorted(each.keys() ^ everyone[0].keys()))
                raise TrainingError(
                    f"run.log: ranks 0 and {rank} have logged different names: {other}. Log the "
                    "same on all ranks",
                    everywhere=True,
                )
        return {name: quotient([each[name] for each in everyone]) for name in everyone[0]}

    def end(self) -> bool:
        """Save what a loop has left unsaved by a `break`, and tell whether the run is complete.

        Collective: all ranks.
        """
        if self._running is not None and self._updated:
            self.stopped = self._close() or self.stopped
            if not self.stopped and self._hooks.place.step < self._end.step:
                self._hooks.save(self._hooks.place, None)
        self._setups.current = None
        return not self.stopped


class _Evaluation:
    """Stands for the task of an evaluation, in messages."""


_EVALUATION = _Evaluation()
