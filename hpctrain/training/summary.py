"""The summary of a job: the header before training, and the lines at its end."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch

from hpctrain.config import Config
from hpctrain.config.limits import is_shuffled, train_limit
from hpctrain.config.schema_data import FieldTable
from hpctrain.data.dataset import Dataset
from hpctrain.data.decoding import described, unused_attributes
from hpctrain.data.order.epochs import source_epochs
from hpctrain.data.view import View
from hpctrain.launch.nccl_log import Transport, combine, describe, find_trouble
from hpctrain.launch.process_group import World
from hpctrain.observe.machine.log import energy_line, energy_since
from hpctrain.observe.metrics import JSONL_FILE
from hpctrain.observe.report import Best, HeaderFacts, SummaryFacts, header, summary
from hpctrain.training.build import Parts
from hpctrain.training.checkpointing.resume import Resumed
from hpctrain.training.data.run_data import Data, evaluated_samples
from hpctrain.training.position import Position
from hpctrain.training.rank_zero import RankZero, RunFolder
from hpctrain.training.record import changed_since
from hpctrain.training.run import Run
from hpctrain.utils.text import metric, plural

logger = logging.getLogger("hpctrain")


def header_text(
    config: Config,
    world: World,
    parts: Parts,
    data: Data,
    resumed: Resumed | None,
    place: Position,
    folder: RunFolder,
    changes: Sequence[str] = (),
) -> str:
    """Return the header of a run; `changes` is what else is not as it was."""
    if resumed is not None:
        changes = [*changes, *changed_since(resumed, folder.record, world)]
    parameters = list(parts.model.parameters())
    topology = world.topology
    return header(
        HeaderFacts(
            run=config.run.name,
            folder=str(folder.path),
            world_size=topology.world_size,
            num_nodes=topology.num_nodes,
            launcher=None if topology.launcher == "none" else topology.launcher,
            mpi=topology.mpi,
            backend=world.backend,
            devices=_devices(world),
            train_samples=data.train.samples,
            train_shards=len(data.train.shards),
            validation_samples=sum(each.dataset.samples for each in data.validations) or None,
            global_batch_size=config.data.global_batch_size,
            micro_batch_size=config.data.micro_batch_size or data.train_loader.largest_share,
            grad_accum_steps=parts.step.grad_accum_steps,
            model=config.model.use,
            parameters=sum(item.numel() for item in parameters),
            trainable=sum(item.numel() for item in parameters if item.requires_grad),
            parameter_bytes=sum(item.numel() * item.element_size() for item in parameters),
            precision=config.training.precision,
            total_steps=data.stop_at.total_steps(place),
            total_epochs=config.training.max_epochs,
            resume=None
            if resumed is None
            else f"step {place.step:,}, epoch {place.epoch}: {resumed.path}",
            notes=[*_notes(config, world, parts, data, resumed), *parts.notes, *changes],
        )
    )


def summary_text(
    config: Config,
    world: World,
    run: Run,
    rank_zero: RankZero,
    data: Data,
    complete: bool,
    command: Sequence[str],
) -> str:
    """Return the summary of a job whose last save is on disk."""
    best = rank_zero.store.best()
    trained = run.place.samples_seen - run.first_place.samples_seen
    phases = run.phases
    seconds = phases.totals()
    order = ("data", "compute", "communication", "checkpoint", "evaluation")
    folder = Path(config.run.directory, config.run.name)
    began = psutil.Process().create_time()
    node_seconds = world.topology.num_nodes * max(0.0, time.time() - began)
    energy = energy_since(folder, began)
    return summary(
        SummaryFacts(
            run=config.run.name,
            ended=_ended(run.stopping.reason) if complete else "stopped and saved",
            step=run.place.step,
            total_steps=data.stop_at.total_steps(run.place),
            elapsed_seconds=phases.elapsed(),
            skipped_steps=run.skipped_steps,
            last=run.metrics,
            best=None
            if best is None
            else Best(metric=best.metric, value=best.value, step=best.step),
            samples_per_second=trained / max(phases.elapsed(), 1e-9) if trained else None,
            seconds={phase: seconds[phase] for phase in order if phase in seconds},
            node_hours=node_seconds / 3600,
            energy=energy_line(None if energy is None else energy.to_json(node_seconds)),
            checkpoint=None if rank_zero.store.newest is None else str(rank_zero.store.newest),
            metrics=str(folder / JSONL_FILE),
            next_command=_next(config, world, run, data, complete, command),
        )
    )


def _ended(early: str | None) -> str:
    return "complete" if early is None else f"complete ({early})"


def _next(
    config: Config, world: World, run: Run, data: Data, complete: bool, command: Sequence[str]
) -> tuple[str, str]:
    """Return what one may want to do next, and the command for it."""
    if is_script(command):
        return ("start anew", _command(world, command)) if complete else ("resume", _LAST)
    if config.training.fast_dev_run:
        return "train", _command(world, _with(command, "training.fast_dev_run", "false"))
    if _is_script(command):
        return "start again" if complete else "resume", _command(world, command)
    if complete:
        early = run.stopping.reason is not None
        return "train on", _command(world, _further(command, _longer(data, run.place, early)))
    return "resume", _command(world, command)


_LAST = 'the same script, with ckpt_path="last"; a batch job that is started again needs none'


def is_script(command: Sequence[str]) -> bool:
    """Tell whether a job is one of a script, whose command has no overrides of a config."""
    return command[:1] == ["run"]


def _longer(data: Data, place: Position, early: bool) -> dict[str, int]:
    """Return limits under which a complete run has more to do."""
    further = data.stop_at.further(place)
    return {**further, "min_steps": 2 * place.step} if early else further


def complete_text(
    config: Config,
    world: World,
    data: Data,
    resumed: Resumed,
    early: str | None,
    command: Sequence[str],
) -> str:
    """Return what to say when there is nothing left to do."""
    place = resumed.place
    metrics = resumed.values["metrics"]
    shown = ", ".join(f"{name} {metric(value)}" for name, value in metrics.items())
    counted = f"{plural(place.step, 'step')}, {plural(place.epoch, 'epoch')}"
    facts = ", ".join(filter(None, [counted, shown]))
    head = [
        f"run {config.run.name} is {_ended(early)}: {facts}",
        f"  checkpoint  {resumed.path}",
    ]
    if is_script(command):
        return "\n".join(head)
    further = _further(command, _longer(data, data.place, early is not None))
    return "\n".join(
        [
            *head,
            f"  train on    {_command(world, further)}",
            f"  start anew  {_command(world, _with(command, 'run.name', f'{config.run.name}-2'))}",
        ]
    )


def _further(command: Sequence[str], limits: Mapping[str, int]) -> list[str]:
    """Return the command with limits under which a complete run has more to do."""
    longer = list(command)
    for name, limit in limits.items():
        longer = _with(longer, f"training.{name}", str(limit))
    return longer


def _with(command: Sequence[str], key: str, value: str) -> list[str]:
    """Return the command with one override set, in place of an earlier one."""
    return [*(word for word in command if not word.startswith(f"{key}=")), f"{key}={value}"]


def _command(world: World, command: Sequence[str]) -> str:
    """Return the command to type, under the launcher where its usage is plain."""
    launcher = world.topology.launcher
    prefix = ""
    if launcher.endswith("mpirun"):
        prefix = f"mpirun -np {world.topology.world_size} "
    elif launcher == "srun":
        prefix = "srun "
    program = "python" if _is_script(command) else "python -m hpctrain"
    return f"{prefix}{program} {shlex.join(command)}"


def _is_script(command: Sequence[str]) -> bool:
    """Tell whether a command is a program of the user's own, and not a config."""
    return command[0].endswith(".py")


def _devices(world: World) -> str:
    if world.device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(world.device)}"
    return f"{world.device.type}, {plural(torch.get_num_threads(), 'thread')} per rank"


def _notes(
    config: Config, world: World, parts: Parts, data: Data, resumed: Resumed | None
) -> list[str]:
    notes = []
    notes += _served(config, data)
    for name, each in data.transforms.train.decoding.all.items():
        table = config.data.fields.get(name, FieldTable())
        is_left = (table.fill, table.mask) == (None, None)
        is_nan = each.marks and not each.keeps_numbers and is_left
        hint = f"; missing ones are NaN, without data.fields.{name}.fill" if is_nan else ""
        notes.append(f"decoded: {name}, {described(each)}{hint}")
    for dataset in (data.train, data.validation):
        notes += dataset.notes if isinstance(dataset, View) else ()
    if isinstance(data.train, Dataset):
        notes += [f"not used: {each}" for each in unused_attributes(data.train)]
    notes += data.notes
    if parts.step.syncs:
        notes.append(
            f"{config.optimizer.use} has no fused kernels that refuse a bad gradient by "
            "themselves: every step waits for the device"
        )
    notes += parts.schedule.notes
    training = config.training
    if training.detect_anomaly:
        notes.append("training.detect_anomaly looks at every gradient, and makes steps slow")
    evaluates = training.evaluate_every_epochs or training.evaluate_every_steps
    if config.checkpoint.keep_best is not None and not evaluates:
        notes.append(
            "no best checkpoint is kept: training.evaluate_every_epochs = 0 makes no evaluations"
        )
    if parts.step.average is not None:
        notes.append("evaluations are of the moving average of the parameters")
    if resumed is not None:
        here = (world.topology.world_size, world.device.type, torch.get_num_threads())
        then = tuple(resumed.values[key] for key in ("world_size", "device", "threads"))
        for name, now, before in zip(("ranks", "device", "threads"), here, then, strict=True):
            if now != before:
                notes.append(
                    f"{name}: {before} when saved, {now} now; sums may differ in the last bit"
                )
        total_steps, lr = resumed.values["total_steps"], resumed.values["lr"]
        now_total = data.stop_at.total_steps(data.place)
        if now_total != total_steps:
            now_lr = parts.schedule(data.place, data.stop_at.end(data.place))
            notes.append(
                f"{total_steps:,} steps when saved, {now_total:,} now: the schedule is that of the "
                f"new length, lr {metric(lr)} before and {metric(now_lr)} now"
            )
    return notes


def _served(config: Config, data: Data) -> list[str]:
    """Return what of the data an epoch and an evaluation do not serve, or serve otherwise."""
    loader, batch = data.train_loader, config.data.global_batch_size
    length = loader.order_of(data.place.epoch + 1).length
    notes = []
    notes += _mixed(config, data)
    if config.data.weights is not None:
        notes.append(f"an epoch is {plural(length, 'sample')}, drawn by data.weights")
    elif not is_shuffled(config.data, config.training):
        notes.append("the samples come in the dataset's order, in every epoch")
    rest = length - loader.epoch_size
    if train_limit(config.training) is not None and rest:
        notes.append(f"an epoch ends after {loader.epoch_size:,} of {plural(length, 'sample')}")
    elif rest and config.data.drop_last:
        notes.append(f"data.drop_last leaves out the last {plural(rest, 'sample')} of an epoch")
    for name, each in data.evaluations.items():
        used = evaluated_samples(config, each.dataset.samples)
        notes.append(f"{name}: {plural(used, 'sample')} to evaluate with as well")
    for each in data.validations:
        used = evaluated_samples(config, each.dataset.samples)
        if used < each.dataset.samples:
            which = f"the first {used:,} of {plural(each.dataset.samples, 'sample')}"
            notes.append(
                f"an evaluation is of {which} ({plural(-(-used // batch), 'batch', 'batches')})"
            )
    return notes


def _mixed(config: Config, data: Data) -> list[str]:
    """Return by what the sources of a mixture are mixed, and from where on."""
    order = data.train_loader.order_of(data.place.epoch)
    if (mixture := order.mixture) is None:
        return []
    terms = mixture.newest
    total = sum(terms.weights)
    served = source_epochs(order, data.place.epoch, data.place.position)
    notes = [f"an epoch is {plural(order.length, 'sample')}, mixed of {len(served)} sources"]
    for index, source in enumerate(mixture.sources):
        part = terms.weights[index] / total
        per_epoch = part * order.length / source.samples
        then = "" if terms.repeats[index] else ", and is dropped once it was served"
        so_far = f"; {served[source.name]:.3g} so far" if data.place.step else ""
        notes.append(
            f"source {source.name}: {plural(source.samples, 'sample')}, {part:.4g} of every batch, "
            f"{per_epoch:.3g} of its epochs in one of the run{then}{so_far}"
        )
    if mixture.later is not None:
        first = mixture.start.position + mixture.round_rows * order.lanes
        then = f"sample {first:,} of epoch {data.place.epoch}"
        if first >= order.length:
            then = f"the start of epoch {data.place.epoch + 1}"
        notes.append(f"data.sources were changed: they are mixed as they are now from {then} on")
    return notes


def gather_transport(world: World) -> Transport | None:
    """Return what NCCL says of its way, None where it does not run. Collective: all ranks.

    To be called once gradients have been reduced: NCCL connects when it has to.
    """
    if world.backend != "nccl" or world.topology.world_size == 1:
        return None
    found = world.communicator.all_gather(
        Transport() if world.nccl_log is None else world.nccl_log.read()
    )
    return combine(found)


def transport_notes(world: World) -> list[str]:
    """Return a line for the header, and warn of a slow way beside a fast one.

    Collective: all ranks.
    """
    transport = gather_transport(world)
    if transport is None:
        return []
    num_nodes = world.topology.num_nodes
    if world.topology.is_rank_zero and (trouble := find_trouble(transport, num_nodes)):
        logger.warning(trouble)
    way = describe(transport, num_nodes)
    return [f"gradients: {way}"] if way else []
