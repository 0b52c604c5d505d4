"""The config: one frozen dataclass a section, a docstring under every field.

Plain data. `hpctrain.config.validate` builds it from TOML and explains what does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from hpctrain.config.schema_data import DataSection
from hpctrain.config.schema_job import JobSection
from hpctrain.config.value_types import Count, CountOrNever, CountOrPart, Reference, Seconds, Text


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSection:
    """What this run is called and where it lives."""

    name: Text
    """Name of the run, and of its folder below `directory`."""

    directory: Text = "runs"
    """Folder of all runs."""

    seed: Annotated[int, Interval(ge=0, le=2**63 - 1)] = 1234
    """Seeds the initial weights, the order of the data and every random draw."""

    max_seconds: Seconds | None = None
    """Save and stop so long after the job began, whatever its batch system says; none: no limit."""

    group_writable: bool = False
    """Open the run's folder to its group, so that a colleague can go on with the run."""

    deterministic: bool = False
    """Ask torch for deterministic kernels: equal bits twice, at some cost in speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentSection:
    """Something named by `use` and built with keyword arguments."""

    use: Reference
    """A built-in name, or "package.module:Name"; modules of the current directory are found."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments: the other keys of the table, and those of its `arguments` table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSection(ComponentSection):
    """What a step computes from a batch; none: what the model's own `training_step` does."""

    use: Reference = "module"
    """A built-in name, or "package.module:Name"; "module": the model is a task itself."""

    inputs: Annotated[tuple[str, ...], MinLen(1)] | tuple[()] = ()
    """Fields of the dataset that the model receives, in order; for a module, none: all of them."""

    target: Text | None = None
    """Field that the loss compares the model's output with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters that are trained differently, `[[optimizer.groups]]`."""

    pattern: Text
    """Names of the parameters, with * and ? as in file names, such as "backbone.*"."""

    lr_factor: Annotated[float, Ge(0)] = 1.0
    """Their learning rate, as a factor of that of all others."""

    weight_decay: Annotated[float, Ge(0)] | None = None
    """Their weight decay; none: as of all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSection(ComponentSection):
    """The optimizer; further keys are its keyword arguments. None: the module's own."""

    use: Reference = "module"
    """A built-in name, or "package.module:Name"; "module": what `configure_optimizers` returns."""

    lr: Annotated[float, Gt(0)] | None = None
    """Peak learning rate."""

    decay_norms_and_biases: bool = True
    """Apply weight decay to parameters of fewer than two dimensions too."""

    groups: tuple[ParameterGroup, ...] = ()
    """Parameters that are trained differently; the first pattern that fits counts."""


Unit = Literal["steps", "epochs", "samples"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSection(ComponentSection):
    """The learning rate over time, as a factor of `optimizer.lr`."""

    use: Reference = "constant"
    """A built-in name, or "package.module:Name"."""

    unit: Unit = "steps"
    """What the schedule counts in; its arguments are in this unit too."""

    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps of linear warm-up before the schedule proper. At most one of these three."""

    warmup_epochs: Annotated[float, Ge(0)] = 0.0
    """The same in epochs, which need not be whole."""

    warmup_samples: Annotated[int, Ge(0)] = 0
    """The same in samples."""


Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSection:
    """How long and how to train."""

    max_epochs: Count | None = None
    """Stop after so many passes over the data. At least one of the three limits is needed."""

    max_steps: Count | None = None
    """Stop after so many optimizer steps."""

    max_samples: Count | None = None
    """Stop once so many samples have been seen."""

    precision: Precision = "32-true"
    """Number format of the arithmetic; "bf16-true" and "64-true" cast the model to it as well."""

    keep_dtype: tuple[str, ...] = ()
    """Modules that those do not cast, by name with * and ?, or class."""

    strategy: Literal["ddp", "fsdp", "zero1"] = "ddp"
    """Who holds the parameters: every rank all of them (ddp), or some rows of each (fsdp)."""

    shard: tuple[str, ...] = ()
    """For fsdp: modules gathered as one, by name with * and ?, or class; none: repeated blocks."""

    reshard_after_forward: bool = True
    """For fsdp: gather a unit again for its backward pass, in place of keeping it until then."""

    cpu_offload: bool = False
    """For fsdp: keep parameters, gradients and optimizer state in host memory."""

    clip_norm: Annotated[float, Gt(0)] | None = None
    """Clip the norm of the whole gradient to this."""

    clip_value: Annotated[float, Gt(0)] | None = None
    """Clip every element of the gradient to this, after its norm."""

    max_bad_steps: Count = 10
    """So many steps in a row with a gradient that is not finite are too many."""

    on_bad_steps: Literal["abort", "skip", "rollback"] = "abort"
    """Then end the job, go on, or go back to the parameters of the last checkpoint."""

    check_sync_every: CountOrNever = 0
    """Compare the parameters of all ranks after so many steps; 0: at the start only."""

    ema_decay: Annotated[float, Interval(ge=0, lt=1)] | None = None
    """Keep a moving average of the parameters, and evaluate that; none: no average."""

    min_epochs: Count | None = None
    """Let nothing but these limits end the run before so many epochs, such as early stopping."""

    min_steps: Count | None = None
    """The same in steps."""

    limit_train_batches: CountOrPart | None = None
    """Let an epoch end after so many global batches, or such a part of them; none: all."""

    limit_validation_batches: CountOrPart | None = None
    """Evaluate with so many global batches, or such a part of them; none: all."""

    overfit_batches: CountOrPart | None = None
    """Both at once, of data that are not shuffled: whether a model can learn a few by heart."""

    fast_dev_run: bool | CountOrNever = False
    """A trial of so many steps and evaluation batches, true: one; it keeps no checkpoint."""

    detect_anomaly: bool = False
    """Name the operation whose gradient is the first that is NaN; this is slow."""

    evaluate_every_epochs: CountOrNever = 1
    """Evaluate after so many epochs; 0: never."""

    evaluate_every_steps: CountOrNever = 0
    """Evaluate after so many steps; 0: never."""

    compile: bool = False
    """Compile the model with torch.compile."""

    compile_mode: Literal[
        "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
    ] = "default"
    """What torch.compile aims at."""

    keep_compiled: bool = False
    """Keep what is compiled in the run folder, as one archive for later jobs of the run."""

    activation_checkpointing: tuple[str, ...] = ()
    """Names of modules, with * and ?, whose activations are computed again to save memory."""

    channels_last: bool = False
    """Keep images and convolutions with the channels last in memory: faster on tensor cores."""

    tf32: bool | None = None
    """Round float32 products to TF32 on a GPU; none: as torch does it, convolutions only."""

    cudnn_benchmark: bool = False
    """Time the algorithms of convolutions on a GPU at every new shape, and take the fastest."""

    sync_batchnorm: bool = False
    """Make batch norms take their statistics over all ranks."""

    compress_gradients: Literal["none", "bf16", "fp16"] = "none"
    """Number format in which ranks exchange gradients."""

    bucket_mb: Annotated[float, Gt(0)] | None = None
    """MB of gradients that are exchanged together; none: as torch chooses."""

    static_graph: bool = False
    """For ddp: every pass uses the same parameters equally often, so DDP looks once only."""

    unused_parameters: Literal["error", "allow"] = "error"
    """Over ranks: parameters without a part in a step are an error, or looked for in every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStoppingSection:
    """When a run ends before its limits, by a metric of its evaluations."""

    monitor: Text | None = None
    """The metric; none: the limits alone end a run."""

    mode: Literal["min", "max"] | None = None
    """Which direction is better; none: as the task declares it."""

    patience: CountOrNever = 3
    """End after so many evaluations in a row that were not better than the best."""

    min_delta: Annotated[float, Ge(0)] = 0.0
    """Better is what is better by more than this."""

    stopping_threshold: float | None = None
    """End once the metric is better than this."""

    divergence_threshold: float | None = None
    """End once the metric is worse than this."""

    check_finite: bool = True
    """End where the metric is not a finite number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSection:
    """What is kept, how often, and where to start from."""

    every_epochs: CountOrNever = 1
    """Save after so many epochs; 0: never. The end of a run is always saved."""

    every_steps: CountOrNever = 0
    """Save after so many steps; 0: never."""

    every_minutes: Annotated[float, Ge(0)] = 0.0
    """Save once so many minutes have passed since the last save; 0: never."""

    keep_last: Count = 3
    """Keep the newest so many checkpoints."""

    keep_every: CountOrNever = 0
    """Also keep, for ever, those whose step is a multiple of this; 0: none."""

    keep_best: Text | None = None
    """Also keep the best checkpoint by this metric of the evaluation."""

    keep_best_mode: Literal["min", "max"] | None = None
    """Which direction is better; none: as the task declares it."""

    keep_best_count: Count = 1
    """How many of the best to keep."""

    files: CountOrNever = 0
    """Files that a checkpoint of fsdp has at most, 5 or more; 0: two for each rank, and three."""

    resume: Text = "auto"
    """"auto": from the newest whole checkpoint if there is one; "never"; or a checkpoint folder."""

    allow_data_change: bool = False
    """Go on with another dataset than the checkpoint was trained on, from the epoch's beginning."""

    initialize_from: Text | None = None
    """Weights to start a new run with: safetensors, a torch or Lightning file, a checkpoint."""

    initialize_names: dict[str, str] = field(default_factory=dict)
    """Beginnings of names in that file, and what stands for them in the model."""

    initialize_strict: bool = True
    """Every tensor of the file and of the model has to have its counterpart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSection:
    """From started processes to a process group."""

    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto"
    """Where to compute; "auto" takes a GPU where there is one. AMD's are "cuda" as well."""

    backend: Literal["auto", "nccl", "xccl", "gloo"] = "auto"
    """Carrier of gradients; "auto" is the device's own, and gloo for CPUs and shared devices."""

    share_device: bool = False
    """Whether several ranks may compute on one device."""

    interface: Text | None = None
    """Network interface to meet on; none: every one is tried."""

    address: Text | None = None
    """Address of rank 0 to meet at; none: every one is tried."""

    hang_timeout_seconds: Seconds = 300.0
    """With all ranks alive, the job ends when none makes progress for so long (hang)."""

    first_step_timeout_seconds: Seconds = 1800.0
    """The same until a first step is done, and in a save: loading, compiling, writing take long."""

    prepare_timeout_seconds: Seconds = 3600.0
    """In a job, `prepare_data` of a module and its data may take so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingSection:
    """What is reported, and how often."""

    every_steps: Count = 10
    """Write a line of metrics after so many steps."""

    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """A bar on a terminal, else plain lines."""

    progress_every_seconds: Seconds = 30.0
    """Time between two plain lines of progress."""

    machine: bool = True
    """Write what the nodes and their devices do to machine/ in the run folder."""

    report: bool = True
    """Write report.html in the run folder once the run is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotifySection:
    """A command that is run when a job of the run has ended."""

    command: tuple[Text, ...] = ()
    """Program and arguments, without a shell; the variables HPCTRAIN_RUN, HPCTRAIN_FOLDER,
    HPCTRAIN_STATE, HPCTRAIN_REASON, HPCTRAIN_STEP and HPCTRAIN_CODE say what there is to tell."""

    on: tuple[Literal["end", "failure", "stop", "nonfinite"], ...] = (
        *("end", "failure", "stop", "nonfinite"),
    )
    """When it is run: the run is complete, a job failed, a job saved and stopped early, or the loss
    or a gradient is not finite for the first time in a job."""

    timeout_seconds: Seconds = 30.0
    """The job waits so long for the command, and ends it then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSection:
    """What torch's profiler records."""

    active_steps: CountOrNever = 0
    """So many steps of a job; 0: none, at no cost."""

    wait_steps: CountOrNever = 10
    """So many steps of a job before that are like any other."""

    warmup_steps: Count = 2
    """So many after those are recorded and thrown away: the first are slower."""

    ranks: Annotated[tuple[CountOrNever, ...], MinLen(1)] = (0,)
    """The ranks that record."""

    record_shapes: bool = False
    """Record the shapes of what operations get."""

    with_stack: bool = False
    """Record which line has called an operation; this is slow."""

    profile_memory: bool = False
    """Record what memory operations take and release."""

    memory_snapshot: bool = False
    """On CUDA: also write all allocations with their stacks, for pytorch.org/memory_viz."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole config file, resolved: every default filled in."""

    run: RunSection
    model: ComponentSection
    task: TaskSection = field(default_factory=TaskSection)
    data: DataSection
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    scheduler: SchedulerSection = field(default_factory=SchedulerSection)
    training: TrainingSection
    early_stopping: EarlyStoppingSection = field(default_factory=EarlyStoppingSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    launch: LaunchSection = field(default_factory=LaunchSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    profile: ProfileSection = field(default_factory=ProfileSection)
    job: JobSection = field(default_factory=JobSection)
    notify: NotifySection = field(default_factory=NotifySection)
    callbacks: tuple[ComponentSection, ...] = ()
    trackers: tuple[ComponentSection, ...] = ()
