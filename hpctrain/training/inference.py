"""A trained model at work: its metrics on a dataset, and its predictions for every sample."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpctrain.checkpoint.export import Weights, best_checkpoint, best_of, whole_tensors
from hpctrain.checkpoint.format import TRAINING, newest_first, read_meta, resolved
from hpctrain.checkpoint.load import load_values
from hpctrain.checkpoint.tensors import tensors_from_raw
from hpctrain.config import Config
from hpctrain.config.fields import Normalization, normalization_of, stored_fields
from hpctrain.config.semantics import Semantics, semantics_of
from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.loading.evaluation_loader import EvaluationLoader
from hpctrain.data.loading.loader import LoaderOptions
from hpctrain.data.open_datasets import open_for_evaluation, open_for_training, open_named
from hpctrain.data.predictions import Origin, PredictionWriter
from hpctrain.data.reading.threads import reading_threads
from hpctrain.errors import CheckpointError, ConfigError, TrainingError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.build import (
    Components,
    build_model,
    build_task,
    resolve_components,
    seed_generators,
)
from hpctrain.training.call import Call, Method, call_directly
from hpctrain.training.data import find_normalizations, normalizations_begun_with
from hpctrain.training.ddp import broadcast_tensors
from hpctrain.training.evaluation import evaluate
from hpctrain.training.initialize import read_weights
from hpctrain.training.plain_names import load_checked
from hpctrain.training.ranges import ranges_checked
from hpctrain.training.regression import Regression
from hpctrain.training.snapshot import EXTRA, restore_extra_states
from hpctrain.training.task import Fields, Task
from hpctrain.training.transforms import Transforms
from hpctrain.training.undisturbed import evaluating
from hpctrain.utils.text import did_you_mean, printable

logger = logging.getLogger("hpctrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The checkpoint that a command works with, the same on all ranks.

    Attributes:
        source: its folder, or the file of an export.
        step: at which it was saved; None: the file does not say.
        weights: which of them: training, average or evaluation.
        tensors: by name, on the host.
        values: what is no tensor of it; empty for a file.
        extra: tensors of the extra state of modules, on the host.
        why: how it was chosen, such as "best accuracy of runs/digits".
    """

    source: str
    step: int | None
    weights: str
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    extra: Mapping[str, Tensor]
    why: str


def choose_checkpoint(config: Config, world: World, wanted: str | None) -> Chosen:
    """Read the weights to work with, for all ranks. Collective: all ranks.

    Those that the evaluations of the run were made with: averages where the config has
    `training.ema_decay`, evaluation weights where the optimizer has a second set.

    Args:
        config: names the run.
        world: the ranks.
        wanted: "best", "last", or the path of a checkpoint, a run, or a file of weights; None: the
            best where the run keeps one, else the last.

    Raises:
        CheckpointError: on every rank, if there is none, or it is damaged.
    """
    chosen: Chosen | None = None
    with raise_together(world.communicator):
        if world.topology.is_rank_zero:
            chosen = _read(config, wanted)
    tensors = broadcast_tensors(world, None if chosen is None else chosen.tensors)
    extra = broadcast_tensors(world, None if chosen is None else chosen.extra)
    facts = None if chosen is None else (chosen.source, chosen.step, chosen.weights, chosen.why)
    source, step, weights, why = world.communicator.broadcast(facts)
    values = world.communicator.broadcast(None if chosen is None else chosen.values)
    return Chosen(
        source=source,
        step=step,
        weights=weights,
        tensors=tensors,
        values=values,
        extra=extra,
        why=why,
    )


def _read(config: Config, wanted: str | None) -> Chosen:
    run = Path(config.run.directory, config.run.name)
    if wanted not in ("best", "last", None):
        path = Path(wanted)
        if not path.is_dir():
            return Chosen(
                source=wanted,
                step=None,
                weights="training",
                tensors=read_weights(path),
                values={},
                extra={},
                why=wanted,
            )
        source, why = resolved(path), str(path)
    elif not next(iter(newest_first(run / "checkpoints")), None):
        raise CheckpointError(
            f"{run} has no checkpoint: train first, or name another run (run.name), a checkpoint "
            "or a file of weights by --checkpoint"
        )
    elif wanted == "best" or (wanted is None and best_of(run) is not None):
        source, best = best_checkpoint(run), best_of(run)
        assert best is not None
        why = f"the best {best.metric} of {run}"
    else:
        source, why = resolved(run), f"the last checkpoint of {run}"
    values, extra = load_values(source), {}
    if values.get("extra_state"):
        training = whole_tensors(source, TRAINING, read_meta(source))
        extra = tensors_from_raw({n: raw for n, raw in training.items() if n.startswith(EXTRA)})
    weights = Weights.read(source, average=None if config.training.ema_decay else False)
    return Chosen(
        source=str(source),
        step=weights.step,
        weights=weights.which,
        tensors=tensors_from_raw(weights.tensors),
        values=values,
        extra=extra,
        why=why,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The samples that a command works on, as a rank serves them."""

    dataset: Dataset
    normalizations: Mapping[str, Normalization]
    transforms: Transforms
    options: LoaderOptions
    fields: Sequence[str]
    batch_size: int
    seed: int

    def loader(self, world: World, rows: npt.NDArray[np.int64] | None = None) -> EvaluationLoader:
        """Return what serves every sample once over all ranks, or these rows on this one."""
        return EvaluationLoader(
            self.dataset,
            self.options,
            fields=self.fields,
            rank=world.topology.rank,
            world_size=world.topology.world_size,
            batch_size=self.batch_size,
            preparation=self.transforms.validation,
            decoding=self.transforms.validation_decoding,
            batch_transform=self.transforms.batch_transform,
            seed=self.seed,
            rows=rows,
        )

    def close(self) -> None:
        """End what transforms samples."""
        self.transforms.close()


def open_split(
    config: Config, world: World, name: str, chosen: Chosen, fields: Sequence[str]
) -> Split:
    """Open the samples of a split on rank 0, and make all ranks ready to serve them.

    Their numbers become what they were in training: by the normalization that the checkpoint
    holds. Only where it holds none, the statistics of the training data are read.

    Collective: all ranks.

    Args:
        config: names the data.
        world: the ranks.
        name: "train", "validation", "test", or a name of `data.evaluations`.
        chosen: the checkpoint.
        fields: of the samples, as they are stored.

    Raises:
        HpctrainError: on every rank, if there is no such split, or its files are not what the
            config says.
    """
    section, topology = config.data, world.topology
    semantics = semantics_of(config, chosen.values or None)
    opened: tuple[Dataset, dict[str, Normalization]] | None = None
    with raise_together(world.communicator):
        if topology.is_rank_zero:
            dataset = _open(config, name, fields, semantics)
            opened = dataset, _normalizations(config, dataset, chosen, semantics)
    dataset, normalizations = world.communicator.broadcast(opened)
    with raise_together(world.communicator):
        # Twice the same: what is done to samples to train with is not asked for.
        served = {name: each for name, each in normalizations.items() if name in fields}
        transforms = Transforms.of(config, dataset, dataset, fields, served, world)
    share = -(-section.global_batch_size // topology.world_size)
    return Split(
        dataset=dataset,
        normalizations=normalizations,
        transforms=transforms,
        options=LoaderOptions(
            device=world.device,
            buffer_mb=section.buffer_mb,
            threads=section.threads or reading_threads(topology.local_world_size),
            read_retries=section.read_retries,
        ),
        fields=fields,
        batch_size=min(section.micro_batch_size or share, share),
        seed=config.run.seed,
    )


def _open(config: Config, name: str, fields: Sequence[str], semantics: Semantics) -> Dataset:
    section = config.data
    if name == "train":
        return open_for_training(section, fields, semantics)
    if name in section.evaluations:
        return open_named(section, name, fields, semantics)
    if name not in ("test", "validation"):
        known = ["train", "validation", "test", *section.evaluations]
        raise ConfigError(
            f"--split {name}: data.evaluations has no such name{did_you_mean(name, known)}: "
            f"expected one of {', '.join(known)}"
        )
    if name == "test":
        if section.test is None and section.samples.test is None:
            raise ConfigError(
                "data.test: missing; it names the samples to test with, as data.validation those "
                "of validation"
            )
        section = dataclasses.replace(
            section,
            validation=section.test,
            samples=dataclasses.replace(
                section.samples, validation=section.samples.test, validation_fraction=None
            ),
        )
    dataset = open_for_evaluation(section, fields, semantics)
    if dataset is None:
        raise ConfigError("data.validation: missing; name another split by --split")
    return dataset


def _normalizations(
    config: Config, dataset: Dataset, chosen: Chosen, semantics: Semantics
) -> dict[str, Normalization]:
    """Return the numbers of every field that is normalized, of the training data if need be."""
    begun = normalizations_begun_with(config, chosen.values)
    is_measured = any(
        name not in begun and isinstance(normalization_of(each), str)
        for name, each in config.data.normalize.items()
    )
    train = dataset
    if is_measured:
        train = open_for_training(config.data, stored_fields(config), semantics)
    return find_normalizations(config, train, begun)


class Trained:
    """A model with the weights of a checkpoint, on every rank. Collective: all ranks.

    Attributes:
        task: what an evaluation computes.
        call: runs a method of the task on the model; where the model is spread over the ranks,
            collective: all ranks.
        idle_row: a row to run while others still have batches; None: nobody waits.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        components: Components,
        chosen: Chosen,
        split: Split,
    ) -> None:
        """Build the model and load its weights. Collective: all ranks.

        Raises:
            HpctrainError: on every rank, if a component refuses its arguments, or the weights are
                not those of the model.
        """
        seed_generators(config.run.seed)
        semantics = semantics_of(config, chosen.values or None)
        with raise_together(world.communicator):
            self._model, self._number_format, _ = build_model(config, world, components, semantics)
            self.task: Task = build_task(config, components)
            load_checked(self._model, chosen.tensors, chosen.source)
            states = chosen.values.get("extra_state", {})
            restore_extra_states(self._model, states, chosen.extra, torch.device("cpu"))
            # Whole on every rank: nothing is kept beside it.
            self._model.to(world.device)
        self._world = world
        self._split = split
        self.call: Call = call_directly(self._model)
        task: Any = self.task
        self._predict: Method | None = getattr(task, "predict", None)
        # What a method of the user's own returns stands for what it says.
        of_target = isinstance(task, Regression) and self._predict is None
        self._unit = split.normalizations.get(config.task.target or "") if of_target else None

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the split, the same on all ranks. Collective: all ranks."""
        loader = self._split.loader(self._world)
        try:
            with ranges_checked(self.task):
                metrics = evaluate(
                    self._model,
                    self.task,
                    loader,
                    self._world,
                    self._number_format,
                    rounds=loader.most_batches,
                    call=self.call,
                )
        finally:
            loader.close()
        assert metrics is not None  # nobody stops it
        return metrics

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
        with raise_together(self._world.communicator):
            loader = self._split.loader(self._world)
            try:
                example = self._predicted(loader.examples(1).fields, 1)
            finally:
                loader.close()
        fields = {name: Field(each.shape[1:], each.dtype) for name, each in example.items()}
        communicator, samples = self._world.communicator, self._split.dataset.samples
        writer = PredictionWriter(folder, origin, fields, samples, communicator)
        loader = self._split.loader(self._world, writer.rows)
        try:
            for batch in loader:
                self._world.pulse.tick()
                writer.add(self._predicted(batch.fields, batch.size))
                if stopping():
                    break
        finally:
            loader.close()
        return writer

    def _predicted(self, fields: Fields, samples: int) -> dict[str, npt.NDArray[Any]]:
        """Return the predictions of a batch, by field, on the host."""
        with torch.no_grad(), evaluating(self._model.modules()), self._number_format.arithmetic():
            cast = self._number_format.cast(fields, self.task.inputs)
            output = self.call(self._predict or self._output, cast)
        return {
            name: self._as_measured(values) for name, values in as_fields(output, samples).items()
        }

    def _as_measured(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return predictions of a target that is normalized in the unit of its files.

        Only those of a regression stand for the target itself.
        """
        if self._unit is None or values.dtype.kind != "f":
            return values
        mean, std = (np.asarray(each, values.dtype) for each in (self._unit.mean, self._unit.std))
        if mean.size > 1:  # of channels, the first axis of a sample
            mean, std = (each.reshape(-1, *[1] * (values.ndim - 2)) for each in (mean, std))
        measured: npt.NDArray[Any] = values * std + mean
        return measured

    def _output(self, model: nn.Module, fields: Fields) -> Any:
        return model(*[fields[name] for name in self.task.inputs])


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
        dataset: the samples of the split.
        metrics: empty where predictions were asked for.
        missing: shards of predictions that a stop has left for a later job.
    """

    chosen: Chosen
    dataset: Dataset
    metrics: Mapping[str, float]
    missing: int = 0

    @property
    def samples(self) -> int:
        return self.dataset.samples


def answer(
    config: Config,
    world: World,
    command: Sequence[str],
    *,
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
    # Predictions need no targets: the files may have none.
    fields = stored_fields(config) if output is None else _stored_inputs(config)
    served = open_split(config, world, split, chosen, fields)
    try:
        trained = Trained(config, world, components, chosen, served)
        if output is None:
            return Answer(chosen=chosen, dataset=served.dataset, metrics=trained.evaluate())
        origin = Origin(
            checkpoint=chosen.source,
            step=chosen.step,
            weights=chosen.weights,
            dataset=served.dataset.source,
            fingerprint=served.dataset.fingerprint,
        )
        writer = trained.predict(output, origin, stopping)
        return Answer(chosen=chosen, dataset=served.dataset, metrics={}, missing=writer.finish())
    finally:
        served.close()


def _stored_inputs(config: Config) -> list[str]:
    """Return the fields that the model receives, as files hold them."""
    return [name for name in stored_fields(config) if name in config.task.inputs]
