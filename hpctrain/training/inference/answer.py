"""What comes of `evaluate`, `test` and `predict`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.config import Config
from hpctrain.config.fields import stored_fields
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.map_style.dataset import MapDataset
from hpctrain.data.predictions import Origin
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.brought import NOTHING
from hpctrain.training.build import resolve_components
from hpctrain.training.inference.splits import Split, open_files, open_objects
from hpctrain.training.inference.stage import Stage
from hpctrain.training.inference.trained import Trained
from hpctrain.training.inference.weights import Chosen, choose_checkpoint
from hpctrain.training.user_data import brings_data


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
