"""What there is where it is no dataset as it stands: all of it, and how to train on a part."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpctrain.data.finding.catalogue import is_catalogue
from hpctrain.data.finding.contents import OR_CHOOSE
from hpctrain.data.finding.discovery import find_files
from hpctrain.data.finding.survey import ANY, Item, Survey, survey
from hpctrain.data.index import INDEX_NAME, UNFINISHED_NAME
from hpctrain.data.storage import HDF5_FAILURES, open_hdf5_file
from hpctrain.errors import DatasetError
from hpctrain.utils.text import first_lines, listed, plural, printable, size, table

MOST_ITEMS = 200
"""Arrays that are shown; `--json` has them all."""
MOST_SETS = 8
MOST_FIELDS = 12
_WIDEST = 40


def parts_of(pattern: str) -> list[str]:
    """Return the datasets in the folders of a folder that has no files of its own."""
    folder = Path(pattern)
    if not folder.is_dir() or _has_files(folder):
        return []
    return [str(each) for each in sorted(folder.iterdir()) if each.is_dir() and _has_files(each)]


def look(pattern: str, problem: DatasetError) -> tuple[Survey, int]:
    """Return what is in the first file of a pattern, and how many files there are.

    Args:
        pattern: of files that are no dataset as they stand.
        problem: why not.

    Raises:
        DatasetError: `problem`, if the files were made by hpctrain, or HDF5 cannot read one.
    """
    path = Path(pattern)
    if is_catalogue(path) or any((path / name).exists() for name in (INDEX_NAME, UNFINISHED_NAME)):
        raise problem
    files = find_files(pattern)
    for each in files:
        try:
            with open_hdf5_file(each):
                pass
        except HDF5_FAILURES:
            raise problem from None
    return survey(files[0]), len(files)


def survey_facts(found: Survey, files: int, problem: DatasetError) -> dict[str, Any]:
    """Return what was found as JSON."""
    return {
        "source": found.path,
        "files": files,
        "arrays": [
            {
                "path": item.path,
                "type": item.type,
                "shape": None if item.shape is None else list(item.shape),
                "stored": item.stored,
                "notes": list(item.notes),
                "obstacle": item.obstacle,
                "coordinate": item.is_coordinate,
                "count": item.count,
            }
            for item in found.items
        ],
        "fields": {
            str(rows): [item.path for item in items] for rows, items in found.trainable().items()
        },
        "cut": found.cut,
        "problem": str(problem),
    }


def survey_text(pattern: str, found: Survey, files: int, problem: DatasetError) -> str:
    """Return what was found as text, several lines."""
    others = f", the first of {plural(files, 'file')}" if files > 1 else ""
    lines = [f"{printable(found.path)}: HDF5{others}"]
    rows = [("array", "type", "shape", "stored", "", "")]
    rows += [_row(item) for item in found.items]
    head, *body = table(rows)
    lines += [f"  {head}", *first_lines(body, MOST_ITEMS, "  ", "array")]
    if found.cut:
        lines.append(f"  {found.cut}")
    return "\n".join([*lines, *_ways(pattern, found, problem)])


def _row(item: Item) -> tuple[str, str, str, str, str, str]:
    shape = "" if item.shape is None else " x ".join(map(str, item.shape)) or "one value"
    if item.count > 1:
        shape = f"{item.count:,} times, such as {shape}"
    if item.obstacle:
        use = f"no: {item.obstacle}" if item.type != "link" else item.obstacle
    else:
        use = "coordinate" if item.is_coordinate else ""
    notes = ", ".join(item.notes)
    kind = item.type if len(item.type) <= _WIDEST else f"{item.type[: _WIDEST - 3]}..."
    return printable(item.path), kind, shape, item.stored, printable(notes), printable(use)


def _ways(pattern: str, found: Survey, problem: DatasetError) -> list[str]:
    """Return why this is no dataset as it stands, and how to train on a part of it."""
    said = str(problem).splitlines()[0].removeprefix(f"{found.path}: ").removesuffix(OR_CHOOSE)
    lines = [f"not a dataset as it stands: {said}"]
    sets = found.trainable()
    for rows, items in list(sets.items())[:MOST_SETS]:
        names = [printable(item.path) for item in items]
        data = size(sum(item.num_bytes for item in items))
        lines.append(f"{plural(rows, 'row')}: {listed(names, MOST_FIELDS)} ({data})")
    if alike := {item.path.split(f"{ANY}/")[0] + ANY for item in found.items if item.count > 1}:
        groups = printable(listed(sorted(alike), MOST_SETS))
        lines.append(
            f"groups that hold the same: {groups}. Samples are read along an axis of an array, "
            "not group by group: write them one after the other"
        )
    if not sets:
        return [*lines, "nothing here has rows of numbers that could train as they are"]
    first = [item.path for item in next(iter(sets.values()))[:MOST_FIELDS]]
    fields = shlex.quote(printable(",".join(first)))
    return [
        *lines,
        "to train on the first of these sets, copy what is wanted of it:",
        *(f"  {line}" for line in config_lines(pattern, first)),
        f"  # python -m hpctrain data verify {printable(shlex.quote(pattern))} --fields {fields}",
    ]


def config_lines(pattern: str, paths: Sequence[str]) -> list[str]:
    """Return the tables of a config that name these arrays, as TOML."""
    lines = ["[data]", f"train = {_toml(pattern)}", "[data.fields]"]
    taken: set[str] = set()
    for path in paths:
        short = re.sub(r"[^A-Za-z0-9_-]+", "_", path.rpartition("/")[2]).strip("_")
        name = short if short and short not in taken else re.sub(r"[^A-Za-z0-9_-]+", "_", path)
        taken.add(name)
        lines.append(f"{name} = {{path = {_toml(path)}}}")
    return lines


def _toml(text: str) -> str:
    """Return a text as TOML has it, whose escapes are those of JSON and more."""
    escaped = json.dumps(text, ensure_ascii=False)
    return "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in escaped)


def _has_files(folder: Path) -> bool:
    try:
        return bool(find_files(str(folder)))
    except DatasetError:
        return False
