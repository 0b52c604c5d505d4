"""The header before training and the summary after it: facts in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpctrain.utils import text

_COLUMNS = 100
_INDENT = "  "
_LABEL_COLUMNS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderFacts:
    """What a run is, before its first step.

    Attributes:
        run: its name.
        folder: its folder, as the user can type it.
        world_size: ranks.
        num_nodes: nodes.
        launcher: what started the ranks, such as "mpirun"; None: nothing, one process alone.
        mpi: name and version of the MPI library, None without MPI.
        backend: carrier of gradients, None for one process.
        devices: such as "cpu, 1 thread per rank" or "cuda, NVIDIA H100".
        train_samples: samples of the training data.
        train_shards: files that they lie in; 0: torch Datasets.
        validation_samples: None without validation data.
        global_batch_size: samples of all ranks in one step.
        micro_batch_size: at most so many per rank and forward pass.
        grad_accum_steps: forward passes per rank and step.
        model: as named in the config.
        parameters: numbers in the model.
        trainable: of these, numbers that are trained.
        parameter_bytes: memory of the parameters.
        precision: as named in the config.
        total_steps: the step at which the run is complete.
        total_epochs: None where the run is not counted in epochs.
        resume: what it continues from, such as "step 120, epoch 5: runs/a/checkpoints/..."; None:
            it starts from scratch.
        notes: what else a user should know, one line each.
    """

    run: str
    folder: str
    world_size: int
    num_nodes: int
    launcher: str | None
    mpi: str | None
    backend: str | None
    devices: str
    train_samples: int
    train_shards: int
    validation_samples: int | None
    global_batch_size: int
    micro_batch_size: int
    grad_accum_steps: int
    model: str
    parameters: int
    trainable: int
    parameter_bytes: int
    precision: str
    total_steps: int
    total_epochs: int | None
    resume: str | None
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best value of the metric by which the best checkpoint is kept."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryFacts:
    """What came of a run, or of one job of it.

    Attributes:
        run: its name.
        ended: how, such as "complete" or "stopped: SIGTERM".
        step: where it stands.
        total_steps: where it is complete.
        elapsed_seconds: of this job.
        skipped_steps: steps of the run that were not applied.
        last: the newest metrics of the evaluation, or of training if there was none.
        best: None where no best is kept, or nothing was evaluated.
        samples_per_second: of all ranks together; None if no step was done.
        seconds: by phase, in the order to show; with their shares in the sum.
        node_hours: of this job, from the start of its processes.
        energy: of this job, in words.
        checkpoint: the newest, None if there is none.
        metrics: the file of all metrics.
        next_command: (what it does, the command), such as ("resume", "mpirun -np 2 python ...").
    """

    run: str
    ended: str
    step: int
    total_steps: int
    elapsed_seconds: float
    skipped_steps: int
    last: Mapping[str, float]
    best: Best | None
    samples_per_second: float | None
    seconds: Mapping[str, float]
    node_hours: float
    energy: str
    checkpoint: str | None
    metrics: str
    next_command: tuple[str, str]


def header(facts: HeaderFacts) -> str:
    """Return the header of a run: aligned plain text, one line a fact."""
    rows: list[tuple[str, str | list[str]]] = [
        ("folder", facts.folder),
        ("world", _world(facts)),
        ("devices", facts.devices),
        ("data", _data(facts)),
        ("batch", _batch(facts)),
        ("model", _model(facts)),
        ("precision", facts.precision),
        ("length", _length(facts)),
        ("start", "from scratch" if facts.resume is None else f"resumes from {facts.resume}"),
        *(("note", note) for note in facts.notes),
    ]
    return "\n".join([f"run {facts.run}", *_table(rows)])


def summary(facts: SummaryFacts) -> str:
    """Return the summary of a run: aligned plain text, one line a fact."""
    title = (
        f"run {facts.run} {facts.ended}: step {facts.step:,} of {facts.total_steps:,}, "
        f"{text.duration(facts.elapsed_seconds)} in this job"
    )
    rows: list[tuple[str, str | list[str]]] = []
    if facts.skipped_steps:
        skipped = text.plural(facts.skipped_steps, "step")
        rows.append(("not applied", f"{skipped} of the run: their gradients were not finite"))
    if facts.last:
        rows.append(("last", _metrics(facts.last)))
    if facts.best is not None:
        best = facts.best
        rows.append(("best", f"{best.metric} {text.metric(best.value)} at step {best.step:,}"))
    if facts.samples_per_second is not None:
        rows.append(("speed", f"{text.number(facts.samples_per_second)} samples/s"))
    rows += [
        ("time", _phases(facts.seconds)),
        ("used", [f"{text.number(facts.node_hours)} node-hours", f"energy {facts.energy}"]),
        ("checkpoint", facts.checkpoint or "none yet"),
        ("metrics", facts.metrics),
        facts.next_command,
    ]
    return "\n".join([title, *_table(rows)])


def _world(facts: HeaderFacts) -> list[str]:
    where = f"{text.plural(facts.world_size, 'rank')} on {text.plural(facts.num_nodes, 'node')}"
    backend = [facts.backend] if facts.backend and facts.world_size > 1 else []
    return [where, facts.launcher or "no launcher", facts.mpi or "no MPI", *backend]


def _data(facts: HeaderFacts) -> list[str]:
    train = text.plural(facts.train_samples, "sample")
    if facts.train_shards:  # else they are in no files that anybody knows of
        train += f" in {text.plural(facts.train_shards, 'shard')}"
    if facts.validation_samples is None:
        return [train, "no validation"]
    return [train, f"{facts.validation_samples:,} for validation"]


def _batch(facts: HeaderFacts) -> str:
    passes = text.plural(facts.grad_accum_steps, "pass", "passes")
    samples = text.plural(facts.micro_batch_size, "sample")
    return f"{facts.global_batch_size:,} global; per rank {passes} of at most {samples}"


def _model(facts: HeaderFacts) -> list[str]:
    return [
        facts.model,
        text.plural(facts.parameters, "parameter"),
        f"{'all' if facts.trainable == facts.parameters else f'{facts.trainable:,}'} trainable",
        text.size(facts.parameter_bytes),
    ]


def _length(facts: HeaderFacts) -> list[str]:
    epochs = [] if facts.total_epochs is None else [text.plural(facts.total_epochs, "epoch")]
    return [text.plural(facts.total_steps, "step"), *epochs]


def _metrics(metrics: Mapping[str, float]) -> list[str]:
    return [f"{name} {text.metric(value)}" for name, value in metrics.items()]


def _phases(seconds: Mapping[str, float]) -> list[str]:
    whole = sum(seconds.values())
    return [
        f"{phase} {text.number(part)} s ({text.percent(part, whole)})"
        for phase, part in seconds.items()
    ]


def _table(rows: Sequence[tuple[str, str | list[str]]]) -> list[str]:
    """Return aligned rows. A list goes on in the next line where it is long; a string stays whole.

    So that paths and commands can be copied.
    """
    lines = []
    for label, value in rows:
        parts = [value] if isinstance(value, str) else value
        line = f"{_INDENT}{label:<{_LABEL_COLUMNS}}{parts[0]}"
        for part in parts[1:]:
            if len(line) + len(", ,") + len(part) > _COLUMNS:
                lines.append(line + ",")
                line = " " * (len(_INDENT) + _LABEL_COLUMNS) + part
            else:
                line += f", {part}"
        lines.append(line)
    return lines
