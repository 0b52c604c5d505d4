"""Rules of `[data.fields]` and `[data.normalize]`: keys of one field that contradict each other.

Also of fields whose samples are of unequal length, encoded images, and sparse matrices. All of
them look at the text alone.
"""

from __future__ import annotations

import re
from typing import Any

from hpctrain.config.fields import problems_of
from hpctrain.config.importing import is_reference
from hpctrain.config.messages import Mistake
from hpctrain.config.schema_data import FieldTable
from hpctrain.config.toml import Source
from hpctrain.utils.text import did_you_mean


def check_fields(source: Source) -> list[Mistake]:
    """Check that the fields described are those of the task, and their files go together."""
    inputs, target = source.get("task", "inputs"), source.get("task", "target")
    names = [*(inputs if isinstance(inputs, list) else ()), target]
    known = [name for name in names if isinstance(name, str)]
    mistakes = []
    for name, table in field_tables(source).items():
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
        mistakes += _check_attribute(source, name, table)
        mistakes += _check_files(source, name, table)
        mistakes += _check_form(source, name, table)
    return mistakes


_OF_ROWS = (
    *("steps", "lead", "every", "axis", "offsets", "counts", "batch", "max_length", "image"),
    *("mask", "weight", "classes", "missing", "sparse"),
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


_OF_ATTRIBUTES = frozenset(
    ("attribute", "path", "train", "validation", "dtype", "squeeze", "classes", "missing", "mask")
)
"""Keys that an attribute may have."""


def _check_attribute(source: Source, name: str, table: dict[str, Any]) -> list[Mistake]:
    """Check what is said of a field that is one value for each group or file."""
    if table.get("attribute") is None:
        return []
    usual = FieldTable()
    problem = "is of rows, and this field is an attribute, one value for each group or file"
    return [
        source.mistake(("data", "fields", name, key), problem)
        for key in table
        if key not in _OF_ATTRIBUTES and table[key] != getattr(usual, key, None)
    ]


def _is_needed(source: Source, name: str, known: list[str]) -> bool:
    """Tell whether a field that the task does not have is read for the sake of one that it has."""
    tables = field_tables(source)
    own = tables.get(name, {})
    if "batch" not in own:
        return False
    beside = {own.get("sample"), own.get("position"), own.get("mask"), f"{name}.offsets"}
    shifting = any(table.get("shift_by") == name for table in tables.values())
    return shifting or not beside.isdisjoint(known)


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
    if table.get("missing") is not None and classes is None and not _is_whole(dtype):
        problem = 'is of classes, or of NaN among numbers delivered as whole ones: dtype = "int64"'
        mistakes.append(source.mistake((*key, "missing"), problem))
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


def _is_whole(dtype: object) -> bool:
    return isinstance(dtype, str) and re.fullmatch(r"u?int\d+", dtype) is not None


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
    if stored and (given := [each for each in ("fill", "mask", "missing") if each in table]):
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
        others = [other.get("mask") for each, other in field_tables(source).items() if each != name]
        if mask in (name, source.get("task", "target"), *field_tables(source)) or mask in others:
            problem = "this is the name of another field: choose one that is free"
            mistakes.append(source.mistake((*key, "mask"), problem))
    return mistakes


def field_tables(source: Source) -> dict[str, dict[str, Any]]:
    """Return the tables of `[data.fields]`, by name, those of a wrong type left out."""
    tables = source.get("data", "fields")
    if not isinstance(tables, dict):
        return {}
    return {name: table for name, table in tables.items() if isinstance(table, dict)}


OF_COORDINATES = (
    'expected the first and the last value of a coordinate, { time = ["1979", "2015-12-31"] }, or '
    'several such ranges, [["1979", "1989"], ["1995", ""]]; "" is no limit'
)


def is_of_coordinates(rows: dict[str, Any]) -> bool:
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
    of_rows = ("dtype", "squeeze", "select", "classes", "missing", "batch", "image", *_OF_EQUAL)
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
