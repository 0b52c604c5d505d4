"""A folder of splits, such as `train/` and `validation/`: one table for all, and what differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from hpctrain.convert.advice import Use, with_members
from hpctrain.convert.info import MOST_FIELDS, Look, config_lines, named, opened, table_of
from hpctrain.convert.items import ANY
from hpctrain.data.files.contents import text_attribute
from hpctrain.data.files.discovery import describe, files_of
from hpctrain.data.files.form_opening import all_texts
from hpctrain.data.files.storage import HDF5_FAILURES, open_hdf5_file
from hpctrain.errors import DatasetError
from hpctrain.utils.text import listed, printable

TRAIN = ("train", "training")
VALIDATION = ("validation", "valid", "val", "dev", "eval")
MOST_LISTED = 10
"""Names that a difference names."""
_SAID = ("units", "classes")
"""Attributes by which the same number is another value; `classes` is of data packed by hpctrain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """What a config says of several splits.

    Attributes:
        data: keys of `[data]`, and the folder that each names.
        evaluations: the other folders, by name.
        uses: the fields that all of them have.
        differences: between the training data and the others, in words.
    """

    data: Mapping[str, str]
    evaluations: Mapping[str, str]
    uses: Sequence[Use]
    differences: Sequence[str]


def for_training(patterns: Iterable[str]) -> str | None:
    """Return which of several folders is the one to train on, by their names; None: none is."""
    folders = {Path(pattern).name.lower(): pattern for pattern in patterns}
    train = next((folders[name] for name in TRAIN if name in folders), None)
    return train if len(folders) > 1 else None


def joint(looks: Mapping[str, Look], train: str) -> Joint:
    """Return what a config says of splits.

    Args:
        looks: by the folder of each.
        train: the folder to train on.

    Raises:
        DatasetError: if a file cannot be read.
    """
    folders = {Path(pattern).name.lower(): pattern for pattern in looks}
    validation = next((folders[name] for name in VALIDATION if name in folders), None)
    data = {"train": train} | ({"validation": validation} if validation is not None else {})
    others = {pattern: look for pattern, look in looks.items() if pattern != train}
    uses, differences = _common(looks[train], others)
    return Joint(
        data=data,
        evaluations={Path(each).name: each for each in others if each != validation},
        uses=uses,
        differences=differences,
    )


def joint_facts(about: Joint) -> dict[str, Any]:
    """Return it as JSON."""
    return {
        "data": dict(about.data),
        "evaluations": dict(about.evaluations),
        "fields": {name: table_of(use) for name, use in named(about.uses).items()},
        "differences": list(about.differences),
    }


def joint_text(about: Joint) -> str:
    """Return it as text, several lines."""
    lines = ["to train on these splits together, copy what is wanted:"]
    lines += [f"  {line}" for line in config_lines(about.data, about.uses, about.evaluations)]
    if not about.uses:
        lines = ["no field that could train is in all of these splits"]
    if not about.differences:
        return "\n".join([*lines, "the splits hold the same fields, and say the same of them"])
    said = [f"  {printable(each)}" for each in about.differences]
    return "\n".join([*lines, "what differs between the splits:", *said])


def _common(train: Look, others: Mapping[str, Look]) -> tuple[list[Use], list[str]]:
    """Return the fields that train in all splits, and what differs between them."""
    differences = [each for other in others.values() for each in _unlike(train, other)]
    for found in train.sets:
        common = list(found.uses[:MOST_FIELDS])
        for other in others.values():
            kept = []
            for use in common:
                problem = _misfit(train, other, use)
                if problem is None:
                    kept.append(use)
                elif (said := f"{_name(other)}: {problem}") not in differences:
                    differences.append(said)
            common = kept
        if common:
            uses = []
            for use in common:
                joined, said_of_classes = _with_classes(train, others, use)
                uses.append(joined)
                differences += said_of_classes
            return uses, differences + list(_said_otherwise(train, others, uses))
    return [], differences


def _name(look: Look) -> str:
    return Path(look.pattern).name


def _unlike(train: Look, other: Look) -> Iterator[str]:
    """Yield which arrays only one of two splits has, or has of another type."""
    first, second = (
        {item.path: item for item in with_members(look.found.items)} for look in (train, other)
    )
    if lacking := first.keys() - second.keys():
        yield f"{_name(other)} does not have {listed(sorted(lacking), MOST_LISTED)}"
    if surplus := second.keys() - first.keys():
        yield f"{_name(train)} does not have {listed(sorted(surplus), MOST_LISTED)}"
    for path in sorted(first.keys() & second.keys()):
        here, there = first[path].type, second[path].type
        if here != there:
            yield f'"{path}" is {here} in {_name(train)}, and {there} in {_name(other)}'


def _misfit(train: Look, other: Look, use: Use) -> str | None:
    """Return why a field of the training data is not one of another split; None: it is."""
    here, there = opened(train.pattern, [use]), opened(other.pattern, [use])
    if isinstance(there, str):
        return f'"{use.path}" cannot be the same field: {there}'
    assert not isinstance(here, str), "it was opened for the training data before"
    (one,), (two,) = here.fields.values(), there.fields.values()
    if "image" not in use.keys and one.shape != two.shape:
        return f'"{use.path}" is {describe(two)}, and {describe(one)} in {_name(train)}'
    return None


def _with_classes(train: Look, others: Mapping[str, Look], use: Use) -> tuple[Use, list[str]]:
    """Return a field with the classes of all splits, where it has any, and how those differ."""
    if use.keys.get("classes") != "sorted":
        return use, []
    texts = {}
    for look in (train, *others.values()):
        try:
            texts[look.pattern] = set(all_texts(files_of(look.pattern, "natural"), use.path))
        except DatasetError as error:
            return use, [str(error)]
    known, differences = texts[train.pattern], []
    for look in others.values():
        found = texts[look.pattern]
        if more := found - known:
            names = listed(sorted(more), MOST_LISTED)
            differences.append(
                f'{_name(look)}: "{use.path}" has classes that {_name(train)} lacks: {names}'
            )
        if fewer := known - found:
            names = listed(sorted(fewer), MOST_LISTED)
            differences.append(f'{_name(look)}: "{use.path}" has none of these classes: {names}')
    everything = set.union(*texts.values())
    if everything == known:
        return use, differences
    classes = sorted(everything, key=lambda text: text.encode(errors="surrogateescape"))
    return dataclasses.replace(use, keys={**use.keys, "classes": classes}), differences


def _said_otherwise(train: Look, others: Mapping[str, Look], uses: Sequence[Use]) -> Iterator[str]:
    """Yield attributes by which the numbers of a field are other values in another split."""
    paths = [use.path for use in uses if ANY not in use.path]
    known = _attributes(train, paths)
    for look in others.values():
        found = _attributes(look, paths)
        for path in paths:
            for key in _SAID:
                here, there = known.get((path, key), ""), found.get((path, key), "")
                if here != there:
                    yield (
                        f'{_name(look)}: the {key} of "{path}" are {there or "not said"}, and '
                        f"{here or 'not said'} in {_name(train)}: the same number is another value"
                    )


def _attributes(look: Look, paths: Sequence[str]) -> dict[tuple[str, str], str]:
    """Return what the first file of a split says of its numbers."""
    found = {}
    try:
        with open_hdf5_file(look.found.path) as file:
            for path in paths:
                there = file.get(path)
                for key in _SAID if isinstance(there, h5py.Dataset) else ():
                    found[path, key] = text_attribute(there, key)
    except HDF5_FAILURES as error:
        raise DatasetError(f"{look.found.path}: HDF5 cannot read this file: {error}") from error
    return found
