"""A LightningModule as a task: what its `training_step` and `validation_step` compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpctrain.checkpoint.state import Json, decode, encode
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.topology import on_rank_zero
from hpctrain.training.metric_objects import COUNT, MetricObjects
from hpctrain.training.metrics import Part
from hpctrain.training.model.attributes import Attributes
from hpctrain.training.modules.bound import BoundModule
from hpctrain.training.modules.hooks import no_leaving
from hpctrain.training.modules.log import names_of
from hpctrain.training.modules.logged import direction_of, finish_sums
from hpctrain.training.modules.stand_in import attach
from hpctrain.training.modules.step_loss import StepLoss
from hpctrain.training.position import Position
from hpctrain.training.task.task import Direction

_HOOK_NAMES = {"validate": "validation", "test": "test"}
"""What hooks of a stage are named after."""


class ModuleTask(BoundModule):
    """The Task contract around a module.

    A `training_step` returns the mean loss of its samples, or `{"loss": mean, "weight": n}` where
    it is one over something else, such as tokens. Names of metrics are those that `self.log` gets.

    Attributes:
        counts_samples: whether a loss is a mean over samples.
        metrics: known so far; a first evaluation may give more.
        samples: of the pass that comes next; whoever calls knows it.
        of_loaders: what the newest evaluation gave, for each of its loaders.
    """

    discovers_metrics = True

    def __init__(
        self,
        inputs: Sequence[str] = (),
        target: str | None = None,
        *,
        batch: Literal["dict", "tuple"] = "dict",
        loss: Literal["mean", "sum"] = "mean",
        batch_dependent_loss: bool = False,
    ) -> None:
        """Check the arguments.

        Args:
            inputs: fields of a batch; none: all that the files have.
            target: another one, the last.
            batch: what a step gets of HDF5 files: a dict by field, or a tuple in their order.
            loss: "sum": what a `training_step` returns is the sum over its samples.
            batch_dependent_loss: whether it is meant that samples depend on others of their pass.

        Raises:
            ConfigError: if an argument makes no sense.
        """
        if batch not in ("dict", "tuple") or loss not in ("mean", "sum"):
            raise ConfigError(
                f'[task] batch = "{batch}", loss = "{loss}": expected "dict" or "tuple", and '
                '"mean" or "sum"'
            )
        super().__init__(batch)
        self.inputs = tuple(inputs) + ((target,) if target else ())
        self._known: dict[str, Direction] = {}
        self.metrics: Mapping[str, Direction] = self._known
        self.batch_dependent_loss = batch_dependent_loss
        self.samples = 1
        self.batch_idx = 0
        self._loss = StepLoss(loss)
        self.counts_samples = True
        self._output: Any = None
        self._ready: tuple[Any, Any] = (None, None)
        self._begun = False
        self._loaders = 1
        self.of_loaders: Sequence[Mapping[str, float]] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleTask:
        """Return a task of a copy of the module, which learns of its own loss what that is."""
        copied: ModuleTask = super().__deepcopy__(memo)
        copied._loss = copy.copy(self._loss)
        return copied

    # What a step calls.

    def loss(self, model: nn.Module, fields: Any) -> tuple[Tensor, Tensor | int]:
        """Return the sum of the losses, and the weight of what they are a mean of."""
        samples, logs = self.samples, self.logs
        logs.weight, logs.fx = samples, "training_step"
        step: Callable[..., Any] = model.training_step  # type: ignore[assignment]
        made_of, batch = self._ready
        if made_of is not fields:
            batch = self.batch(fields)
        try:
            output = (
                step(batch, self.batch_idx) if self.takes_index["training_step"] else step(batch)
            )
        finally:
            logs.fx = None
        if logs.records:
            logs.samples += samples
        self._output = output
        found = self._loss.sum_of(self.module, output, samples)
        self.counts_samples = self._loss.counts_samples
        return found

    # What a step does besides.

    def begin_step(self, epoch: int, start: int, global_size: int) -> None:
        """Begin a step with the global batch of these samples of the epoch."""
        trainer = self.trainer
        self.batch_idx = start // self._stop_at.global_batch_size
        trainer.current_epoch = epoch
        trainer.is_last_batch = start + global_size >= self._stop_at.epoch_samples
        self.logs.begin_step()
        self._begun = False
        self._output = None

    def begin_pass(self, fields: Any, samples: int) -> None:
        """Make a batch of the fields of a pass; the first pass of a step begins with its hooks.

        Args:
            fields: of the pass; a held row on a rank that has no samples.
            samples: how many there are in truth.
        """
        self.samples = samples
        self._ready = fields, self.batch(fields)
        if not self._begun:
            self.logs.weight = samples
            self._begun = True
            answer = self.hooks.call("on_train_batch_start", self._ready[1], self.batch_idx)
            if answer == -1:
                raise TrainingError(no_leaving(self.module))

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Leave no trace of a pass over a held row: nothing logged, kept or added up."""
        logs, attributes = self.logs, Attributes({"": self.module})
        records, logs.records = logs.records, False
        try:
            with self.objects.untouched():
                yield
        finally:
            attributes.put_back()
            logs.records = records

    def before_backward(self) -> None:
        """Call the hooks between the forward and the backward pass."""
        hooks = self.hooks
        if hooks.has("on_before_zero_grad") and self._begun:
            hooks.call("on_before_zero_grad", self.trainer.optimizers[0])
        if self.samples and hooks.has("on_before_backward"):
            hooks.call("on_before_backward", self._outputs()["loss"])

    def after_backward(self) -> None:
        """Call the hook behind a backward pass."""
        self.hooks.call("on_after_backward")

    def before_update(self) -> None:
        """Call the hook that sees the gradients: whole, unscaled, not clipped."""
        self.hooks.call("on_before_optimizer_step", self.trainer.optimizers[0])

    def fail(self, error: BaseException) -> None:
        """Report what ends the job."""
        self.hooks.call("on_exception", error)
        self.trainer.state.end(failed=True)

    def stepped(self) -> None:
        """Take note of an update, before LR schedulers do."""
        self.trainer.global_step += 1

    def end_step(self) -> None:
        """End a step, after its LR schedulers were stepped."""
        if self.hooks.has("on_train_batch_end"):
            outputs = self._outputs()
            outputs["loss"] = outputs["loss"].detach()
            self.hooks.call("on_train_batch_end", outputs, self._ready[1], self.batch_idx)
        self._ready = None, None

    def _outputs(self) -> dict[str, Any]:
        output = self._output
        if output is None:  # a rank that had no samples
            return {"loss": torch.zeros((), device=self._world.device)}
        return dict(output) if isinstance(output, Mapping) else {"loss": output}

    def begin_dry_run(self, samples: int) -> None:
        """Call the hooks that a first step may rely on; what they do is put back."""
        self.samples = samples
        self.trainer.state.stage = "sanity_check"
        self.hooks.call("on_train_start")
        self.hooks.call("on_train_epoch_start")

    def end_dry_run(self) -> None:
        """Take note that a loss stays one over samples, or over weights."""
        self._loss.checked = True

    # What a checkpoint holds.

    def capture(self, tensors: MutableMapping[str, Tensor]) -> Json:
        """Return what was logged in the epoch under way, on this rank, as JSON.

        Args:
            tensors: takes the tensors of it.
        """
        states = self.objects.states() if self.objects else {}
        begun = {path: state for path, state in states.items() if state[COUNT]}
        state = {"logs": self.logs.state(), "metrics": begun}
        return encode(state, "logged", tensors, lambda _: {})

    def restore(self, parts: Sequence[tuple[Json, Mapping[str, Tensor]]]) -> None:
        """Go on from what some ranks have captured: from all of it together.

        Raises:
            TrainingError: if a torchmetrics object has no exact sum over them.
        """
        states = [decode(saved, tensors, lambda item, _: item.clone()) for saved, tensors in parts]
        self.logs.load_states([state["logs"] for state in states])
        begun = [state["metrics"] for state in states]
        self.objects.load(begun[0] if len(begun) == 1 else {})
        if len(begun) > 1:
            self.objects.merge_begun(begun)

    # What an evaluation calls.

    def begin_evaluation(
        self,
        stage: Literal["validate", "test"] = "validate",
        *,
        loaders: int = 1,
        rehearses: bool = False,
    ) -> None:
        """Begin an evaluation, with its hooks.

        Args:
            stage: what it is for.
            loaders: that it goes through; with several what is logged is kept apart by theirs.
            rehearses: names are taken down, and nothing is logged.
        """
        logs, hooks = self.logs, self.hooks
        self._before = (logs.stage, self.trainer.state.stage, self.batch_idx)
        logs.stage = stage
        self.trainer.state.stage = "sanity_check" if rehearses else stage
        logs.records, logs.samples_trained, logs.samples = not rehearses, logs.samples, 0
        logs.weight = 0
        self.batch_idx = 0
        self._loaders = loaders
        name = _HOOK_NAMES[stage]
        for hook in (f"{name}_model_zero_grad", f"{name}_model_eval"):
            hooks.call(f"on_{hook}")
        hooks.call(f"on_{name}_start")
        hooks.call(f"on_{name}_epoch_start")

    def begin_loader(self, number: int) -> None:
        """Go on with the batches of the next loader."""
        self.batch_idx = 0
        self.logs.loader = number if self._loaders > 1 else None

    def end_evaluation(
        self, metrics: Sequence[Mapping[str, float]], part: Part, objects: MetricObjects
    ) -> dict[str, float]:
        """End an evaluation, with its hooks, and return all that it gave. Collective: all ranks.

        Args:
            metrics: of all ranks, for each loader.
            part: of this rank.
            objects: the torchmetrics objects.
        """
        name = _HOOK_NAMES[self.logs.stage]
        self.logs.loader = None
        of_loaders = [self.note(each) for each in metrics]
        ended: dict[str, float] = {}
        if self.hooks.has(f"on_{name}_epoch_end"):
            if objects:
                # What the hook computes is of all samples, on every rank.
                objects.merge(self._world.communicator.all_gather(part.states))
            self.logs.weight = self.logs.samples
            self.hooks.call(f"on_{name}_epoch_end")
            logged, self.logs.objects = self.logs.objects, {}
            ended = self.note(self._computed(logged) | self.logs.end_hook())
        self.hooks.call(f"on_{name}_end")
        self.hooks.call(f"on_{name}_model_train")
        self.of_loaders = [each | ended for each in of_loaders]
        return {name: value for each in self.of_loaders for name, value in each.items()}

    def cut_short(self) -> None:
        """End an evaluation that a stop cuts short: what its beginning did is undone."""
        self.hooks.call(f"on_{_HOOK_NAMES[self.logs.stage]}_end")

    def leave_evaluation(self) -> None:
        """Go back to what was before, also where an evaluation was cut short."""
        self.logs.stage, self.trainer.state.stage, self.batch_idx = self._before
        self.logs.loader = None
        self.logs.records, self.logs.samples = self.trainer.training, self.logs.samples_trained

    def _computed(self, objects: Mapping[str, Any]) -> dict[str, float]:
        """Return what merged torchmetrics objects compute, by name. Collective: all ranks."""
        if not objects:
            return {}
        return on_rank_zero(
            self._world.communicator,
            lambda: {name: float(objects[name].compute()) for name in sorted(objects)},
        )

    def rehearse(self, loaders: int) -> None:
        """Begin a rehearsal of an evaluation with so many loaders."""
        self.begin_evaluation(loaders=loaders, rehearses=True)

    def end_rehearsal(self) -> None:
        """End it, with the hooks at the end of an evaluation, and declare the names."""
        self.logs.loader = None
        self.logs.weight = self.samples
        for hook in ("epoch_end", "end", "model_train"):
            self.hooks.call(f"on_validation_{hook}")
        for name in names_of(self.logs, "validate"):
            self._known.setdefault(name, direction_of(name) or "min")

    def begin_predictions(self, loaders: int) -> None:
        """Begin to predict for the samples of so many loaders."""
        self.trainer.state.stage = self.logs.stage = "predict"
        self.trainer.predict_loop.begin(loaders, self.hooks.callbacks)
        self._loaders = loaders

    # What the job does around the steps.

    def begin_training(self, place: Position) -> None:
        """Begin the training proper, at a place."""
        self.trainer.global_step, self.trainer.current_epoch = place.step, place.epoch
        self.trainer.state.stage = "train"
        self.logs.stage, self.logs.records = "train", True
        self.hooks.trial = False
        attach(self.module, self.trainer, self.logs)  # a hook may have compiled its steps by now
        # Those of callbacks may rely on what they knew when the run was saved.
        self.hooks.call_callbacks("on_fit_start")
        self.hooks.call("on_train_start")

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch, or go on in one."""
        self.trainer.current_epoch = epoch
        self.logs.weight = 1
        self.hooks.call("on_train_epoch_start")

    def end_epoch(self) -> dict[str, float]:
        """End an epoch, and return what was logged for it. Collective: all ranks."""
        logs = self.logs
        adds_up = any(stage == "train" for stage, _ in logs.metrics)
        states = {}
        if self.objects and (adds_up or self.hooks.has("on_train_epoch_end")):
            states = self.objects.states()
            self.objects.merge(self._world.communicator.all_gather(states))
        logs.weight = logs.samples
        found = self.note(logs.end_epoch(), "train")
        logs.forget_sums()
        self.hooks.call("on_train_epoch_end")
        updated = {
            name: each
            for (stage, name), each in logs.metrics.items()
            if stage == "train" and getattr(each, COUNT, True)
        }
        computed = self._computed(updated)
        found |= self.note(computed | logs.end_epoch(), "train")
        if states:
            self.objects.reset()
        logs.begin_epoch()
        return found

    def end_training(self, epoch: int) -> None:
        """End the training proper."""
        self.trainer.current_epoch = epoch
        self.hooks.call("on_train_end")
        self.hooks.call("on_fit_end")
        self.end("fit")

    def end(self, stage: str) -> None:
        """End the job, or an evaluation that is one."""
        self.hooks.call("teardown", stage)
        self.trainer.state.end()

    def evaluate(self, model: nn.Module, fields: Any) -> dict[str, Any]:
        """Run `validation_step` with its hooks, and return what was logged."""
        stage = _HOOK_NAMES[self.logs.stage]
        batch, index = self.batch(fields), self.batch_idx
        self.logs.weight = samples = self.samples
        loader = self.loader_arguments
        self.hooks.call(f"on_{stage}_batch_start", batch, index, *loader)
        output = self._evaluation_step(model, f"{stage}_step", batch, index)
        self.hooks.call(f"on_{stage}_batch_end", output, batch, index, *loader)
        self.batch_idx += 1
        self.logs.samples += samples
        return self.logs.take_batch()

    def accompany(self, model: nn.Module, fields: Any) -> None:
        """Run a step on a held row for the sake of other ranks: nothing is logged."""
        records, self.logs.records = self.logs.records, False
        try:
            stage = _HOOK_NAMES[self.logs.stage]
            self._evaluation_step(model, f"{stage}_step", self.batch(fields), self.batch_idx)
        finally:
            self.logs.records = records

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the sums and the smallest and largest values that were logged."""
        return finish_sums(sums)

    def _evaluation_step(self, model: nn.Module, name: str, batch: Any, index: int) -> Any:
        self.logs.fx = name
        step: Callable[..., Any] = getattr(model, name)
        try:
            if self.takes_index[name]:
                return step(batch, index, *self.loader_arguments)
            return step(batch, *self.loader_arguments)
        finally:
            self.logs.fx = None

    @property
    def loader_arguments(self) -> tuple[int, ...]:
        """What steps and hooks get of a loader's number: it, where there are several."""
        return () if self.logs.loader is None else (self.logs.loader,)

    # What the job asks.

    def note(self, metrics: Mapping[str, float], stage: str | None = None) -> dict[str, float]:
        """Take note of an epoch's metrics, and return them under all their names."""
        stage = stage or self.logs.stage
        named = self.logs.named(stage, metrics)
        for name in named if stage == "validate" else ():
            self._known.setdefault(name, direction_of(name) or "min")
        self.show_metrics()
        return named

    def show_metrics(self) -> None:
        """Have the module's trainer show the newest values."""
        tensors = {name: torch.tensor(value) for name, value in self.logs.last.items()}
        self.trainer.callback_metrics = tensors
        self.trainer.logged_metrics = {name: tensors[name] for name in self.logs.logged()}
        self.trainer.progress_bar_metrics = self.logs.shown()
