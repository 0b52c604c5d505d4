"""`evaluate`, `test`, `predict`: a model with weights of a checkpoint, its metrics, predictions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpctrain.config import Config
from hpctrain.config.fields import Normalization, stored_fields
from hpctrain.config.registry import resolve_listed
from hpctrain.config.semantics import semantics_of
from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.loading.batch import EvaluationBatches, map_tensors
from hpctrain.data.loading.map_style.dataset import MapDataset
from hpctrain.data.predictions import Origin, PredictionWriter
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.build import build_task, finish_model, make_model
from hpctrain.training.checkpointing.snapshot import restore_extra_states
from hpctrain.training.components import NOTHING, Components, resolve_components
from hpctrain.training.data.user_data import brings_data
from hpctrain.training.evaluation import Turn, evaluate
from hpctrain.training.inference.splits import Split, open_files, open_objects
from hpctrain.training.inference.stage import (
    STEPS,
    Stage,
    begin,
    bind,
    for_forward_passes,
    missing_step,
    on_host,
    predict_step,
    predicted,
    predicting,
)
from hpctrain.training.inference.weights import Chosen, choose_checkpoint
from hpctrain.training.model.registered_state import RegisteredState
from hpctrain.training.model.undisturbed import evaluating, kept_model, seed_generators
from hpctrain.training.model.wrappers import Method, load_checked
from hpctrain.training.modules.callbacks import (
    TaskCallbacks,
    build_callbacks,
    register,
    with_those_of_module,
)
from hpctrain.training.modules.hooks import OWN_STATE, OwnState, check_loaders
from hpctrain.training.modules.overrides import is_module, is_own
from hpctrain.training.modules.stand_in import TrainerStandIn
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.position import StopAt
from hpctrain.training.prepare_data import prepare_data
from hpctrain.training.task.misfits import ranges_checked
from hpctrain.training.task.regression import Regression, in_unit
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Fields, adopt_task
from hpctrain.utils.text import printable

logger = logging.getLogger("hpctrain")


class Trained:
    """A model with the weights of a checkpoint, whole on every rank."""

    def __init__(
        self,
        config: Config,
        world: World,
        components: Components,
        chosen: Chosen,
        splits: Sequence[Split],
        stage: Stage,
    ) -> None:
        """Build the model and load its weights. Collective: all ranks.

        Raises:
            HpctrainError: on every rank, if a component refuses its arguments, or the weights are
                not those of the model.
        """
        self._world = world
        self._splits = splits
        self._stage = stage
        seed_generators(config.run.seed)
        semantics = semantics_of(config, chosen.values or None)
        config = for_forward_passes(config)
        with raise_together(world.communicator):
            self._model = make_model(config, components)
            self._task = build_task(config, components)
            if isinstance(self._task, ModuleTask):
                _require_step(self._model, stage, len(splits))
                bind(self._task, self._model, config, world, stage)
                _set_callbacks(self._task, self._model, config)
            adopt_task(self._model, self._task, world.device)
            self._callbacks = self._callbacks_of_task(config)
        if isinstance(self._task, ModuleTask):
            seconds = config.launch.prepare_timeout_seconds
            prepare_data([self._model], world, seconds=seconds)
        with raise_together(world.communicator):
            if isinstance(self._task, ModuleTask):
                self._task.set_up(stage)
                self._task.inputs = self._task.inputs or tuple(splits[0].fields)
            load_checked(self._model, chosen.tensors, chosen.source)
            states = chosen.values.get("extra_state", {})
            restore_extra_states(self._model, states, chosen.extra, torch.device("cpu"))
            self._model, self._number_format, _ = finish_model(
                self._model, config, world, semantics
            )
            if isinstance(self._task, ModuleTask):
                trainer, callbacks = self._task.trainer, self._task.hooks.callbacks
                _restore_registered(callbacks, trainer, self._model, chosen, world)
                begin(self._task, self._model, world)
            elif self._callbacks.items:
                trainer, callbacks = self._callbacks.trainer, self._callbacks.items
                trainer.global_step = chosen.step or 0
                _restore_registered(callbacks, trainer, self._model, chosen, world)
        self._predict, self._unit = self._way_to_predict(config)

    def _callbacks_of_task(self, config: Config) -> TaskCallbacks:
        """Return the callbacks beside a hand-written task, set up; a module calls its own.

        Raises:
            ConfigError: if one of them would see nothing of predictions.
        """
        if isinstance(self._task, ModuleTask):
            return TaskCallbacks()
        items = build_callbacks(config, resolve_listed(config, "callbacks"), ())
        stop_at = StopAt.of(config.training, 1, 1)
        trainer = TrainerStandIn(config, self._world, stop_at, self._model) if items else None
        callbacks = TaskCallbacks(items, trainer)
        for note in callbacks.check_stage(self._stage):
            logger.warning("%s", note)
        callbacks.set_up(self._stage)
        return callbacks

    def _way_to_predict(self, config: Config) -> tuple[Method, Normalization | None]:
        """Return what predicts, and the numbers by which that was normalized, if it was."""
        task: Any = self._task
        if isinstance(task, ModuleTask):
            return self._module_step, None
        own: Method | None = getattr(task, "predict", None)
        if own is not None:  # what it returns stands for what it says
            return own, None
        is_target = isinstance(task, Regression)
        unit = self._splits[0].normalizations.get(config.task.target or "") if is_target else None
        return self._output, unit

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the split, the same on all ranks. Collective: all ranks."""
        loaders = [each.loader(self._world) for each in self._splits]
        self._callbacks.begin_stage(self._stage)
        try:
            with ranges_checked(self._task):
                metrics = evaluate(
                    TaskRunner(self._model, self._task, self._number_format),
                    [Turn.of(each) for each in loaders],
                    self._world,
                    stage="test" if self._stage == "test" else "validate",
                )
        finally:
            for loader in loaders:
                loader.close()
        assert metrics is not None  # nobody stops it
        self._tear_down(metrics)
        return metrics

    def _tear_down(self, metrics: Mapping[str, float]) -> None:
        self._callbacks.end_stage(self._stage, metrics)
        if isinstance(self._task, ModuleTask):
            self._task.end(self._stage)

    def predict(
        self, folder: Path, origin: Origin, stopping: Callable[[], bool]
    ) -> PredictionWriter:
        """Write the predictions for every sample of the split. Collective: all ranks.

        Args:
            folder: of the shards, new, or begun by a job that did not come to its end.
            origin: of the predictions.
            stopping: asked after every batch of this rank; True: leave the rest for a later job.

        Returns:
            What has written them; `finish` makes a dataset of them.

        Raises:
            HpctrainError: on every rank or ending the job, if the model gives nothing that can be
                stored, or the folder cannot be written.
        """
        (split,) = self._splits
        with raise_together(self._world.communicator):
            example = self._tried(split.loader(self._world))
        fields = {name: Field(each.shape[1:], each.dtype) for name, each in example.items()}
        communicator, samples = self._world.communicator, split.dataset.samples
        writer = PredictionWriter(folder, origin, fields, samples, communicator)
        task = self._task if isinstance(self._task, ModuleTask) else None
        if task is not None:
            self._warn_of_resumed(task, writer)
        self._callbacks.begin_stage(self._stage)
        loader, at = split.loader(self._world, writer.rows), 0
        try:
            with nullcontext() if task is None else predicting(task):
                for self._index, batch in enumerate(loader):
                    self._world.pulse.tick()
                    self._rows = writer.rows[at : at + batch.size].tolist()
                    at += batch.size
                    writer.add(self._predicted(self._predict, batch.fields, batch.size))
                    if stopping():
                        break
        finally:
            loader.close()
        self._tear_down({})
        return writer

    def _warn_of_resumed(self, task: ModuleTask, writer: PredictionWriter) -> None:
        """Tell that hooks see a part of the samples. Collective: all ranks."""
        left = sum(self._world.communicator.all_gather(len(writer.rows)))
        names = [f"on_predict_{when}" for when in ("batch_end", "epoch_end", "end")]
        if left < writer.plan.samples and any(map(task.hooks.has, names)):
            logger.warning(
                "predictions for %d of %d samples were there already: on_predict_... hooks of the "
                "module and of callbacks see the other %d. To have them see all, remove the folder",
                writer.plan.samples - left,
                writer.plan.samples,
                left,
            )

    def _tried(self, loader: EvaluationBatches) -> dict[str, npt.NDArray[Any]]:
        """Return what the model predicts for a sample, and leave no trace of it."""
        try:
            fields = loader.examples(1).part(0, 1)
        finally:
            loader.close()
        with kept_model(self._model, task=self._task):
            predict = self._trial_step if isinstance(self._task, ModuleTask) else self._predict
            return self._predicted(predict, fields, 1)

    def _predicted(self, predict: Method, fields: Any, samples: int) -> dict[str, npt.NDArray[Any]]:
        """Return the predictions of a batch, by field, on the host."""
        with torch.no_grad(), evaluating(self._model.modules()), self._number_format.arithmetic():
            cast = self._number_format.cast(fields, self._task.inputs)
            output = predict(self._model, cast)
        found = as_fields(output, samples)
        if self._unit is None:
            return found
        # Only predictions of a regression stand for the target itself.
        mean, std = self._unit.mean, self._unit.std
        for name, each in found.items():
            if each.dtype.kind == "f":
                found[name] = in_unit(torch.from_numpy(each), mean, std).numpy()
        return found

    def _output(self, model: nn.Module, fields: Fields) -> Any:
        return model(*[fields[name] for name in self._task.inputs])

    def _module_step(self, model: nn.Module, fields: Any) -> Any:
        task: Any = self._task
        output = predicted(task, model, fields, self._index, self._rows)
        if task.trainer.predict_loop.keeps:
            task.trainer.predict_loop.keep(0, map_tensors(on_host, output))
        return output

    def _trial_step(self, model: nn.Module, fields: Any) -> Any:
        task: Any = self._task
        return predict_step(task, model, task.batch(fields), 0)


def _set_callbacks(task: ModuleTask, model: nn.Module, config: Config) -> None:
    """Have the callbacks of the config, and of the module, called, too."""
    given = build_callbacks(config, resolve_listed(config, "callbacks"), ())
    task.hooks.set_callbacks(with_those_of_module(given, model))


def _restore_registered(
    callbacks: Sequence[Any], trainer: Any, model: nn.Module, chosen: Chosen, world: World
) -> None:
    """Have callbacks, and the module, know what they knew when the run was saved."""
    states = RegisteredState(world.device)
    register(callbacks, states, trainer, model)
    if is_module(model) and OwnState.is_of(model):
        states.add(OWN_STATE, OwnState(model, trainer))
    saved = chosen.values.get("registered", {})
    states.restore({name: saved[name] for name in states.names & saved.keys()}, chosen.extra)


def _require_step(model: nn.Module, stage: Stage, loaders: int) -> None:
    name = type(model).__name__
    check_loaders(model, STEPS[stage], loaders)
    if stage == "predict" and loaders > 1:
        raise ConfigError(
            f"predict: there are {loaders} loaders, and predictions are a dataset in the order of "
            "one: name each of them by data.evaluations.NAME, and predict with --split NAME"
        )
    if (step := missing_step(model, stage)) is not None:
        raise ConfigError(f"model.use: {name} has no {step} of its own")
    if stage == "predict" and not (is_own(model, STEPS[stage]) or is_own(model, "forward")):
        raise ConfigError(f"model.use: {name} has neither {STEPS[stage]} nor forward")


def as_fields(output: object, samples: int) -> dict[str, npt.NDArray[Any]]:
    """Return what a model gives for a batch as fields of a dataset, on the host.

    A tensor is the field "prediction"; a mapping has its own names; of a sequence they are
    "prediction_0" and so on. Floats of 16 bits that numpy does not have become float32.

    Args:
        output: tensors of (samples, ...).
        samples: of the batch.

    Raises:
        TrainingError: if it is something else.
    """
    if isinstance(output, Tensor):
        named: Mapping[str, Any] = {"prediction": output}
    elif isinstance(output, Mapping):
        named = output
    elif isinstance(output, tuple | list):
        named = {f"prediction_{index}": each for index, each in enumerate(output)}
    else:
        named = {"prediction": output}
    fields = {}
    for name, each in named.items():
        if not isinstance(each, Tensor) or each.shape[:1] != (samples,):
            what = (
                f"a tensor of {tuple(each.shape)}"
                if isinstance(each, Tensor)
                else type(each).__name__
            )
            raise TrainingError(
                f'predict: "{printable(str(name))}" is {what} for {samples} samples: give tensors '
                "with one row a sample, by a method `predict(model, fields)` of a task of your own"
            )
        tensor = each.detach()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        fields[str(name)] = tensor.cpu().numpy()
    if not fields:
        raise TrainingError("predict: the model gives nothing to store")
    return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of it.

    Attributes:
        chosen: the checkpoint.
        datasets: the samples of the split, several where a datamodule has several loaders.
        metrics: empty where predictions were asked for.
        missing: shards of predictions that a stop has left for a later job.
    """

    chosen: Chosen
    datasets: Sequence[Dataset | MapDataset]
    metrics: Mapping[str, float]
    missing: int = 0

    @property
    def samples(self) -> int:
        return sum(each.samples for each in self.datasets)


def answer(
    config: Config,
    world: World,
    command: Sequence[str],
    *,
    stage: Stage,
    split: str,
    checkpoint: str | None = None,
    output: Path | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Answer:
    """Evaluate a trained model on a split, or write its predictions. Collective: all ranks.

    Args:
        config: of the run.
        world: the ranks.
        command: the config file and overrides, as they were given.
        stage: whose step of a module is called.
        split: "train", "validation", "test", or a name of `data.evaluations`.
        checkpoint: as `choose_checkpoint` takes it.
        output: where predictions go; None: metrics are asked for.
        stopping: whether this rank is to leave the rest of the predictions for a later job.

    Raises:
        HpctrainError: if it cannot be done.
    """
    with raise_together(world.communicator):
        components = resolve_components(config, command[0], command[1:])
    chosen = choose_checkpoint(config, world, checkpoint)
    served: Sequence[Split]
    if brings_data(config, NOTHING):
        served = open_objects(config, world, split, stage)
    else:
        # Predictions need no targets: the files may have none.
        fields = stored_fields(config) if output is None else _stored_inputs(config)
        served = [open_files(config, world, split, chosen, fields)]
    datasets = [each.dataset for each in served]
    try:
        trained = Trained(config, world, components, chosen, served, stage)
        if output is None:
            return Answer(chosen=chosen, datasets=datasets, metrics=trained.evaluate())
        origin = Origin(
            checkpoint=chosen.source,
            step=chosen.step,
            weights=chosen.weights,
            dataset=datasets[0].source,
            fingerprint=datasets[0].fingerprint,
        )
        writer = trained.predict(output, origin, stopping)
        return Answer(chosen=chosen, datasets=datasets, metrics={}, missing=writer.finish())
    finally:
        for each in served:
            each.close()


def _stored_inputs(config: Config) -> list[str]:
    """Return the fields that the model receives, as files hold them."""
    return [name for name in stored_fields(config) if name in config.task.inputs]
