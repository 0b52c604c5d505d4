"""`hpctrain.connect()`: the world of an own loop.

Nothing here imports torch before the world is made: MPI has to be up first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from hpctrain.config.choices import choices, device_of, precision_of, training_of
from hpctrain.config.schema import LaunchSection
from hpctrain.errors import ConfigError
from hpctrain.launch import process_group
from hpctrain.training.loops.base import LoopWorld

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor
    from torch.optim import Optimizer

    from hpctrain.training.loops.loader import Loader
    from hpctrain.training.loops.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class World(LoopWorld):
    """A proven world, ready to train in; made by `connect`."""

    def setup(
        self,
        *objects: Any,
        precision: str | int | None = None,
        strategy: str | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        **training: Any,
    ) -> Any:
        """Make models and their optimizers ready, and return them. Collective: all ranks.

        They stay the same objects. A model goes to the device, and every rank's is rank 0's;
        calling it, its methods, its attributes and its `state_dict` work at any world size. The
        optimizer's `step` averages the gradients over the ranks, clips them, and leaves everything
        as it is where they are not finite. A schedule is made after this, of the optimizer that
        comes back.

        Args:
            objects: one model or several, and optimizers of their parameters.
            precision: such as "bf16-mixed"; None: that of `connect`.
            strategy: "ddp" or "fsdp"; None: that of `connect`.
            clip_norm: clip the norm of an optimizer's whole gradient to this.
            clip_value: clip every element of the gradient to this, after its norm.
            training: further keys of `[training]`, such as `shard`.

        Returns:
            What was given: one object, or a tuple of them in the same order.

        Raises:
            ConfigError: on every rank, if they do not fit together or cannot be trained so.
        """
        from hpctrain.training.loops.setup import section_for, set_up

        section = section_for(
            precision=self.precision if precision is None else precision_of(precision),
            training={
                **(self.training if strategy is None else training_of(strategy)),
                **training,
            },
            clip_norm=clip_norm,
            clip_value=clip_value,
        )
        set_up(self, self.setups, objects, section)
        return objects[0] if len(objects) == 1 else objects

    def loader(
        self,
        source: Any,
        batch_size: int,
        *,
        training: bool = True,
        fields: Sequence[str] | None = None,
        **options: Any,
    ) -> Loader:
        """Return batches of a dataset on the device. Collective: all ranks.

        Args:
            source: a folder of shards or a pattern of HDF5 files, or a map-style torch Dataset.
            batch_size: samples of all ranks together: the same batches at any world size.
            training: in the one order, another one each epoch; False: every sample exactly once,
                in the dataset's order.
            fields: of the files, that are wanted; None: all.
            options: further keys of `[data]`, such as `micro_batch_size`, `drop_last`, `normalize`.

        Raises:
            ConfigError: on every rank, if an option is none, or of a wrong type.
            DatasetError: on every rank, if there are no such data.
        """
        from hpctrain.training.loops.loader import Loader

        return Loader(
            self,
            self.setups,
            source,
            batch_size=batch_size,
            training=training,
            seed=self.seed,
            fields=None if fields is None else tuple(fields),
            options=options,
        )

    def run(
        self,
        folder: str | Path,
        models: Any,
        optimizers: Any,
        loader: Loader | None = None,
        *,
        schedule: Any = None,
        epochs: int | None = None,
        steps: int | None = None,
        save_epochs: int = 1,
        save_steps: int = 0,
        save_minutes: float = 0.0,
        keep_last: int = 3,
        keep_best: str | None = None,
        keep_best_mode: Literal["min", "max"] | None = None,
        resume: str = "auto",
        log_steps: int = 10,
        progress: Literal["auto", "bar", "lines", "none"] = "auto",
        max_minutes: float | None = None,
        trackers: Sequence[Mapping[str, Any]] = (),
        notify: Mapping[str, Any] = MappingProxyType({}),
    ) -> AbstractContextManager[Run]:
        """Hold a run folder in a `with` block, as a job does. Collective: all ranks.

        The run goes on from its newest checkpoint, bit for bit; it ends at a step that all ranks
        agree on when the batch system's time runs out, a signal comes or there is a file STOP in
        the folder. Then all is saved, and the program ends with exit code 75 after the block: the
        next one goes on from there.

        Args:
            folder: of the run; it need not be there.
            models: that were set up: one, a list, or a dict with their names in checkpoints.
            optimizers: one, or a list of all of these models'.
            loader: of the data to train with; None: the loop has other samples, and `steps`.
            schedule: of torch's learning rates, or a list of them; they are saved with the run, and
                the loop steps them.
            epochs: end after so many epochs.
            steps: end after so many steps.
            save_epochs: save after so many epochs; 0: never. The end is always saved.
            save_steps: save after so many steps; 0: never.
            save_minutes: save once so many minutes have passed; 0: never.
            keep_last: keep the newest so many checkpoints.
            keep_best: also keep the best one by this metric of `run.evaluation()`.
            keep_best_mode: which direction is better; None: "min".
            resume: "auto", "never", or the folder of a checkpoint.
            log_steps: write a line of metrics after so many steps.
            progress: "bar", "lines" or "none"; "auto": a bar on a terminal.
            max_minutes: save and stop so long after the job began; None: no limit.
            trackers: as `[[trackers]]` of a config: {"use": "wandb", "project": "digits"}.
            notify: as `[notify]` of a config: {"command": ["/home/me/bin/tell"], "on": ["end"]}.

        Raises:
            ConfigError: on every rank, if an argument makes no sense.
            CheckpointError: on every rank, if the folder is in use, or cannot be written to.
        """
        from hpctrain.training.loops.running import RunOptions, running

        options = RunOptions.of(
            epochs=epochs,
            steps=steps,
            max_seconds=None if max_minutes is None else 60 * max_minutes,
            log_steps=log_steps,
            progress=progress,
            every_epochs=save_epochs,
            every_steps=save_steps,
            every_minutes=save_minutes,
            keep_last=keep_last,
            keep_best=keep_best,
            keep_best_mode=keep_best_mode,
            resume=resume,
            trackers=trackers,
            notify=notify,
        )
        return running(self, folder, models, optimizers, loader, schedule=schedule, options=options)

    def backward(self, loss: Tensor, *, samples: int | None = None) -> None:
        """Run a backward pass, from a scaled loss in 16-mixed. Under FSDP, collective: all ranks.

        Args:
            loss: (), a mean over samples.
            samples: how many: `batch.size`. Then the update is that of the mean over the global
                batch, whatever each rank's share. None: the mean over the ranks, as DDP's is.

        Raises:
            TrainingError: on this rank, if the running batch has another number of samples.
        """
        self.setups.backward(loss, self.setups.factor(samples, self.world_size))

    def step(self, loss: Tensor, optimizer: Optimizer, *, samples: int | None = None) -> None:
        """Run a backward pass and the update by it, and forget the gradients. Collective.

        As `backward`, `optimizer.step()` and `optimizer.zero_grad()`, but that gradients are
        averaged beside the backward pass. What earlier passes have added up is part of them.

        Args:
            loss: (), a mean over samples.
            optimizer: that was set up.
            samples: as `backward` takes it.

        Raises:
            TrainingError: on this rank, if the running batch has another number of samples.
        """
        stepper = self.setups.stepper_of(optimizer)
        factor = self.setups.factor(samples, self.world_size)
        self.setups.backward(loss, factor, stepper)
        optimizer.step()  # with what a schedule has put around it
        stepper.clear_gradients()

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's value on rank 0, in rank order, None elsewhere. Collective.

        Args:
            value: numbers, texts, arrays, tensors, and containers of these; tensors come back on
                the host.
        """
        from hpctrain.data.loading.batch import map_tensors
        from hpctrain.training.evaluation import gather_at_rank_zero

        return gather_at_rank_zero(map_tensors(lambda item: item.detach().cpu(), value), self)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all ranks, (rows, ...), with gradients. Collective: all ranks.

        Args:
            tensor: (rows, ...), of which ranks may have different numbers; a number is one row.
        """
        from hpctrain.training.parallel.gather_rows import gather_rows

        return gather_rows(self, tensor)

    def reduce(
        self, value: Tensor | float, how: Literal["mean", "sum", "min", "max"] = "mean"
    ) -> Tensor:
        """Return the mean, sum, minimum or maximum over all ranks. Collective: all ranks."""
        from hpctrain.training.loops.collectives import reduce

        return reduce(self, value, how)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank. Collective: all ranks.

        Args:
            value: a tensor, of one shape and dtype on all ranks; or numbers, texts and containers
                of these.
        """
        from hpctrain.training.loops.collectives import broadcast

        return broadcast(self, value)

    def barrier(self) -> None:
        """Return once every rank has come. Collective: all ranks."""
        self.communicator.barrier()

    def print(self, *words: Any, **options: Any) -> None:
        """Print on rank 0 only; not collective."""
        if self.is_rank_zero:
            print(*words, **{"flush": True, **options})  # noqa: T201 - what it is for


@contextmanager
def connect(
    section: LaunchSection | None = None,
    *,
    communicator: Any = None,
    seed: int | None = None,
    device: str | None = None,
    precision: str | int | None = None,
    strategy: str | None = None,
) -> Iterator[World]:
    """Make the world of this job and give it, ready for a training loop of your own.

    Collective: all ranks. On leaving, the process group is destroyed and MPI finalized, where MPI
    was not up before. An exception of one rank ends the whole job, with its traceback; in a world
    of one process it is the caller's to catch. `sys.exit(0)` leaves as the end of the body does.

    What is None here is as the command line of `python -m hpctrain run` has chosen it.

    Example:
        >>> with hpctrain.connect(seed=1) as world:
        ...     net, optimizer = world.setup(net, optimizer)

    Args:
        section: of the launch; None: as a config without one has it.
        communicator: mpi4py's, of the ranks that train, where an mpirun has started others too,
            such as a simulation; None: all ranks. A failure ends all that mpirun has started.
        seed: of torch's, numpy's and Python's generators, the same on all ranks until training
            begins, and of the order of the data.
        device: "cpu", "gpu", "auto", ...
        precision: of models, such as "bf16-mixed".
        strategy: "ddp" or "fsdp".

    Raises:
        LaunchError: if the processes cannot form one world.
        ConfigError: if there is no such device, precision or strategy.
    """
    chosen = choices()
    accelerator = chosen.accelerator if device is None else device_of(device)
    section = section or LaunchSection()
    if accelerator is not None:
        section = replace(section, device=accelerator)  # type: ignore[arg-type]
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"seed = {seed}: expected a whole number from 0 to 2**63 - 1")
    training = chosen.training if strategy is None else training_of(strategy)
    number_format = chosen.precision if precision is None else precision_of(precision)
    with process_group.connect(section, communicator=communicator) as world:
        from hpctrain.training.compiler import leave_out_compiler
        from hpctrain.training.loops.registry import Setups

        leave_out_compiler()

        if seed is not None:
            from hpctrain.training.model.undisturbed import seed_generators

            seed_generators(seed)
        facts = {each.name: getattr(world, each.name) for each in fields(world)}
        yield World(
            **facts,
            seed=seed,
            precision=number_format or "32-true",
            training=training,
            setups=Setups(),
        )
