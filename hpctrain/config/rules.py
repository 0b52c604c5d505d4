"""What no schema can say of a config: keys that contradict each other, and what is not there.

Every check looks at the values as given, so that it speaks also where other keys are wrong, and
passes over a value of the wrong type, of which the schema speaks.
"""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hpctrain.config.capabilities import Combination, records_graphs, unsupported
from hpctrain.config.fields import STATISTICS, problems_of
from hpctrain.config.importing import is_reference, problem_of
from hpctrain.config.messages import KeyPath, Mistake, shown
from hpctrain.config.object_rules import check_objects, may_be_object, names_object
from hpctrain.config.ragged_rules import check_ragged
from hpctrain.config.registry import BUILTINS, LISTED, NEEDED, TRANSFORMS, unknown_name
from hpctrain.config.schema import EarlyStoppingSection, ProfileSection, RunSection
from hpctrain.config.toml import Source
from hpctrain.utils.text import did_you_mean, printable

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}")

_RESUME = ("auto", "never")

_NO_HISTORY = ("cpu", "xpu", "mps")

_SPLITS = ("train", "test", "validation")

_SPLITTING = {"split_seed": 0, "split_by": "rows", "piece_rows": None}
"""Keys that say how to split, and their defaults, which a saved config writes out."""


def check_run(source: Source) -> list[Mistake]:
    """Check that the run folder is there or can be made."""
    name, directory = source.get("run", "name"), source.get("run", "directory")
    if isinstance(name, str) and name and not _FOLDER_NAME.fullmatch(name):
        problem = "expected a plain folder name: letters, digits and . _ + = -, at most 200"
        return [source.mistake(("run", "name"), problem)]
    if not isinstance(directory, str):
        directory = str(RunSection.__dataclass_fields__["directory"].default)
    folder = Path(directory)
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
        return f"cannot be looked at: {_reason(error)}"
    return f"{path} is a file, and has to be a folder"


def check_paths(source: Source) -> list[Mistake]:
    """Check that the paths lead somewhere; what is inside is for later."""
    mistakes = []
    fields, evaluations = source.get("data", "fields"), source.get("data", "evaluations")
    keys: list[KeyPath] = [
        ("data", "train"),
        ("data", "validation"),
        ("data", "test"),
        *(
            ("data", "fields", name, part)
            for name in (fields if isinstance(fields, dict) else ())
            for part in ("train", "validation")
        ),
        *(
            ("data", "evaluations", name)
            for name in (evaluations if isinstance(evaluations, dict) else ())
        ),
        ("data", "weights"),
        ("checkpoint", "resume"),
        ("checkpoint", "initialize_from"),
    ]
    for key in keys:
        value = source.get(*key)
        if not isinstance(value, str) or not value:
            continue
        if key == ("checkpoint", "initialize_from"):
            problem, hint = _absence(value, may_be_pattern=False), ""
        elif key == ("checkpoint", "resume"):
            problem = None if value in _RESUME else _absence(value, may_be_pattern=False)
            hint = did_you_mean(value, _RESUME, quote='"')
        elif key == ("data", "weights"):
            problem, hint = _absent_weights(value), ""
        elif may_be_object(key) and names_object(value):
            problem, hint = problem_of(value), ""
        else:
            problem = _absence(value, may_be_pattern=True)
            hint = _data_hint(value)
        if problem is not None:
            mistakes.append(source.mistake(key, problem + hint))
    return mistakes


def _absence(value: str, *, may_be_pattern: bool) -> str | None:
    """Return in which way a path leads nowhere, None if it leads somewhere."""
    here = printable(str(Path.cwd()))
    hint = "; ~ and $NAMES are not expanded here" if re.search(r"^~|\$", value) else ""
    try:
        if Path(value).exists():
            return None
        if may_be_pattern and glob.has_magic(value):
            found = next(glob.iglob(value, recursive=True), None)  # noqa: PTH207 - may be absolute
            return None if found else f"no file fits this pattern (seen from {here}){hint}"
    except (OSError, ValueError) as error:
        return f"cannot be read: {_reason(error)}"
    return f"no such file or folder (seen from {here}){hint}"


def _absent_weights(value: str) -> str | None:
    """Return in which way a file of weights is not there; the name of a field is for later."""
    files, _, name = value.rpartition(":")
    if value.lower().endswith(".npy"):
        return _absence(value, may_be_pattern=False)
    return _absence(files, may_be_pattern=True) if files and name else None


def _reason(error: Exception) -> str:
    """Return the reason of an operating system's error, or of a null byte in a path."""
    return getattr(error, "strerror", None) or str(error)


def _data_hint(value: str) -> str:
    """Say how the example's data come about."""
    if Path(value).parts[:2] == ("data", "digits"):
        return "; `python -m hpctrain data pack digits data/digits` makes it"
    return ""


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


def check_fields(source: Source) -> list[Mistake]:
    """Check that the fields described are those of the task, and their files go together."""
    inputs, target = source.get("task", "inputs"), source.get("task", "target")
    names = [*(inputs if isinstance(inputs, list) else ()), target]
    known = [name for name in names if isinstance(name, str)]
    mistakes = []
    for name, table in _tables(source).items():
        key = ("data", "fields", name)
        mistakes += _check_missing(source, name, table, known)
        if isinstance(inputs, list) and name not in known and not _is_needed(source, name, known):
            near = did_you_mean(name, known)
            problem = f"neither task.inputs nor task.target has this field{near}"
            mistakes.append(source.mistake(key, problem))
        if table.get("every", 1) != 1 and "steps" not in table:
            problem = "is the distance of the rows of a sample, of which `steps` makes several"
            mistakes.append(source.mistake((*key, "every"), problem))
        mistakes += _check_static(source, name, table)
        mistakes += _check_files(source, name, table)
        mistakes += _check_form(source, name, table)
    return mistakes


_OF_ROWS = (
    *("steps", "lead", "every", "axis", "offsets", "counts", "batch", "max_length", "image"),
    *("mask", "weight", "classes", "sparse"),
)
_USUAL = {"lead": 0, "every": 1, "axis": 0}


def _check_static(source: Source, name: str, table: dict[str, Any]) -> list[Mistake]:
    """Check what is said of a field that is one array, and of what weighs the loss."""
    key = ("data", "fields", name)
    if table.get("static"):
        problem = "is of rows or values of samples, and this field is one array for all of them"
        mistakes = [
            source.mistake((*key, each), problem)
            for each in _OF_ROWS
            if table.get(each, _USUAL.get(each)) != _USUAL.get(each)
        ]
        if source.get("task", "target") == name:
            mistakes.append(source.mistake((*key, "static"), "the target is of samples"))
        return mistakes
    use = source.get("task", "use")
    if table.get("weight") is None or source.get("task", "target") != name:
        return []
    if use not in (None, "regression", "module") and not is_reference(str(use)):
        problem = f"weighs numbers that are compared with numbers, and {use} has none of these"
        return [source.mistake((*key, "weight"), problem)]
    return []


def _is_needed(source: Source, name: str, known: list[str]) -> bool:
    """Tell whether a field that the task does not have is read for the sake of one that it has."""
    tables = _tables(source)
    own = tables.get(name, {})
    if "batch" not in own:
        return False
    beside = {own.get("sample"), own.get("position"), own.get("mask"), f"{name}.offsets"}
    shifting = any(table.get("shift_by") == name for table in tables.values())
    return shifting or not beside.isdisjoint(known)


_OF_COORDINATES = (
    'expected the first and the last value of a coordinate, { time = ["1979", "2015-12-31"] }, or '
    'several such ranges, [["1979", "1989"], ["1995", ""]]; "" is no limit'
)


def _is_of_coordinates(rows: dict[str, Any]) -> bool:
    """Tell whether ranges of coordinates are some."""
    return bool(rows) and all(
        _is_coordinate_range(each)
        or (isinstance(each, list) and bool(each) and all(map(_is_coordinate_range, each)))
        for each in rows.values()
    )


def _is_coordinate_range(given: object) -> bool:
    return (
        isinstance(given, list)
        and len(given) == 2
        and all(isinstance(e, int | float | str) and not isinstance(e, bool) for e in given)
        and given != ["", ""]
    )


def check_samples(source: Source) -> list[Mistake]:
    """Check that the rows to evaluate with are said in one way only, and ranges are some."""
    mistakes = []
    for part in ("train", "validation", "test"):
        rows = source.get("data", "samples", part)
        if isinstance(rows, list) and _is_no_range(rows):
            problem = "expected the first row and one past the last, such as [0, 8000]"
            mistakes.append(source.mistake(("data", "samples", part), problem))
        if isinstance(rows, dict) and not _is_of_coordinates(rows):
            mistakes.append(source.mistake(("data", "samples", part), _OF_COORDINATES))
    fraction = ("data", "samples", "validation_fraction")
    if source.get(*fraction) is None:
        problem = "there is no validation_fraction beside it, so nothing is split"
        given = [
            key
            for key, default in _SPLITTING.items()
            if source.get("data", "samples", key) not in (None, default)
        ]
        return mistakes + [source.mistake(("data", "samples", key), problem) for key in given]
    for other in (("data", "validation"), ("data", "samples", "validation")):
        if source.get(*other) is not None:
            problem = f"{'.'.join(other)} says already what to evaluate with: leave one of them out"
            mistakes.append(source.mistake(fraction, problem))
    if source.get("data", "samples", "split_by") == "files" and (
        source.get("data", "samples", "piece_rows") is not None
    ):
        problem = 'whole files are the pieces, by split_by = "files"'
        mistakes.append(source.mistake(("data", "samples", "piece_rows"), problem))
    return mistakes


def _check_files(source: Source, name: str, table: dict[str, Any]) -> list[Mistake]:
    """Check that a field that is elsewhere is so for training and for evaluation."""
    key = ("data", "fields", name, "validation")
    own = source.get("data", "validation") is not None
    if table.get("static"):
        return []  # one file serves all
    if "train" in table and "validation" not in table and own:
        problem = "missing; data.validation has files of its own, and this field is not in data's"
        return [source.mistake(key, problem)]
    if "validation" in table and not own:
        problem = "there is no data.validation whose rows these would be joined with"
        return [source.mistake(key, problem)]
    return []


_NUMBER_FORMAT = re.compile(r"u?int(8|16|32|64)|float(16|32|64)|complex(64|128)|bool")
_BYTES = re.compile(r"bytes|S[1-9]\d{0,6}")
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(:[1-9]\d*)?")


def _check_form(source: Source, name: str, table: dict[str, Any]) -> list[Mistake]:
    """Check what is said of a field that is not delivered as it is stored."""
    mistakes = []
    key = ("data", "fields", name)
    dtype, classes = table.get("dtype"), table.get("classes")
    if isinstance(dtype, str) and not (_NUMBER_FORMAT.fullmatch(dtype) or _BYTES.fullmatch(dtype)):
        problem = 'expected a number format such as "float32", "bytes", or "S20" for 20 bytes'
        mistakes.append(source.mistake((*key, "dtype"), problem))
    elif classes is not None and isinstance(dtype, str) and dtype not in ("int32", "int64"):
        problem = "classes are delivered as int64, or int32"
        mistakes.append(source.mistake((*key, "dtype"), problem))
    if isinstance(classes, list) and len({str(each) for each in classes}) < len(classes):
        mistakes.append(source.mistake((*key, "classes"), "has one of them twice"))
    select = table.get("select")
    for part, wanted in select.items() if isinstance(select, dict) else ():
        if not _can_select(part, wanted):
            problem = (
                "expected values of a coordinate, level = [500, 850], or all from one to another, "
                "latitude = [[30, 60]]; or of an axis of a sample, 0 the first, indices or a "
                'slice: 0 = [1, 3] or 0 = "2:5"'
            )
            mistakes.append(source.mistake((*key, "select", part), problem))
    return mistakes


def _can_select(part: str, wanted: object) -> bool:
    kinds: tuple[type, ...] = (int,) if part.isdecimal() else (int, float, str)
    if isinstance(wanted, str):
        return part.isdecimal() and _SLICE.fullmatch(wanted) is not None
    if not isinstance(wanted, list) or not wanted:
        return False
    if not part.isdecimal():
        wanted = [each for each in wanted if not _is_coordinate_range(each)]
    return all(isinstance(each, kinds) and not isinstance(each, bool) for each in wanted)


def _check_missing(
    source: Source, name: str, table: dict[str, Any], known: list[str]
) -> list[Mistake]:
    """Check what is said of a field's missing values, and the name of its mask."""
    key = ("data", "fields", name)
    mask = table.get("mask")
    mistakes = []
    stored = table.get("decode", source.get("data", "decode")) == "none"
    if stored and (given := [each for each in ("fill", "mask") if each in table]):
        problem = 'nothing is missing among numbers taken as stored, by decode = "none"'
        mistakes.append(source.mistake((*key, given[0]), problem))
    if "fill" in table and mask is None and name == source.get("task", "target"):
        problem = (
            "the loss would compare with this number as with any other: name a mask as well, such "
            f'as mask = "{name}_mask"'
        )
        mistakes.append(source.mistake((*key, "fill"), problem))
    if isinstance(mask, str) and source.get("task", "use") == "language_modeling":
        problem = "language_modeling takes no mask: name what is missing by task.ignore_index"
        mistakes.append(source.mistake((*key, "mask"), problem))
    if isinstance(mask, str):
        others = [other.get("mask") for each, other in _tables(source).items() if each != name]
        if mask in (name, source.get("task", "target"), *_tables(source)) or mask in others:
            problem = "this is the name of another field: choose one that is free"
            mistakes.append(source.mistake((*key, "mask"), problem))
    return mistakes


def _tables(source: Source) -> dict[str, dict[str, Any]]:
    tables = source.get("data", "fields")
    if not isinstance(tables, dict):
        return {}
    return {name: table for name, table in tables.items() if isinstance(table, dict)}


def _is_no_range(rows: list[Any]) -> bool:
    """Tell whether two whole numbers are no range; all else is for the schema to say."""
    return [type(row) for row in rows] == [int, int] and not 0 <= rows[0] < rows[1]


def check_transforms(source: Source) -> list[Mistake]:
    """Check that transforms can be imported, and that arguments have something to go to."""
    mistakes = []
    for name in TRANSFORMS:
        transform, arguments = source.get("data", name), f"{name}_arguments"
        if transform is None and source.get("data", arguments):
            problem = f"there is no data.{name} that would take them"
            mistakes.append(source.mistake(("data", arguments), problem))
        if not isinstance(transform, str) or not transform:
            continue
        problem = 'expected an import path "package.module:Name"'
        found = problem_of(transform) if is_reference(transform) else problem
        if found is not None:
            mistakes.append(source.mistake(("data", name), found))
    return mistakes


def check_normalize(source: Source) -> list[Mistake]:
    """Check what is to be normalised, and by which numbers."""
    normalize = source.get("data", "normalize")
    inputs, target = source.get("task", "inputs"), source.get("task", "target")
    if not isinstance(normalize, dict):
        return []
    fields = [*(inputs if isinstance(inputs, list) else ()), target]
    known = [name for name in fields if isinstance(name, str)]
    mistakes = []
    for name, given in normalize.items():
        key = ("data", "normalize", name)
        if isinstance(inputs, list) and name not in known and not _is_needed(source, name, known):
            problem = (
                f"neither task.inputs nor task.target has this field{did_you_mean(name, known)}"
            )
            mistakes.append(source.mistake(key, problem))
        found = problems_of(given)
        mistakes += [source.mistake((*key, *inner), problem) for inner, problem in found.items()]
    return mistakes


def check_limits(source: Source) -> list[Mistake]:
    """Check that training ends."""
    limits = ("max_epochs", "max_steps", "max_samples")
    training = source.get("training")
    if not isinstance(training, dict) or any(key in training for key in limits):
        return []
    problem = "no end: set max_epochs, max_steps or max_samples"
    return [source.mistake(("training",), problem)]


def check_batch_sizes(source: Source) -> list[Mistake]:
    """Check that a rank's part of a batch is not larger than the batch."""
    whole, micro = (source.get("data", f"{kind}_batch_size") for kind in ("global", "micro"))
    if type(whole) is not int or type(micro) is not int or micro <= whole:
        return []
    problem = f"more than data.global_batch_size = {whole}, which all ranks share"
    return [source.mistake(("data", "micro_batch_size"), problem)]


def check_sources(source: Source) -> list[Mistake]:
    """Check that sources to mix have names, files, weights that go together, and last."""
    given = source.get("data", "sources")
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        return []
    if not given:
        return []
    tables: list[dict[str, Any]] = given
    mistakes = [*_beside_sources(source), *_check_weights(source, tables)]

    def mistake(key: str, value: Any, problem: str) -> None:
        place = Mistake(key=("data", "sources", key), problem=problem, value=value)
        mistakes.append(source.place(place))

    names = [table.get("name") for table in tables]
    for name in names:
        if isinstance(name, str) and not _FOLDER_NAME.fullmatch(name):
            mistake("name", name, "expected a plain name: letters, digits and . _ + = -")
        elif names.count(name) > 1:
            mistake("name", name, "another source has this name: messages would mean either")
            break
    for table in tables:
        train, rows = table.get("train"), table.get("samples")
        if isinstance(train, str) and train:
            if is_reference(train):
                problem = (
                    "sources are HDF5 files: pack the Dataset with `python -m hpctrain data pack`"
                )
                mistake("train", train, problem)
            elif (absent := _absence(train, may_be_pattern=True)) is not None:
                mistake("train", train, absent + _data_hint(train))
        if isinstance(rows, list) and _is_no_range(rows):
            mistake("samples", rows, "expected the first row and one past the last: [0, 8000]")
        if isinstance(rows, dict) and not _is_of_coordinates(rows):
            mistake("samples", rows, _OF_COORDINATES)
    return mistakes


def _beside_sources(source: Source) -> list[Mistake]:
    """Return the keys that say otherwise what sources say."""
    problems = {
        "train": "data.sources name the files to train with: leave one of the two out",
        "use": "data.sources are files, and data.use makes datasets: leave one of the two out",
        "weights": "draws single samples by weight, and data.sources mix whole sources: leave one "
        "of the two out",
    }
    mistakes = [
        source.mistake(("data", key), problem)
        for key, problem in problems.items()
        if source.get("data", key) not in (None, "")
    ]
    for name, table in _tables(source).items():
        if "train" in table:
            problem = "has files of its own, which cannot be joined with those of every source"
            mistakes.append(source.mistake(("data", "fields", name, "train"), problem))
    normalize = source.get("data", "normalize")
    for name, value in (normalize if isinstance(normalize, dict) else {}).items():
        if value in STATISTICS:
            problem = "no statistics are of a mixture: give numbers, { mean = ..., std = ... }"
            mistakes.append(source.mistake(("data", "normalize", name), problem))
    return mistakes


def _check_weights(source: Source, tables: list[dict[str, Any]]) -> list[Mistake]:
    """Check that all sources have weights, or none, and that one of them goes on for ever."""
    key = ("data", "sources")
    weights = [table.get("weight") for table in tables]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        problem = "some have a weight and some have none: give all of them one, or none"
        return [source.mistake(key, problem)]
    lasting = [
        weight is None or (isinstance(weight, int | float) and weight > 0)
        for weight, table in zip(weights, tables, strict=True)
        if table.get("when_exhausted", "repeat") == "repeat"
    ]
    if not any(lasting):
        problem = (
            'none has a weight above 0 and when_exhausted = "repeat": training would run out of '
            "samples; max_epochs, max_steps or max_samples end it"
        )
        return [source.mistake(key, problem)]
    return []


def check_sampling(source: Source) -> list[Mistake]:
    """Check that the order of the samples is said in one way."""
    mistakes = []
    overfit = source.get("training", "overfit_batches")
    mixed, weights = source.get("data", "sources"), source.get("data", "weights")
    if weights is not None and source.get("data", "shuffle") is False:
        problem = "data.weights draws the samples in an order of its own: leave one of them out"
        mistakes.append(source.mistake(("data", "shuffle"), problem))
    if weights is None and not mixed and source.get("data", "epoch_samples") is not None:
        problem = (
            "is the length of an epoch that is drawn by data.weights, or mixed of data.sources, "
            "and neither is set; "
            "training.limit_train_batches ends any epoch earlier"
        )
        mistakes.append(source.mistake(("data", "epoch_samples"), problem))
    if overfit is None:
        return mistakes
    key = ("training", "overfit_batches")
    if weights is not None:
        problem = "takes the first batches in the dataset's order, and data.weights draws others"
        mistakes.append(source.mistake(key, problem))
    for other in ("limit_train_batches", "limit_validation_batches"):
        if source.get("training", other) is not None:
            problem = f"limits training and evaluation alike, and training.{other} is set too"
            mistakes.append(source.mistake(key, problem))
    return mistakes


def check_evaluations(source: Source) -> list[Mistake]:
    """Check that further data to evaluate with have names, and something that they are beside."""
    evaluations = source.get("data", "evaluations")
    if not isinstance(evaluations, dict) or not evaluations:
        return []
    mistakes = []
    if not has_validation(source):
        problem = "these are further ones, and data.validation is not set: name the first there"
        mistakes.append(source.mistake(("data", "evaluations"), problem))
    for name in evaluations:
        if not _FOLDER_NAME.fullmatch(name) or name in _SPLITS:
            problem = f"expected a plain name: letters, digits and . _ + = -, not {_SPLITS[-1]}"
            mistakes.append(source.mistake(("data", "evaluations", name), problem))
    for name, table in _tables(source).items():
        if "train" in table or "validation" in table:
            problem = (
                "data.evaluations name one place for all fields, and this one has files of its own"
            )
            mistakes.append(source.mistake(("data", "fields", name), problem))
    return mistakes


def check_warmup(source: Source) -> list[Mistake]:
    """Check that the warm-up has one length."""
    keys = [f"warmup_{unit}" for unit in ("steps", "epochs", "samples")]
    given = [key for key in keys if source.get("scheduler", key)]
    problem = f"the warm-up has one length, and scheduler.{given[0]} is set" if given else ""
    return [source.mistake(("scheduler", key), problem) for key in given[1:]]


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


def has_validation(source: Source) -> bool:
    """Tell whether there is something to evaluate with, of files of its own or not."""
    if source.get("data", "use") is not None:
        return True  # as far as anybody knows before a datamodule is made
    return source.get("data", "validation") is not None or _of_same_files(source)


def _of_same_files(source: Source) -> bool:
    """Tell whether evaluation takes rows of the training files."""
    keys = ("validation", "validation_fraction")
    return any(source.get("data", "samples", key) is not None for key in keys)


CHECKS: tuple[Callable[[Source], list[Mistake]], ...] = (
    check_run,
    check_paths,
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
    check_early_stopping,
    check_profile,
    check_anomaly,
    check_deterministic,
    check_capabilities,
)
