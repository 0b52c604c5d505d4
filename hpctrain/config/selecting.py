"""What no schema can say of `[data.fields]` and `[data.samples]`."""

from __future__ import annotations

from typing import Any

from hpctrain.config.messages import Mistake
from hpctrain.config.source import Source
from hpctrain.utils.text import did_you_mean

_SPLITTING = {"split_seed": 0, "split_by": "rows", "piece_rows": None}
"""Keys that say how to split, and their defaults, which a saved config writes out."""


def has_validation(source: Source) -> bool:
    """Tell whether there is something to evaluate with, of files of its own or not."""
    return source.get("data", "validation") is not None or _of_same_files(source)


def check_fields(source: Source) -> list[Mistake]:
    """Check that the fields described are those of the task, and their files go together."""
    inputs, target = source.get("task", "inputs"), source.get("task", "target")
    names = [*(inputs if isinstance(inputs, list) else ()), target]
    known = [name for name in names if isinstance(name, str)]
    mistakes = []
    for name, table in _tables(source).items():
        key = ("data", "fields", name)
        mistakes += _check_missing(source, name, table, known)
        if isinstance(inputs, list) and name not in known:
            near = did_you_mean(name, known)
            problem = f"neither task.inputs nor task.target has this field{near}"
            mistakes.append(source.mistake(key, problem))
        if table.get("every", 1) != 1 and "steps" not in table:
            problem = "is the distance of the rows of a sample, of which `steps` makes several"
            mistakes.append(source.mistake((*key, "every"), problem))
        mistakes += _check_files(source, name, table)
    return mistakes


def check_samples(source: Source) -> list[Mistake]:
    """Check that the rows to evaluate with are said in one way only, and ranges are some."""
    mistakes = []
    for part in ("train", "validation"):
        rows = source.get("data", "samples", part)
        if isinstance(rows, list) and _is_no_range(rows):
            problem = "expected the first row and one past the last, such as [0, 8000]"
            mistakes.append(source.mistake(("data", "samples", part), problem))
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


def _of_same_files(source: Source) -> bool:
    """Tell whether evaluation takes rows of the training files."""
    keys = ("validation", "validation_fraction")
    return any(source.get("data", "samples", key) is not None for key in keys)


def _check_files(source: Source, name: str, table: dict[str, Any]) -> list[Mistake]:
    """Check that a field that is elsewhere is so for training and for evaluation."""
    key = ("data", "fields", name, "validation")
    own = source.get("data", "validation") is not None
    if "train" in table and "validation" not in table and own:
        problem = "missing; data.validation has files of its own, and this field is not in data's"
        return [source.mistake(key, problem)]
    if "validation" in table and not own:
        problem = "there is no data.validation whose rows these would be joined with"
        return [source.mistake(key, problem)]
    return []


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
