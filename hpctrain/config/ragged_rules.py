"""Rules of `[data.fields]` whose samples are of unequal length, of the text alone."""

from __future__ import annotations

from typing import Any

from hpctrain.config.messages import Mistake
from hpctrain.config.toml import Source

_ONLY_OF = {"pad": "pad", "mask": "pad", "shift_by": "concat", "position": "pack"}
"""Keys of such fields, and the one way of batching that they belong to."""
_OF_EQUAL = ("steps", "lead", "every")
_DEFAULTS: dict[str, Any] = {
    "axis": 0,
    "squeeze": False,
    "select": {},
    "nearest": False,
    "static": False,
    "lead": 0,
    "every": 1,
    "crop": "center",
    "grey": False,
}
_OF_IMAGES = frozenset({"image", "crop", "grey"})


def check_ragged(source: Source) -> list[Mistake]:
    """Check what is said of samples of unequal length."""
    tables = source.get("data", "fields")
    if not isinstance(tables, dict):
        return []
    # A config that was saved has every default.
    described = {
        name: {key: value for key, value in table.items() if _DEFAULTS.get(key) != value}
        for name, table in tables.items()
        if isinstance(table, dict)
    }
    mistakes = []
    for name, table in described.items():
        of_images = not _OF_IMAGES.isdisjoint(table)
        problems = _problems_of_images(table) if of_images else _problems(table, described)
        problems |= _problems_of_whole(table)
        if "sparse" in table:
            problems = _problems_of_sparse(table)
            if source.get("data", "normalize", name) is not None:
                problem = (
                    "would change the values of a sparse matrix, and leave its zeros: do it in "
                    "data.transform"
                )
                mistakes.append(source.mistake(("data", "normalize", name), problem))
        if "image" in table and isinstance(source.get("data", "normalize", name), str):
            problem = (
                "the files hold encoded images, whose statistics nobody has: give mean and std"
            )
            mistakes.append(source.mistake(("data", "normalize", name), problem))
        for key, problem in problems.items():
            mistakes.append(source.mistake(("data", "fields", name, key), problem))
    is_ragged = any(table.get("batch") in ("pad", "concat") for table in described.values())
    if source.get("data", "max_tokens") is not None and not is_ragged:
        problem = (
            "bounds passes of samples of unequal length, and no field has such: "
            'data.fields.NAME.batch = "pad" or "concat"'
        )
        mistakes.append(source.mistake(("data", "max_tokens"), problem))
    if is_ragged or any("image" in table or "sparse" in table for table in described.values()):
        mistakes += _combined(source)
    return mistakes


def _problems(table: dict[str, Any], tables: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return what is wrong with a table, by key."""
    batch = table.get("batch")
    problems: dict[str, str] = {}
    if batch is None:
        for key in ("offsets", "counts"):
            if key in table:
                problems[key] = (
                    "samples are of unequal length, so say how they make a batch: "
                    'batch = "pad" or "concat"'
                )
        for key in ("max_length", "pad", "sample", "shift_by", "position"):
            if key in table:
                problems[key] = 'is for samples of unequal length: batch = "pad" or "concat"'
        return problems
    if "offsets" in table and "counts" in table:
        problems["counts"] = "offsets say already where samples begin: leave one of them out"
    for key, only in _ONLY_OF.items():
        if key in table and only != batch:
            problems[key] = f'is for batch = "{only}", and this field has "{batch}"'
    for key in _OF_EQUAL:
        if key in table:
            problems[key] = "makes windows of rows; a sample of unequal length has rows of its own"
    if batch == "pack" and "max_length" not in table:
        problems["batch"] = "cuts documents into samples of one length: say it by max_length"
    shift_by = table.get("shift_by")
    if isinstance(shift_by, str) and tables.get(shift_by, {}).get("batch") != "concat":
        problems["shift_by"] = (
            'expected a field with batch = "concat", whose values these are indices of'
        )
    return problems


def _problems_of_whole(table: dict[str, Any]) -> dict[str, str]:
    """Return what is wrong with a table of arrays that are samples as they are, by key."""
    if table.get("axis") != "none":
        return {}
    problem = 'is of rows, and with axis = "none" an array is one sample, as it is stored'
    of_rows = ("dtype", "squeeze", "select", "classes", "batch", "image", *_OF_EQUAL)
    return dict.fromkeys(table.keys() & set(of_rows), problem)


def _problems_of_sparse(table: dict[str, Any]) -> dict[str, str]:
    """Return what is wrong with a table of a sparse matrix, by key."""
    return {
        key: "is not for the rows of a sparse matrix, which are of one length once they are made"
        for key in table
        if key not in ("path", "train", "validation", "sparse", "decode")
    }


def _problems_of_images(table: dict[str, Any]) -> dict[str, str]:
    """Return what is wrong with a table of encoded images, by key."""
    if "image" not in table:
        problem = "is for encoded images: say what pixels they become, image = [224, 224]"
        return dict.fromkeys(_OF_IMAGES & table.keys(), problem)
    problems = {
        key: "is not for encoded images, whose samples are of one shape once they are decoded"
        for key in ("batch", "steps", "lead", "every", "fill", "mask", *_ONLY_OF)
        if key in table
    }
    if "offsets" in table and "counts" in table:
        problems["counts"] = "offsets say already where samples begin: leave one of them out"
    return problems


def _combined(source: Source) -> list[Mistake]:
    """Refuse what samples of unequal length do not go with."""
    mistakes = []
    if source.get("data", "sample_transform") is not None:
        problem = (
            "makes samples of one shape, and some fields have samples of unequal length, sparse "
            "rows, or encoded images: do it to batches, with data.transform"
        )
        mistakes.append(source.mistake(("data", "sample_transform"), problem))
    if source.get("data", "cache") == "memory":
        problem = (
            "holds samples of one size, and some fields have samples of unequal length, sparse "
            "rows, or encoded images: leave it out; files that are read often are in the page cache"
        )
        mistakes.append(source.mistake(("data", "cache"), problem))
    return mistakes
