"""What a dataset holds, for people and scripts; or what there is where it is none as it stands."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.config.schema_data import DataSection, FieldTable
from hpctrain.convert.advice import FieldSet, Use, sets_of, uses_of, with_members
from hpctrain.convert.items import Item, covered
from hpctrain.convert.sources.indexed import read_attributes
from hpctrain.convert.survey import Survey, survey
from hpctrain.data.dataset import Dataset
from hpctrain.data.decoding import decodings, described
from hpctrain.data.files.catalogue import is_catalogue
from hpctrain.data.files.contents import OR_CHOOSE
from hpctrain.data.files.discovery import files_of, find_files
from hpctrain.data.files.index import INDEX_NAME, UNFINISHED_NAME
from hpctrain.data.files.storage import HDF5_FAILURES, open_hdf5_file
from hpctrain.data.opening.open_datasets import open_for_training
from hpctrain.data.stats import STATS_NAME
from hpctrain.errors import DatasetError, HpctrainError
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


def description(facts: Mapping[str, Any], *, with_fields: bool = True) -> str:
    """Return the facts as text, several lines; perhaps without a line for each field.

    Without one, only what becomes of stored numbers is told, which is of all files.
    """
    values = facts["samples"] * facts["bytes_per_sample"]
    samples, shards = plural(facts["samples"], "sample"), plural(facts["shards"], "shard")
    lines = [
        f"{facts['source']}: {samples} in {shards}",
        f"  files {facts['bytes']:,} bytes, values {values:,} ({facts['bytes_per_sample']:,} each)",
        *(f"  {key}: {_yes(facts[name])}" for key, name in _MARKS.items()),
        f"  fingerprint: {facts['fingerprint']}",
    ]
    if not with_fields:
        decoded = {name: field["decoded"] for name, field in facts["fields"].items()}
        lines += [f"  {name}: decoded {how}" for name, how in decoded.items() if how is not None]
        return "\n".join(map(printable, lines))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What is in the first of the files that somebody calls a dataset.

    Attributes:
        pattern: as they call it.
        found: in that file.
        files: how many there are.
        problem: why they are no dataset as they stand; None: they are one.
        uses: what each array is for, by path.
        sets: of fields that train together; the first one was opened in all files.
    """

    pattern: str
    found: Survey
    files: int
    problem: DatasetError | None
    uses: Mapping[str, Use]
    sets: Sequence[FieldSet]


def is_made(pattern: str) -> bool:
    """Tell whether this is a folder that hpctrain has written, or is writing, or a catalogue."""
    path = Path(pattern)
    made = (INDEX_NAME, UNFINISHED_NAME)
    return is_catalogue(path) or any((path / name).exists() for name in made)


def look(pattern: str, problem: DatasetError | None) -> Look:
    """Look into the first file of a pattern, and find out what could train in all of them.

    Args:
        pattern: of files.
        problem: why they are no dataset as they stand; None: they are one.

    Raises:
        DatasetError: `problem`, if HDF5 cannot read one of them.
    """
    files = files_of(pattern, "natural")
    for each in files:
        try:
            with open_hdf5_file(each):
                pass
        except HDF5_FAILURES as error:
            raise problem or DatasetError(f"{each}: HDF5 cannot read this file: {error}") from None
    found = survey(files[0])
    uses = uses_of(found.items)
    while sets := sets_of(uses):
        refused = _refused(pattern, sets[0])
        if not refused:
            break
        uses |= refused
    return Look(
        pattern=pattern, found=found, files=len(files), problem=problem, uses=uses, sets=sets
    )


def _refused(pattern: str, fields: FieldSet) -> dict[str, Use]:
    """Return which fields of a set cannot be opened in all files, with the reason.

    Where each can be, but not all of them together, all but the largest are returned.
    """
    uses = list(fields.uses)
    if _problem_of(pattern, uses) is None:
        return {}
    told = {use.path: problem for use in uses if (problem := _problem_of(pattern, [use]))}
    if not told:
        largest = max(uses, key=lambda use: use.num_bytes)
        told = {use.path: f"it does not fit {largest.path}" for use in uses if use is not largest}
    return {
        use.path: dataclasses.replace(use, obstacle=told[use.path])
        for use in uses
        if use.path in told
    }


def _problem_of(pattern: str, uses: Sequence[Use]) -> str | None:
    """Return why fields cannot be opened in all files; None: they can."""
    found = opened(pattern, uses)
    return found if isinstance(found, str) else None


def opened(pattern: str, uses: Sequence[Use]) -> Dataset | str:
    """Return fields of all files, or why they cannot be opened."""
    tables = {
        name: FieldTable(path=use.path, **_quick(use.keys)) for name, use in named(uses).items()
    }
    section = DataSection(train=pattern, global_batch_size=1, fields=tables)
    try:
        return open_for_training(section, list(tables))
    except HpctrainError as error:
        return str(error).splitlines()[0].removesuffix(OR_CHOOSE)


def _quick(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys that open a field without reading all of its texts."""
    return {key: ("",) if key == "classes" else value for key, value in keys.items()}


def look_facts(about: Look) -> dict[str, Any]:
    """Return what was found as JSON."""
    return {
        "source": about.found.path,
        "files": about.files,
        "arrays": [
            {
                "path": item.path,
                "type": item.type,
                "shape": None if item.shape is None else list(item.shape),
                "stored": item.stored,
                "notes": list(item.notes),
                "obstacle": item.obstacle or about.uses.get(item.path, _NOTHING).obstacle,
                "role": about.uses.get(item.path, _NOTHING).role,
                "keys": dict(about.uses.get(item.path, _NOTHING).keys),
                "coordinate": item.is_coordinate,
                "count": item.count,
            }
            for item in with_members(about.found.items)
        ],
        "sets": [
            {"samples": each.samples, "fields": [table_of(use) for use in each.uses]}
            for each in about.sets
        ],
        "cut": about.found.cut,
        "problem": None if about.problem is None else str(about.problem),
    }


_NOTHING = Use(path="")


def look_text(about: Look, *, with_config: bool = True) -> str:
    """Return what was found as text, several lines; perhaps without the tables to copy."""
    others = f", the first of {plural(about.files, 'file')}" if about.files > 1 else ""
    lines = [f"{printable(about.found.path)}: HDF5{others}"]
    rows = [("array", "type", "shape", "stored", "", "")]
    rows += [_row(item, about.uses) for item in with_members(about.found.items)]
    head, *body = table(rows)
    lines += [f"  {head}", *first_lines(body, MOST_ITEMS, "  ", "array")]
    if about.found.cut:
        lines.append(f"  {about.found.cut}")
    return "\n".join([*lines, *_ways(about, with_config=with_config)])


def _row(item: Item, uses: Mapping[str, Use]) -> tuple[str, str, str, str, str, str]:
    shape = "" if item.shape is None else " x ".join(map(str, item.shape)) or "one value"
    if item.count > 1:
        shape = f"{item.count:,} times, such as {shape}"
    use = uses.get(item.path)
    notes = ", ".join(item.notes)
    kind = item.type if len(item.type) <= _WIDEST else f"{item.type[: _WIDEST - 3]}..."
    said = item.obstacle if use is None else _said(use)
    return printable(item.path), kind, shape, item.stored, printable(notes), printable(said)


def _said(use: Use) -> str:
    """Return what an array is for, in words."""
    if use.obstacle:
        return f"no: {use.obstacle}"
    if use.role:
        return use.role
    keys = _keys_of(use)
    return f"needs {keys}" if keys else "trains"


def holds_more(pattern: str, known: Container[str]) -> bool:
    """Tell whether the first file of a folder with an index has arrays that it does not list."""
    if is_catalogue(Path(pattern)):
        return False
    return any(item.path not in known for item in survey(find_files(pattern)[0]).items)


def more_text(about: Look, known: Container[str]) -> str:
    """Return how to train on arrays that an index does not list; empty: there are none.

    It lists those with a row for each sample, and not the values of samples of unequal length.
    """
    uses = about.sets[0].uses[:MOST_FIELDS] if about.sets else ()
    unlisted = [use for use in uses if use.path not in known]
    if not unlisted:
        return ""
    told = [f"  {printable(use.path)}: {printable(_said(use))}" for use in unlisted]
    lines = [f"  {line}" for line in config_lines({"train": about.pattern}, uses)]
    return "\n".join([*told, "to train on it, copy what is wanted:", *lines])


def _ways(about: Look, *, with_config: bool) -> list[str]:
    """Return how to train on a part of what there is."""
    lines = []
    if about.problem is not None:
        said = str(about.problem).splitlines()[0].removeprefix(f"{about.found.path}: ")
        lines.append(f"not a dataset as it stands: {said.removesuffix(OR_CHOOSE)}")
    for each in about.sets[:MOST_SETS]:
        names = [printable(use.path) for use in each.uses]
        data = size(each.num_bytes)
        lines.append(f"{plural(each.samples, 'sample')}: {listed(names, MOST_FIELDS)} ({data})")
    if not about.sets:
        return [*lines, "nothing here has rows of numbers that could train as they are"]
    if not with_config:
        return lines
    first = about.sets[0].uses[:MOST_FIELDS]
    pattern = printable(shlex.quote(about.pattern))
    fields = shlex.quote(printable(",".join(use.path for use in first)))
    return [
        *lines,
        "to train on the first of these sets, copy what is wanted of it:",
        *(f"  {line}" for line in config_lines({"train": about.pattern}, first)),
        f"  # python -m hpctrain data verify {pattern} --fields {fields}",
    ]


def config_lines(
    data: Mapping[str, str], uses: Sequence[Use], evaluations: Mapping[str, str] | None = None
) -> list[str]:
    """Return the tables of a config that name these arrays, as TOML.

    Args:
        data: keys of `[data]`, and the files that each names.
        uses: the fields.
        evaluations: further files to evaluate with, by name.
    """
    lines = ["[data]", *(f"{key} = {_toml(pattern)}" for key, pattern in data.items())]
    lines += ["[data.fields]"]
    lines += [f"{name} = {{{_table_text(table_of(use))}}}" for name, use in named(uses).items()]
    others = [f"{_key(name)} = {_toml(path)}" for name, path in (evaluations or {}).items()]
    return [*lines, *(["[data.evaluations]"] if others else []), *others]


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def named(uses: Sequence[Use]) -> dict[str, Use]:
    """Return fields by names that TOML takes as they are: the last part of each path, if it can."""
    named: dict[str, Use] = {}
    for use in uses:
        for text in (use.path.rpartition("/")[2], use.path, f"{use.path}_{len(named)}"):
            name = re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_")
            if name and name not in named:
                break
        else:
            name = f"field_{len(named)}"
        named[name] = use
    return named


def table_of(use: Use) -> dict[str, Any]:
    """Return the table of a field in a config."""
    return {"path": use.path, **use.keys}


def _keys_of(use: Use) -> str:
    pattern = {"path": use.path} if use.source else {}
    return _table_text({**pattern, **use.keys})


def _table_text(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {_toml_value(value)}" for key, value in keys.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        return _toml(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_toml_value, value))}]"
    return json.dumps(value)


def _toml(text: str) -> str:
    """Return a text as TOML has it, whose escapes are those of JSON and more."""
    escaped = json.dumps(text, ensure_ascii=False)
    return "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in escaped)


def _has_files(folder: Path) -> bool:
    try:
        return bool(find_files(str(folder)))
    except DatasetError:
        return False
