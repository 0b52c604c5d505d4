"""Jobs of a program: the ranks that it runs on, `hpctrain.train`, and `prepare`, which fetches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from hpctrain.batch.stop import SignalFlag
from hpctrain.config import Config, load
from hpctrain.config.choices import is_preparing
from hpctrain.config.data_rules import names_object
from hpctrain.errors import ConfigError, ExitCode, HpctrainError, TrainingError
from hpctrain.launch.environment import Claim, this_process
from hpctrain.launch.failure import Guard, end_quietly_if_uncaught, guard
from hpctrain.launch.process_group import (
    alone_in_this_process,
    control_plane,
    gathering,
    loading,
)
from hpctrain.launch.reporter import reporting
from hpctrain.topology import Communicator, Topology, on_rank_zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What every rank has before the process group is made."""

    topology: Topology
    communicator: Communicator
    guard: Guard
    signals: SignalFlag


@contextmanager
def started(claim: Claim, *, stops: bool = True) -> Iterator[Started]:
    """Connect all ranks for messages; a failure of all is reported once. Collective: all ranks.

    An exception of one rank ends the job; in a world of one process it is the caller's to catch.

    Args:
        claim: what the launcher says of this process.
        stops: signals ask for a stop, which somebody acts upon; else they are as they were.

    Raises:
        HpctrainError: of all ranks.
    """
    try:
        with (
            alone_in_this_process(),
            SignalFlag() if stops else nullcontext(SignalFlag()) as signals,
            control_plane(claim, keep_mpi=True) as (topology, communicator),
            # One process reports nothing: its failure may be caught.
            reporting(topology.is_rank_zero) if topology.world_size > 1 else nullcontext(),
            guard(topology, is_callers=True) as job_guard,
        ):
            yield Started(
                topology=topology, communicator=communicator, guard=job_guard, signals=signals
            )
    except HpctrainError as error:
        end_quietly_if_uncaught(error)
        raise


class Stopped(SystemExit):
    """All ranks have saved and stopped early: the program is to be started again."""

    everywhere = True


def train(
    config: str | Path | Config,
    overrides: Sequence[str] | Callable[[], Sequence[str]] = (),
    *,
    prune: Callable[[int, Mapping[str, float]], object] | None = None,
) -> dict[str, float]:
    """Train as `python -m hpctrain CONFIG` does, and return the metrics. Collective: all ranks.

    Under a launcher on all its ranks, else in one process; it may be called again and again, as for
    a sweep. A run that is complete is not trained again. Under `python -m hpctrain prepare` it
    fetches the data, and returns nothing.

    Args:
        config: a file, or what `load_config` gives.
        overrides: as on the command line, such as "optimizer.lr=0.01"; for a file. Those of rank 0
            count: a function that returns them is called there alone.
        prune: is called on rank 0 alone behind each evaluation, with the step and the metrics; the
            run is complete where it returns something true, on all ranks.

    Returns:
        Those of the newest evaluation; without any, the loss of the last step in the metrics.

    Raises:
        HpctrainError: on every rank.
        SystemExit: with code 75, where all ranks have saved and stopped early.
    """
    path = "" if isinstance(config, Config) else str(config)
    if not path and overrides:
        raise ConfigError("hpctrain.train: overrides are for a file: give load_config them")
    if is_preparing():
        own = list(overrides() if callable(overrides) else overrides)
        found = config if isinstance(config, Config) else load(path, own)
        fetch(found, path or "CONFIG", own)
        return {}
    with started(this_process()) as job:

        def loaded() -> tuple[Config, list[str]]:
            if isinstance(config, Config):
                return config, []
            own = _asked(overrides)
            return load(path, own), own

        resolved, own = on_rank_zero(job.communicator, loaded)
        with gathering(job.topology, job.communicator, resolved.launch, job.guard) as meeting:
            with loading():
                # torch follows MPI.
                from hpctrain.training.components import Brought
                from hpctrain.training.job import train as run_job

            code = run_job(
                resolved,
                job.topology,
                job.communicator,
                meeting=meeting,
                signals=job.signals,
                guard=job.guard,
                command=[path, *own] if path else [sys.argv[0] or "python"],
                brought=Brought(prune=prune),
            )
            metrics = on_rank_zero(job.communicator, lambda: _metrics(resolved))
    if code == ExitCode.STOPPED:
        raise Stopped(int(code))
    return metrics


def _asked(overrides: Sequence[str] | Callable[[], Sequence[str]]) -> list[str]:
    """Return the overrides that a caller gives, or that its function returns.

    Raises:
        TrainingError: if that fails, as all ranks are to hear.
    """
    if not callable(overrides):
        return list(overrides)
    try:
        return list(overrides())
    except HpctrainError:
        raise
    except Exception as error:
        raise TrainingError(
            f"the function of overrides has failed: {type(error).__name__}: {error}"
        ) from error


def _metrics(config: Config) -> dict[str, float]:
    """Return the numbers that a run ended with, as its checkpoint and its metrics have them."""
    from hpctrain.observe.metrics import JSONL_FILE
    from hpctrain.observe.records import newest_records
    from hpctrain.training.checkpointing.resume import values_to_go_on_from

    values = values_to_go_on_from(config) or {}
    if metrics := values.get("metrics"):
        return dict(metrics)
    records = newest_records(Path(config.run.directory, config.run.name, JSONL_FILE))
    loss = records.get("train", {}).get("loss")
    return {} if loss is None else {"loss": loss}


def fetch(config: Config, path: str, overrides: Sequence[str]) -> list[str]:
    """Make the model and its data, have them fetch what they need, and train nothing.

    Args:
        config: names them.
        path: of its file.
        overrides: that it was read with.

    Returns:
        What was made, in words.

    Raises:
        ConfigError: if it cannot be made.
        DatasetError: if there is no internet here.
    """
    from hpctrain.training.build import make_model
    from hpctrain.training.components import resolve_components
    from hpctrain.training.data.user_data import built_object
    from hpctrain.training.prepare_data import prepare_alone

    section = config.data
    made: list[tuple[str, object]] = []
    if section.use is not None:
        made.append(("data", built_object("data.use", section.use, section.arguments)))
    for name, reference, arguments in (
        ("data.train", section.train, section.train_arguments),
        ("data.validation", section.validation, section.validation_arguments),
        ("data.test", section.test, {}),
    ):
        if reference is not None and names_object(reference):
            made.append((name, built_object(name, reference, arguments)))
    # Models that begin with weights of others download them as they are made.
    model = make_model(config, resolve_components(config, path, overrides))
    made.append(("model", model))
    prepare_alone(each for _, each in made if each is not None)
    return [f"{name}: {type(each).__name__}" for name, each in made]
