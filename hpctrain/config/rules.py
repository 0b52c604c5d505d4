"""What no schema can say of a config: keys that contradict each other, and what is not there.

Every check looks at the values as given, so that it reports also where other keys are wrong, and
passes over a value of the wrong type, which the schema reports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from hpctrain.config.capabilities import Combination, records_graphs, unsupported
from hpctrain.config.data_rules import (
    PLAIN_NAME,
    UNEXPANDED,
    absence,
    check_batch_sizes,
    check_evaluations,
    check_objects,
    check_paths,
    check_samples,
    check_sampling,
    check_sources,
    check_transforms,
    has_validation,
)
from hpctrain.config.field_rules import check_fields, check_normalize, check_ragged
from hpctrain.config.importing import problem_of
from hpctrain.config.messages import Mistake, reason_of, shown
from hpctrain.config.registry import BUILTINS, LISTED, NEEDED, unknown_name
from hpctrain.config.schema import EarlyStoppingSection, ProfileSection, RunSection
from hpctrain.config.toml import Source
from hpctrain.utils.text import did_you_mean

_RESUME = ("auto", "never")

_NO_HISTORY = ("cpu", "xpu", "mps")


def check_run(source: Source) -> list[Mistake]:
    """Check that the run folder is there or can be made."""
    name, directory = source.get("run", "name"), source.get("run", "directory")
    if isinstance(name, str) and name and not PLAIN_NAME.fullmatch(name):
        problem = "expected a plain folder name: letters, digits and . _ + = -, at most 200"
        return [source.mistake(("run", "name"), problem)]
    if not isinstance(directory, str):
        directory = str(RunSection.__dataclass_fields__["directory"].default)
    folder = Path(directory)
    if UNEXPANDED.search(directory) and not folder.exists():
        problem = (
            "~ and $NAMES are not expanded here, and a folder of this name is not meant: write the "
            "path, or have the shell replace it: run.directory=$SCRATCH/runs on the command line"
        )
        return [source.mistake(("run", "directory"), problem)]
    if not str(folder).isprintable():
        problem = "has characters that no folder should have in its name"
        return [source.mistake(("run", "directory"), problem)]
    paths = {"directory": folder}
    if isinstance(name, str):
        paths["name"] = folder / name
    for key, path in paths.items():
        if (obstacle := _obstacle(path)) is not None:
            return [source.mistake(("run", key), obstacle)]
    return []


def _obstacle(path: Path) -> str | None:
    """Return why a path cannot be a folder, None if it is one or may become one."""
    try:
        if path.is_dir() or not path.exists():
            return None
    except (OSError, ValueError) as error:
        return f"cannot be looked at: {reason_of(error)}"
    return f"{path} is a file, and has to be a folder"


def check_beginning(source: Source) -> list[Mistake]:
    """Check that what a run begins with, a checkpoint or weights, is there."""
    mistakes = []
    for name in ("resume", "initialize_from"):
        value = source.get("checkpoint", name)
        if not isinstance(value, str) or not value or (name == "resume" and value in _RESUME):
            continue
        problem = absence(value, may_be_pattern=False)
        if problem is not None:
            hint = did_you_mean(value, _RESUME, quote='"') if name == "resume" else ""
            mistakes.append(source.mistake(("checkpoint", name), problem + hint))
    return mistakes


def check_components(source: Source) -> list[Mistake]:
    """Check that `use` names something that is built in or can be imported."""
    mistakes = []
    for section in BUILTINS:
        use = source.get(section, "use")
        if not isinstance(use, str) or not use or use in BUILTINS[section]:
            continue
        problem = unknown_name(section, use) or problem_of(use)
        if problem is not None:
            mistakes.append(source.mistake((section, "use"), problem))
    return mistakes


def check_listed(source: Source) -> list[Mistake]:
    """Check that `use` of every callback and every tracker can be imported."""
    mistakes = []
    for section, known in LISTED.items():
        given = source.get(section)
        for table in given if isinstance(given, list) else []:
            use = table.get("use") if isinstance(table, dict) else None
            if not isinstance(use, str) or not use:
                continue
            problem = unknown_name(section, use) or problem_of(known.get(use, use))
            if problem is None and use in NEEDED and find_spec(use) is None:
                problem = f"is not installed: pip install {NEEDED[use]}"
            if problem is not None:
                mistake = Mistake(key=(section, "use"), problem=problem, value=use)
                mistakes.append(source.place(mistake))
    return mistakes


def check_limits(source: Source) -> list[Mistake]:
    """Check that training ends."""
    limits = ("max_epochs", "max_steps", "max_samples")
    training = source.get("training")
    if not isinstance(training, dict) or any(key in training for key in limits):
        return []
    problem = "no end: set max_epochs, max_steps or max_samples"
    return [source.mistake(("training",), problem)]


def check_warmup(source: Source) -> list[Mistake]:
    """Check that the warm-up has one length."""
    keys = [f"warmup_{unit}" for unit in ("steps", "epochs", "samples")]
    given = [key for key in keys if source.get("scheduler", key)]
    problem = f"the warm-up has one length, and scheduler.{given[0]} is set" if given else ""
    return [source.mistake(("scheduler", key), problem) for key in given[1:]]


_LEAST_FILES = 5
"""A checkpoint of one writer: two of tensors, training.json, config.toml and meta.json."""


def check_files(source: Source) -> list[Mistake]:
    """Check that a checkpoint fits into the files that it may have."""
    files = source.get("checkpoint", "files")
    if not isinstance(files, int) or isinstance(files, bool) or not 0 < files < _LEAST_FILES:
        return []
    problem = f"a checkpoint of one writer has {_LEAST_FILES} files: {_LEAST_FILES} or more, or 0"
    return [source.mistake(("checkpoint", "files"), problem)]


def check_best(source: Source) -> list[Mistake]:
    """Check that there are evaluations by which to find the best checkpoint, or the end."""
    if has_validation(source):
        return []
    problem = "needs evaluations, and data.validation is not set"
    keys = (("checkpoint", "keep_best"), ("early_stopping", "monitor"))
    return [source.mistake(key, problem) for key in keys if source.get(*key) is not None]


def check_early_stopping(source: Source) -> list[Mistake]:
    """Check that early stopping has something to go by, and does not contradict other keys."""
    given, monitor = source.get("early_stopping"), source.get("early_stopping", "monitor")
    mistakes = []
    if monitor is None and isinstance(given, dict):
        usual = {field.name: field.default for field in dataclasses.fields(EarlyStoppingSection)}
        problem = "there is no early_stopping.monitor beside it, so nothing ends the run early"
        mistakes += [
            source.mistake(("early_stopping", key), problem)
            for key, value in given.items()
            if key in usual and value != usual[key]  # a saved config writes defaults out
        ]
    elif monitor is not None and not _evaluates(source):
        problem = "needs evaluations, and training.evaluate_every_epochs = 0 makes none"
        mistakes.append(source.mistake(("early_stopping", "monitor"), problem))
    mode, other = source.get("early_stopping", "mode"), source.get("checkpoint", "keep_best_mode")
    same = monitor is not None and monitor == source.get("checkpoint", "keep_best")
    if same and None not in (mode, other) and mode != other:
        problem = f"the same metric has checkpoint.keep_best_mode = {shown(other)}"
        mistakes.append(source.mistake(("early_stopping", "mode"), problem))
    for unit in ("epochs", "steps"):
        least, most = (source.get("training", f"{end}_{unit}") for end in ("min", "max"))
        if type(least) is int and type(most) is int and least > most:
            problem = f"more than training.max_{unit} = {most}, which ends the run"
            mistakes.append(source.mistake(("training", f"min_{unit}"), problem))
    return mistakes


def check_profile(source: Source) -> list[Mistake]:
    """Check that what the profiler is to record has steps, and a device that has it."""
    given = source.get("profile")
    if not isinstance(given, dict):
        return []
    usual = {field.name: field.default for field in dataclasses.fields(ProfileSection)}
    if not given.get("active_steps"):
        problem = "there is no profile.active_steps beside it, so nothing is recorded"
        return [
            source.mistake(("profile", key), problem)
            for key, value in given.items()
            # A saved config writes defaults out.
            if key in usual and (tuple(value) if isinstance(value, list) else value) != usual[key]
        ]
    if given.get("memory_snapshot") is True and source.get("launch", "device") in _NO_HISTORY:
        device = shown(source.get("launch", "device"))
        problem = f"only CUDA's memory has a history, and launch.device = {device}"
        return [source.mistake(("profile", "memory_snapshot"), problem)]
    return []


def check_anomaly(source: Source) -> list[Mistake]:
    """Check that the host may look at gradients while they are computed."""
    compiled, mode = source.get("training", "compile"), source.get("training", "compile_mode")
    if source.get("training", "detect_anomaly") is not True or not isinstance(mode, str):
        return []
    if not records_graphs(compile=compiled is True, mode=mode):
        return []
    problem = (
        "looks at every gradient on the host, which CUDA graphs do not allow, and "
        f"training.compile_mode = {shown(mode)} records them"
    )
    return [source.mistake(("training", "detect_anomaly"), problem)]


def _evaluates(source: Source) -> bool:
    """Tell whether evaluations are made, where there is something to evaluate with."""
    epochs = source.get("training", "evaluate_every_epochs")
    return epochs != 0 or bool(source.get("training", "evaluate_every_steps"))


def check_deterministic(source: Source) -> list[Mistake]:
    """Check that no kernel is to be chosen by the clock where bits are to be equal."""
    asked = source.get("training", "cudnn_benchmark") is True
    if not asked or source.get("run", "deterministic") is not True:
        return []
    problem = (
        "the fastest algorithm may be another one next time, and run.deterministic = true asks for "
        "equal bits"
    )
    return [source.mistake(("training", "cudnn_benchmark"), problem)]


def check_capabilities(source: Source) -> list[Mistake]:
    """Check that precision, device and backend go together, as far as they are set."""
    found = unsupported(
        Combination(
            precision=source.get("training", "precision"),
            device=source.get("launch", "device"),
            backend=source.get("launch", "backend"),
            compress_gradients=source.get("training", "compress_gradients"),
            strategy=source.get("training", "strategy") or "ddp",
            channels_last=source.get("training", "channels_last"),
            buckets=source.get("training", "bucket_mb") is not None,
            static_graph=source.get("training", "static_graph"),
            unused_parameters=source.get("training", "unused_parameters"),
            checks_sync=bool(source.get("training", "check_sync_every")),
            shards=bool(source.get("training", "shard")),
            cpu_offload=source.get("training", "cpu_offload"),
            reshard_after_forward=source.get("training", "reshard_after_forward"),
        )
    )
    if found is None:
        return []
    key, because = found
    section, name = key.split(".")
    return [source.mistake((section, name), because)]


CHECKS: tuple[Callable[[Source], list[Mistake]], ...] = (
    check_run,
    check_paths,
    check_beginning,
    check_components,
    check_listed,
    check_fields,
    check_ragged,
    check_samples,
    check_transforms,
    check_objects,
    check_sources,
    check_normalize,
    check_limits,
    check_batch_sizes,
    check_sampling,
    check_evaluations,
    check_warmup,
    check_best,
    check_files,
    check_early_stopping,
    check_profile,
    check_anomaly,
    check_deterministic,
    check_capabilities,
)
