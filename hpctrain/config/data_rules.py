"""Rules of `[data]`: files that are not there, splits, samples, mixtures, and torch Datasets."""

from __future__ import annotations

import dataclasses
import glob
import re
from pathlib import Path
from typing import Any

from hpctrain.config.field_rules import OF_COORDINATES, field_tables, is_of_coordinates
from hpctrain.config.fields import STATISTICS
from hpctrain.config.importing import is_reference, problem_of
from hpctrain.config.messages import KeyPath, Mistake, reason_of
from hpctrain.config.registry import TRANSFORMS
from hpctrain.config.schema_data import DataSection
from hpctrain.config.toml import Source
from hpctrain.utils.text import printable

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}")
UNEXPANDED = re.compile(r"^~|\$\{?[A-Za-z_]")


_SPLITS = ("train", "test", "validation")


_SPLITTING = {"split_seed": 0, "split_by": "rows", "piece_rows": None}
"""Keys that say how to split, and their defaults, which a saved config writes out."""


def check_paths(source: Source) -> list[Mistake]:
    """Check that the paths of files lead somewhere; what is inside is for later."""
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
    ]
    for key in keys:
        value = source.get(*key)
        if not isinstance(value, str) or not value:
            continue
        if key == ("data", "weights"):
            problem, hint = _absent_weights(value), ""
        elif may_be_object(key) and names_object(value):
            problem, hint = problem_of(value), ""
        else:
            problem, hint = absence(value, may_be_pattern=True), _data_hint(value)
        if problem is not None:
            mistakes.append(source.mistake(key, problem + hint))
    return mistakes


def absence(value: str, *, may_be_pattern: bool) -> str | None:
    """Return in which way a path leads nowhere, None if it leads somewhere."""
    here = printable(str(Path.cwd()))
    hint = "; ~ and $NAMES are not expanded here" if UNEXPANDED.search(value) else ""
    try:
        if Path(value).exists():
            return None
        if may_be_pattern and glob.has_magic(value):
            found = next(glob.iglob(value, recursive=True), None)  # noqa: PTH207 - may be absolute
            return None if found else f"no file fits this pattern (seen from {here}){hint}"
    except (OSError, ValueError) as error:
        return f"cannot be read: {reason_of(error)}"
    return f"no such file or folder (seen from {here}){hint}"


def _absent_weights(value: str) -> str | None:
    """Return in which way a file of weights is not there; the name of a field is for later."""
    files, _, name = value.rpartition(":")
    if value.lower().endswith(".npy"):
        return absence(value, may_be_pattern=False)
    return absence(files, may_be_pattern=True) if files and name else None


def _data_hint(value: str) -> str:
    """Say how the example's data come about."""
    if Path(value).parts[:2] == ("data", "digits"):
        return "; `python -m hpctrain data pack digits data/digits` makes it"
    return ""


def check_samples(source: Source) -> list[Mistake]:
    """Check that the rows to evaluate with are said in one way only, and ranges are some."""
    mistakes = []
    for part in ("train", "validation", "test"):
        rows = source.get("data", "samples", part)
        if isinstance(rows, list) and _is_no_range(rows):
            problem = "expected the first row and one past the last, such as [0, 8000]"
            mistakes.append(source.mistake(("data", "samples", part), problem))
        if isinstance(rows, dict) and not is_of_coordinates(rows):
            mistakes.append(source.mistake(("data", "samples", part), OF_COORDINATES))
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
        if isinstance(name, str) and not PLAIN_NAME.fullmatch(name):
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
            elif (absent := absence(train, may_be_pattern=True)) is not None:
                mistake("train", train, absent + _data_hint(train))
        if isinstance(rows, list) and _is_no_range(rows):
            mistake("samples", rows, "expected the first row and one past the last: [0, 8000]")
        if isinstance(rows, dict) and not is_of_coordinates(rows):
            mistake("samples", rows, OF_COORDINATES)
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
    for name, table in field_tables(source).items():
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
        if not PLAIN_NAME.fullmatch(name) or name in _SPLITS:
            problem = f"expected a plain name: letters, digits and . _ + = -, not {_SPLITS[-1]}"
            mistakes.append(source.mistake(("data", "evaluations", name), problem))
    for name, table in field_tables(source).items():
        if "train" in table or "validation" in table:
            problem = (
                "data.evaluations name one place for all fields, and this one has files of its own"
            )
            mistakes.append(source.mistake(("data", "fields", name), problem))
    return mistakes


def has_validation(source: Source) -> bool:
    """Tell whether there is something to evaluate with, of files of its own or not."""
    if source.get("data", "use") is not None:
        return True  # as far as anybody knows before a datamodule is made
    return source.get("data", "validation") is not None or _of_same_files(source)


def _of_same_files(source: Source) -> bool:
    """Tell whether evaluation takes rows of the training files."""
    keys = ("validation", "validation_fraction")
    return any(source.get("data", "samples", key) is not None for key in keys)


_OF_FILES = (
    *("file_order", "decode", "verify", "fields", "samples", "stage", "stage_directory"),
    *("normalize", "sample_transform", "transform", "cache", "max_tokens"),
)
"""Keys that say how files are read; what becomes of a sample, a torch Dataset does by itself."""


def may_be_object(key: KeyPath) -> bool:
    """Tell whether a key names files, or the import path of what makes a Dataset."""
    kept = (("data", "train"), ("data", "validation"), ("data", "test"))
    return key in kept or key[:2] == ("data", "evaluations")


def names_object(value: object) -> bool:
    """Tell whether a value of `data.train` is an import path, and no file of that name."""
    return isinstance(value, str) and is_reference(value) and not Path(value).exists()


def check_objects(source: Source) -> list[Mistake]:
    """Check what makes torch Datasets, and that nothing is said of files beside it."""
    data = source.get("data")
    if not isinstance(data, dict):
        return []
    use, is_object = data.get("use"), names_object(data.get("train"))
    mistakes = _check_arguments(source, data)
    if isinstance(use, str) and use:
        expected = 'expected an import path "package.module:Name" of a LightningDataModule'
        problem = problem_of(use) if is_reference(use) else expected
        if problem is not None:
            mistakes.append(source.mistake(("data", "use"), problem))
        for name in ("train", "validation"):
            if data.get(name):
                problem = "data.use makes the datasets: leave one of the two out"
                mistakes.append(source.mistake(("data", name), problem))
    mistakes += _check_evaluations(source, data, are_objects=is_object or bool(use))
    if not is_object and not use:
        if data.get("workers") == 0:
            problem = "0 is for torch Datasets; expected a whole number from 1"
            mistakes.append(source.mistake(("data", "workers"), problem))
        return mistakes
    for name in _OF_FILES:
        if not _is_default(name, data.get(name)):
            problem = "is of files; a torch Dataset does by itself what is to be done"
            mistakes.append(source.mistake(("data", name), problem))
    weights = data.get("weights")
    if isinstance(weights, str) and not weights.lower().endswith(".npy"):
        problem = "of torch Datasets they are a .npy file of one number a sample, or the sampler's"
        mistakes.append(source.mistake(("data", "weights"), problem))
    validation = data.get("validation")
    if is_object and validation and not names_object(validation):
        problem = "data.train is an import path, and so has data.validation to be"
        mistakes.append(source.mistake(("data", "validation"), problem))
    return mistakes


def _check_evaluations(source: Source, data: dict[str, Any], *, are_objects: bool) -> list[Mistake]:
    """Check that further data to evaluate with are of the kind that is trained with."""
    further = data.get("evaluations")
    what = "an import path" if are_objects else "of files"
    return [
        source.mistake(
            ("data", "evaluations", name),
            f"data.train is {what if not data.get('use') else 'made by data.use'}, and so these "
            f"have to be {'an import path of a torch Dataset' if are_objects else what}",
        )
        for name, value in (further.items() if isinstance(further, dict) else ())
        if isinstance(value, str) and names_object(value) != are_objects
    ]


def _check_arguments(source: Source, data: dict[str, Any]) -> list[Mistake]:
    """Check that arguments have something to go to."""
    takers = {"arguments": "use", "train_arguments": "train", "validation_arguments": "validation"}
    return [
        source.mistake(("data", name), f"there is no import path in data.{of} that takes them")
        for name, of in takers.items()
        if data.get(name) and not names_object(data.get(of))
    ]


def _is_default(name: str, value: Any) -> bool:
    """Tell whether a key says what is so without it, as a saved config writes it out."""
    default = getattr(DataSection(), name)
    if value is None or value == default:
        return True
    if isinstance(value, dict) and dataclasses.is_dataclass(default):
        own = dataclasses.asdict(default)  # type: ignore[arg-type]
        return all(own.get(key) == given for key, given in value.items())
    return False
