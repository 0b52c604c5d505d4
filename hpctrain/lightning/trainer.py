"""Lightning's Trainer by its methods: each runs a job of hpctrain with the objects of a script.

Every call makes its world of all ranks and leaves it: between two calls a script is N programs that
know nothing of each other, and may take what time they like.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpctrain.config import Config
from hpctrain.config.choices import choices, is_preparing
from hpctrain.errors import ConfigError, ExitCode, HpctrainError
from hpctrain.launch.environment import this_process
from hpctrain.launch.failure import end_quietly_if_uncaught
from hpctrain.launch.process_group import gathering, loading
from hpctrain.lightning.arguments import evaluation_keys, mapped, parse
from hpctrain.lightning.bring import Handed, hand
from hpctrain.lightning.checkpoints import export_for_scripts, tell
from hpctrain.lightning.facts import Facts, run_folder
from hpctrain.lightning.folders import Fit, choose_version, newest_version, script_name
from hpctrain.lightning.jobs import Started, make_config, started
from hpctrain.lightning.keys import Keys
from hpctrain.lightning.launching import compare, start_ranks
from hpctrain.topology import raise_together

logger = logging.getLogger("hpctrain")

_GIVEN = frozenset({"model", "data", "task", "optimizer"})
"""Sections of which a script brings objects."""


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
        with _told():
            self._given = parse(arguments)
            self._mapped = mapped(self._given, choices())
            self._claim = this_process()
            idle = start_ranks(
                self._claim,
                self._mapped.devices,
                self._mapped.num_nodes,
                self._mapped.keys.get("launch.device", "auto"),
            )
        super().__init__(self._claim, self._mapped, self._given)
        self._notes = [*self._mapped.notes, *([] if idle is None else [idle])]
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
        with _told():
            handed = hand(
                model,
                train=train_dataloaders,
                validation=val_dataloaders,
                datamodule=datamodule,
                accumulated=self._given.accumulate_grad_batches,
                callbacks=self._mapped.callbacks,
            )
            keys = self._mapped.keys | handed.keys | evaluation_keys(self._given, handed.batches)
            keys |= _start(ckpt_path)
        if is_preparing():
            self._prepare(handed)
            return
        self._fits += 1
        with started(self._claim) as job:
            compare(job.topology, self._mapped.devices, self._mapped.num_nodes)
            config = self._make_config(job, keys, is_last=ckpt_path == "last")
            self.begins(handed.brought, config, job.topology)
            ending = self._train(job, config, handed)
            if ending == ExitCode.DONE:
                self._export(job, config)
        if ending == ExitCode.STOPPED:
            raise _stopped(ending)

    def _train(self, job: Started, config: Config, handed: Handed) -> ExitCode:
        """Run the job. Collective: all ranks."""
        with gathering(job.topology, job.communicator, config.launch, job.guard) as meeting:
            with loading():
                from hpctrain.training.job import train

            return train(
                config,
                job.topology,
                job.communicator,
                meeting=meeting,
                signals=job.signals,
                guard=job.guard,
                command=["run", *sys.argv],
                brought=handed.brought,
            )

    def _export(self, job: Started, config: Config) -> None:
        """Leave the weights as a file for Lightning. Collective: all ranks."""
        if not self.checkpoint_callbacks:
            return
        exported: tuple[str, float | None] | None = None
        with raise_together(job.communicator):
            if job.topology.is_rank_zero:
                exported = export_for_scripts(run_folder(config))
        path, score = job.communicator.broadcast(exported)
        tell(self.checkpoint_callbacks, run_folder(config), path, score)

    def _make_config(self, job: Started, keys: Keys, *, is_last: bool) -> Config:
        """Return the config of a run, its folder chosen by rank 0. Collective: all ranks."""
        config: Config | None = None
        with raise_together(job.communicator):
            if job.topology.is_rank_zero:
                config = make_config(
                    keys | self._place(keys, is_last=is_last), self._given.overrides, _GIVEN
                )
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

    def _prepare(self, handed: Handed) -> None:
        """Fetch the data, and train nothing: `python -m hpctrain prepare`."""
        from hpctrain.training.prepare_data import prepare_alone

        brought = handed.brought
        prepare_alone(owner for owner in (brought.datamodule, brought.model) if owner is not None)


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
def _told() -> Iterator[None]:
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
