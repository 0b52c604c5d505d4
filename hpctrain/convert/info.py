"""What a dataset holds, for people and scripts; or what there is where it is none as it stands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpctrain.convert.sources.indexed import read_attributes
from hpctrain.convert.survey import ANY, Item, Survey, covered, survey
from hpctrain.data.catalogue import is_catalogue
from hpctrain.data.contents import OR_CHOOSE
from hpctrain.data.dataset import Dataset
from hpctrain.data.decoding import decodings, described
from hpctrain.data.discovery import find_files
from hpctrain.data.index import INDEX_NAME, UNFINISHED_NAME
from hpctrain.data.stats import STATS_NAME
from hpctrain.data.storage import HDF5_FAILURES, open_hdf5_file
from hpctrain.errors import DatasetError
from hpctrain.utils.text import first_lines, listed, plural, printable, size, table

MOST_NOTES = 20
"""Attributes of a field that are shown; `--json` has them all."""
_MARKS = {"index": "indexed", "checksums": "checksums", "statistics": "statistics"}
MOST_ITEMS = 200
"""Arrays that are shown; `--json` has them all."""
MOST_SETS = 8
MOST_FIELDS = 12
_WIDEST = 40


def describe(dataset: Dataset) -> dict[str, Any]:
    """Return the facts of a dataset; all of them are JSON.

    Raises:
        DatasetError: if the first shard cannot be read.
    """
    attributes = read_attributes(dataset)
    times = [name for name, said in attributes.items() if " since " in str(said.get("units"))]
    periods = _periods(dataset, times) if times else {}
    decoded = {name: _decoded(dataset, name) for name in dataset.fields}
    folder = Path(dataset.source)
    return {
        "source": dataset.source,
        "samples": dataset.samples,
        "shards": len(dataset.shards),
        "bytes": sum(shard.size for shard in dataset.shards),
        "bytes_per_sample": dataset.bytes_per_sample,
        "fingerprint": dataset.fingerprint,
        "indexed": (folder / INDEX_NAME).exists(),
        "checksums": all(shard.checksum is not None for shard in dataset.shards),
        "statistics": (folder / STATS_NAME).exists(),
        "fields": {
            name: {
                "shape": list(field.shape),
                "dtype": field.dtype.name,
                "bytes": field.row_bytes * dataset.samples,
                "layout": _layout(dataset, name),
                "chunk_rows": max(s.layouts[name].chunk_rows for s in dataset.shards),
                "decoded": decoded[name],
                "period": periods.get(name),
                "attributes": {key: _plain(value) for key, value in attributes[name].items()},
            }
            for name, field in dataset.fields.items()
        },
    }


def description(facts: Mapping[str, Any]) -> str:
    """Return the facts as text, several lines."""
    values = facts["samples"] * facts["bytes_per_sample"]
    samples, shards = plural(facts["samples"], "sample"), plural(facts["shards"], "shard")
    lines = [
        f"{facts['source']}: {samples} in {shards}",
        f"  files {facts['bytes']:,} bytes, values {values:,} ({facts['bytes_per_sample']:,} each)",
        *(f"  {key}: {_yes(facts[name])}" for key, name in _MARKS.items()),
        f"  fingerprint: {facts['fingerprint']}",
    ]
    rows = [("field", "dtype", "shape", "stored", "")]
    for name, field in facts["fields"].items():
        shape = " x ".join(str(size) for size in field["shape"]) or "one value"
        attributes = list(field["attributes"].items())
        notes = [f"{_short(key)}: {_short(value)}" for key, value in attributes[:MOST_NOTES]]
        if attributes[MOST_NOTES:]:
            notes.append(f"and {len(attributes) - MOST_NOTES:,} more")
        if field["period"] is not None:
            notes.insert(0, field["period"])
        if field["decoded"] is not None:
            notes.insert(0, f"decoded {field['decoded']}")
        rows.append((name, field["dtype"], shape, field["layout"], ", ".join(notes)))
    return "\n".join([*map(printable, lines), *(f"  {line}" for line in table(rows))])


def _decoded(dataset: Dataset, name: str) -> str | None:
    """Return how the numbers of a field become values, or why they cannot; None: they are."""
    try:
        found = decodings([dataset.select([name])])[0].get(name)
    except DatasetError as error:
        return str(error)
    return None if found is None else described(found)


def _periods(dataset: Dataset, names: Sequence[str]) -> dict[str, str | None]:
    """Return from when to when the times of a dataset are, by field.

    Raises:
        DatasetError: if its first or last file cannot be read.
    """
    ends = [dataset.shards[index].path for index in (0, -1)]
    try:
        with open_hdf5_file(ends[0]) as first, open_hdf5_file(ends[1]) as last:
            return {name: covered(first[name], last[name]) for name in names}
    except HDF5_FAILURES as error:
        raise DatasetError(f"{ends[1]}: HDF5 cannot read this file: {error}") from error


def _layout(dataset: Dataset, name: str) -> str:
    kinds = {shard.layouts[name].reason or "contiguous" for shard in dataset.shards}
    return " / ".join(sorted(kinds))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    # numpy's scalars and arrays, complex ones as text
    plain = value.tolist() if hasattr(value, "tolist") else value
    return plain if isinstance(plain, str | int | float | list) else str(plain)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _yes(is_there: bool) -> str:
    return "yes" if is_there else "no"


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
    """Return why this is not a dataset as it stands, and how to train on a part of it."""
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
