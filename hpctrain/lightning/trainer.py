"""Lightning's Trainer by its methods: each runs a job of hpctrain with the objects of a script.

Every call makes its world of all ranks and leaves it: between two calls a script is N programs that
know nothing of each other, and may take what time they like.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from hpctrain.config import Config
from hpctrain.config.choices import as_options, choices, is_preparing
from hpctrain.errors import ConfigError, ExitCode, HpctrainError
from hpctrain.launch.environment import this_process
from hpctrain.launch.failure import end_quietly_if_uncaught
from hpctrain.launch.process_group import gathering, loading, process_group
from hpctrain.lightning.after import AfterFit, note_rank
from hpctrain.lightning.arguments import evaluation_keys, mapped, parse
from hpctrain.lightning.bring import (
    Handed,
    ModuleData,
    apart,
    hand,
    hand_to_evaluate,
    tear_down,
)
from hpctrain.lightning.facts import Facts, run_folder
from hpctrain.lightning.folders import (
    Exports,
    Fit,
    choose_version,
    export_for_scripts,
    newest_version,
    report_files,
    report_stopping,
    script_name,
    stopping_state,
)
from hpctrain.lightning.keys import Keys, make_config
from hpctrain.lightning.launching import compare, start_ranks
from hpctrain.lightning.objects import Loggers
from hpctrain.observe import log
from hpctrain.topology import raise_together
from hpctrain.training.program import Started, started
from hpctrain.utils.text import metric

logger = logging.getLogger("hpctrain")


class Trainer(Facts):
    """Trains Lightning's modules over hpctrain's ranks; takes what Lightning's Trainer takes.

    Example:
        >>> from hpctrain.lightning import Trainer
        >>> trainer = Trainer(max_epochs=2, precision="bf16-mixed")
        >>> trainer.fit(module, loader, validation_loader)

    Attributes of Lightning's Trainer that are facts are here as well: `global_step`,
    `callback_metrics`, `checkpoint_callback.best_model_path`, ...
    """

    def __init__(self, **arguments: Any) -> None:
        """Understand the arguments, and become the ranks that they ask for.

        Args:
            arguments: those of Lightning's Trainer, and `overrides`: keys of the config as on the
                command line, such as ["checkpoint.every_minutes=30"].

        Raises:
            HpctrainError: if one of them cannot be had, or the ranks cannot.
        """
        with _mistakes_reported():
            self._given = parse(arguments)
            self._mapped = mapped(self._given, choices())
            self._claim = this_process()
            idle = None
            if not is_preparing():
                idle = start_ranks(
                    self._claim,
                    self._mapped.devices,
                    self._mapped.num_nodes,
                    self._mapped.keys.get("launch.device", "auto"),
                )
        super().__init__(self._claim, self._mapped, self._given)
        self._notes = [*self._mapped.notes, *([] if idle is None else [idle])]
        self._sources: dict[str, str] = {}
        self._fits = 0

    def fit(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train. Collective: all ranks.

        A job that is asked to stop saves, and ends the script with exit code 75: what comes after
        `fit` is for the job that has trained to the end.

        Args:
            model: the module, which is trained in place.
            train_dataloaders: a DataLoader; its batch size is that of a step over all ranks.
            val_dataloaders: a DataLoader for evaluations.
            datamodule: makes both.
            ckpt_path: "last": go on from the newest run of this script; a checkpoint of hpctrain to
                go on from; or a file of Lightning's, of which the weights are taken.
            weights_only: nothing else is ever read from a file of Lightning's.

        Raises:
            HpctrainError: on every rank.
        """
        del weights_only
        with _mistakes_reported():
            self._mapped = self._understand_callbacks() or self._mapped
            train_dataloaders, datamodule = apart(train_dataloaders, datamodule)
            handed = hand(
                model,
                train=train_dataloaders,
                validation=val_dataloaders,
                datamodule=datamodule,
                accumulated=self._given.accumulate_grad_batches,
                callbacks=self._mapped.callbacks,
            )
            keys = self._mapped.keys | handed.keys | evaluation_keys(self._given, handed.batches)
            keys |= _seed() | _start(ckpt_path)
        if is_preparing():
            self._prepare(handed)
            return
        self._fits += 1
        model = handed.brought.model
        with started(self._claim) as job:
            compare(job.topology, self._mapped.devices, self._mapped.num_nodes)
            note_rank(job.topology.rank)
            config = self._make_config(job, keys, is_last=ckpt_path == "last")
            self.begins(model, datamodule, config, job.topology)
            ending = self._train(job, config, handed)
            if ending == ExitCode.DONE:
                self._report(job, config)
        if ending == ExitCode.STOPPED:
            raise _stopped(ending)

    def _train(self, job: Started, config: Config, handed: Handed) -> ExitCode:
        """Run the job. Collective: all ranks."""
        model = handed.brought.model
        assert model is not None
        Loggers.move(self._mapped.shown_loggers, config.run.name)
        after = AfterFit(model)
        brought = replace(
            handed.brought,
            callbacks=[*handed.brought.callbacks, after],
            loggers=self._mapped.loggers,
            shown_loggers=self._mapped.shown_loggers,
            notes=self._notes,
        )
        with gathering(job.topology, job.communicator, config.launch, job.guard) as meeting:
            with loading():
                from hpctrain.training.job import train

            ending = train(
                config,
                job.topology,
                job.communicator,
                meeting=meeting,
                signals=job.signals,
                guard=job.guard,
                command=["run", *as_options(), *sys.argv],
                brought=brought,
            )
        if isinstance(handed.brought.datamodule, ModuleData):
            handed.brought.datamodule.release()
        tear_down(handed.brought.datamodule, "fit")
        after.settle(config, is_complete=ending == ExitCode.DONE)
        return ending

    def _report(self, job: Started, config: Config) -> None:
        """Have callbacks of Lightning's classes know the end of a run. Collective: all ranks."""
        if not (self.checkpoint_callbacks or self.early_stopping_callbacks):
            return
        found: tuple[Any, Any, Mapping[str, Any]] | None = None
        run, objects = run_folder(config), self.checkpoint_callbacks
        with raise_together(job.communicator):
            if job.topology.is_rank_zero:
                files = export_for_scripts(run, self.model, objects) if objects else Exports()
                found = files.scores, files.sources, stopping_state(run)
        scores, sources, state = job.communicator.broadcast(found)
        report_files(objects, run, scores)
        self._sources |= sources
        report_stopping(self.early_stopping_callbacks, state, self.current_epoch - 1)

    def _make_config(self, job: Started, keys: Keys, *, is_last: bool) -> Config:
        """Return the config of a run, its folder chosen by rank 0. Collective: all ranks."""
        config: Config | None = None
        with raise_together(job.communicator):
            if job.topology.is_rank_zero:
                place = self._place(keys, is_last=is_last)
                config = make_config(keys | place, self._given.overrides)
        config = job.communicator.broadcast(config)
        assert config is not None
        return config

    def _place(self, keys: Keys, *, is_last: bool) -> Keys:
        """Return the folder of this fit, as keys; for rank 0."""
        directory = keys.get("run.directory")
        if directory is None:
            directory = str(Path(self._given.default_root_dir or "runs", script_name()))
        place: Keys = {"run.directory": directory}
        if "run.name" not in keys:
            fit = Fit.of_this_process(self._fits, os.environ)
            folder = Path(directory)
            place["run.name"] = newest_version(folder) if is_last else choose_version(folder, fit)
        return place

    def validate(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Return what `validation_step` logs over all samples. Collective: all ranks.

        Args:
            model: the module; None: that of the last call, with the best weights of its run.
            dataloaders: a DataLoader.
            ckpt_path: "best" or "last" of the last run, a checkpoint, or a file of weights.
            verbose: print the metrics on rank 0.
            datamodule: makes the DataLoader.
            weights_only: nothing else is ever read from a file.

        Returns:
            One dictionary for each loader.

        Raises:
            HpctrainError: on every rank.
        """
        del weights_only
        found = self._evaluated("validate", model, dataloaders, datamodule, ckpt_path)
        return self._shown("validation", found, verbose=verbose)

    def test(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Return what `test_step` logs over all samples, see `validate`. Collective: all ranks."""
        del weights_only
        found = self._evaluated("test", model, dataloaders, datamodule, ckpt_path)
        return self._shown("test", found, verbose=verbose)

    def predict(
        self,
        model: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> list[Any] | None:
        """Return what `predict_step` gives for each batch, see `validate`. Collective: all ranks.

        Returns:
            On rank 0 a list in the dataset's order, of the loader's batches at any number of
            ranks, of several loaders one for each; None on other ranks, or with
            `return_predictions=False`.
        """
        del weights_only
        found: list[Any] | None
        found = self._evaluated("predict", model, dataloaders, datamodule, ckpt_path)
        return None if return_predictions is False else found

    def _evaluated(
        self,
        stage: Literal["validate", "test", "predict"],
        model: Any,
        loader: Any,
        datamodule: Any,
        ckpt_path: str | os.PathLike[str] | None,
    ) -> Any:
        """Run a stage in a world of its own. Collective: all ranks."""
        with _mistakes_reported():
            self._mapped = self._understand_callbacks() or self._mapped
            if model is None and self.model is None:
                raise ConfigError(f"trainer.{stage}: which module? Give it one")
            weights = None if ckpt_path is None else os.fspath(ckpt_path)
            # A file for scripts has what a module was made with, which may be no plain data.
            weights = self._sources.get(weights or "", weights)
            if model is None and weights is None and self._config is not None:
                weights = ""
            if loader is None and datamodule is None:
                datamodule = self.datamodule
            handed = hand_to_evaluate(
                stage,
                self.model if model is None else model,
                loader,
                datamodule,
                self._mapped.callbacks,
            )
            config = self._evaluation_config(handed, weights)
            if weights == "best" and config.checkpoint.keep_best is None:
                weights = "last"  # as Lightning's ModelCheckpoint without a monitor has it
        if is_preparing():
            self._prepare(handed)
            return []
        with started(self._claim, stops=False) as job:
            note_rank(job.topology.rank)
            self._topology = job.topology
            found = self._in_world(job, config, handed, stage, weights)
        self.model, self.datamodule = handed.brought.model, handed.brought.datamodule
        tear_down(self.datamodule, stage)
        self.model.cpu()
        return found

    def _in_world(
        self,
        job: Started,
        config: Config,
        handed: Handed,
        stage: Literal["validate", "test", "predict"],
        weights: str | None,
    ) -> Any:
        brought, given = handed.brought, self._given
        is_reporter = job.topology.is_rank_zero
        with (
            log.start(None, is_reporter=is_reporter),
            gathering(job.topology, job.communicator, config.launch, job.guard) as meeting,
            process_group(
                job.topology, job.communicator, config.launch, meeting, job.guard
            ) as world,
        ):
            from hpctrain.training.inference.modules import module_metrics, module_predictions

            if stage == "predict":
                limit = given.limit_predict_batches
                return module_predictions(config, world, brought, weights=weights, limit=limit)
            limit = given.limit_test_batches if stage == "test" else given.limit_val_batches
            return module_metrics(config, world, brought, stage, weights=weights, limit=limit)

    def _evaluation_config(self, handed: Handed, weights: str | None) -> Config:
        """Return the config of the run whose weights are wanted, or one without a run."""
        if weights in ("", "best", "last"):
            if self._config is None:
                raise ConfigError(
                    f'ckpt_path="{weights}": this trainer has not run fit: name a checkpoint'
                )
            return self._config
        keys = {
            key: value
            for key, value in self._mapped.keys.items()
            if not key.startswith(("checkpoint.", "early_stopping."))
        }
        return make_config(
            keys | handed.keys | _seed() | {"run.name": "evaluation"}, self._given.overrides
        )

    def _shown(
        self, name: str, found: list[dict[str, float]], *, verbose: bool
    ) -> list[dict[str, float]]:
        for metrics in found if verbose else ():
            shown = "  ".join(f"{key} {metric(value)}" for key, value in metrics.items())
            if shown:
                self.print(f"{name}  {shown}")
        return found

    def save_checkpoint(
        self,
        filepath: str | os.PathLike[str],
        weights_only: bool | None = None,
        storage_options: Any = None,
    ) -> None:
        """Write the weights of the last call's module as a file for `load_from_checkpoint`.

        On rank 0 alone; the checkpoints that a run goes on from are in its folder.

        Raises:
            HpctrainError: if there is no module yet, or the file cannot be written.
        """
        del weights_only, storage_options
        if self.model is None:
            raise ConfigError("trainer.save_checkpoint: there is no module yet: call fit first")
        if self.is_global_zero:
            from hpctrain.checkpoint.lightning_file import VERSION, hyperparameters, write_file

            content = {
                "epoch": self.current_epoch,
                "global_step": self.global_step,
                "pytorch-lightning_version": VERSION,
                "state_dict": self.model.state_dict(),
                **hyperparameters(self.model),
            }
            write_file(content, Path(filepath))

    def _prepare(self, handed: Handed) -> None:
        """Fetch the data, and train nothing: `python -m hpctrain prepare`."""
        from hpctrain.training.prepare_data import prepare_alone

        brought = handed.brought
        prepare_alone(owner for owner in (brought.datamodule, brought.model) if owner is not None)


def _seed() -> Keys:
    """Return the seed that `seed_everything` has left in the environment."""
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return {"run.seed": int(seed)} if seed.isdecimal() else {}


def _start(ckpt_path: str | os.PathLike[str] | None) -> Keys:
    """Return what a run begins with."""
    if ckpt_path is None or ckpt_path == "last":
        return {}
    if ckpt_path in ("best", "hpc", "registry"):
        raise ConfigError(
            f'ckpt_path="{ckpt_path}": fit goes on from "last", or from a checkpoint by its path',
            everywhere=True,
        )
    path = Path(ckpt_path)
    if path.is_dir():
        return {"checkpoint.resume": str(path)}
    return {"checkpoint.initialize_from": str(path)}


@contextmanager
def _mistakes_reported() -> Iterator[None]:
    """Have a mistake that the script does not catch end it by its message and exit code.

    Not collective: every rank runs the script, and makes the same mistake.
    """
    try:
        yield
    except HpctrainError as error:
        error.everywhere = True
        end_quietly_if_uncaught(error)
        raise


def _stopped(ending: ExitCode) -> SystemExit:
    """Return the end of a program whose ranks have all been stopped, and have saved."""
    asked = SystemExit(int(ending))
    asked.__dict__["everywhere"] = True  # as `connect()` and `run` know it: in good order
    return asked
