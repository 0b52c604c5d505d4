"""From what a user calls a dataset to a Dataset: an indexed folder, or any HDF5 files.

Files are found, put in their order, joined, and checked against what an index or a catalogue says.
A run keeps the order of files that it began with, so who opens files says which one it is.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

from hpctrain.data.coding import PLAIN, Coding, without_plain
from hpctrain.data.dataset import Dataset, Field, Layout, Shard, require_countable, require_fields
from hpctrain.data.files.catalogue import is_catalogue, read_catalogue
from hpctrain.data.files.contents import Contents, EmptyFileError, coding_in, look_into
from hpctrain.data.files.groups import in_groups, is_pattern, look_into_groups
from hpctrain.data.files.index import (
    FURTHER_SUFFIXES,
    HDF5_SUFFIXES,
    INDEX_NAME,
    UNFINISHED_NAME,
    read_index,
    shards_in,
)
from hpctrain.data.files.storage import HDF5_FAILURES, open_hdf5_file
from hpctrain.data.files.strangers import NotHDF5Error, others_like_it
from hpctrain.data.forms import Wish
from hpctrain.data.view import Part, View
from hpctrain.errors import DatasetError
from hpctrain.utils.files import file_checksum
from hpctrain.utils.text import listed, printable

logger = logging.getLogger(__name__)
MANY_FILES = 100
"""So many take a time to open that is worth a word."""
FileOrder = Literal["natural", "name"]
"""2 before 10; or 10 before 2, as their letters sort."""
_DIGITS = re.compile("([0-9]+)")


def open_dataset(
    pattern: str,
    fields: Sequence[str] | None = None,
    axis: int = 0,
    order: FileOrder = "natural",
    wishes: Mapping[str, Wish] | None = None,
) -> Dataset:
    """Find out what a dataset holds. Reads no sample.

    Args:
        pattern: a folder written by hpctrain, a folder of HDF5 files, one such file, a glob, or a
            catalogue of files.
        fields: paths of the HDF5 datasets that are wanted; None: all that there are.
        axis: of these HDF5 datasets, which counts the samples.
        order: in which the files follow each other, whatever an index or a catalogue says.
        wishes: of `fields`, those that are not delivered as they are stored: the files are asked.

    Raises:
        DatasetError: if there are no files, a field is not in them or cannot become a tensor, or
            the files do not fit together.
    """
    path = Path(pattern)
    require_finished(path)
    if fields is not None and any(map(is_pattern, fields)):
        return _of_groups(pattern, fields, axis, order, wishes or {})
    if wishes:
        return join_files(pattern, files_of(pattern, order), fields, axis, wishes)
    if is_catalogue(path):
        files = sorted(read_catalogue(path), key=lambda file: order_key(order)(file.path))
        whole = [_with_unlisted(file, fields) for file in files]
        found = [(file.path, functools.partial(file.shard, fields, axis)) for file in whole]
        return with_codings(fitted(pattern, with_rows(pattern, found)))
    if (path / INDEX_NAME).exists() and not axis:
        dataset = _reordered(read_index(path), order)
        return with_codings(_select(dataset, list(fields or dataset.fields)))
    return join_files(pattern, find_files(pattern, order), fields, axis)


def _of_groups(
    pattern: str,
    fields: Sequence[str],
    axis: int,
    order: FileOrder,
    wishes: Mapping[str, Wish],
) -> Dataset:
    """Find out what the groups of files hold, each of which is a shard.

    Raises:
        DatasetError: as `open_dataset` does.
    """
    key = order_key(order)
    if is_catalogue(Path(pattern)) and not wishes:
        files = sorted(read_catalogue(Path(pattern)), key=lambda file: key(file.path))
    else:
        files = [look_into_groups(path, fields, wishes) for path in files_of(pattern, order)]
    groups = [group for file in files for group in in_groups(file, fields, axis, key)]
    return with_codings(fitted(pattern, with_rows(pattern, groups)))


def files_of(pattern: str, order: FileOrder) -> list[str]:
    """Return the files of a folder, a pattern or a catalogue, in their order."""
    if is_catalogue(Path(pattern)):
        return in_order((file.path for file in read_catalogue(Path(pattern))), order)
    return find_files(pattern, order)


def _with_unlisted(file: Contents, fields: Sequence[str] | None) -> Contents:
    """Return what a catalogue says of a file, with the fields that only the file has."""
    names = list(file.arrays if fields is None else fields)
    known = {name: array for name, array in file.arrays.items() if not array.is_elsewhere}
    asked = [name for name in names if name not in known]
    if not asked:
        return file
    return dataclasses.replace(file, arrays={**known, **look_into(file.path, asked).arrays})


def with_codings(dataset: Dataset) -> Dataset:
    """Return a dataset that knows the codings of all files; those that are unknown are looked at.

    Raises:
        DatasetError: if a file cannot be read.
    """
    unknown = sum(shard.codings is None for shard in dataset.shards)
    if not unknown:
        return dataset
    if unknown >= MANY_FILES:
        logger.info(
            "%s: its index was made before it kept what files say of their numbers, so %d files "
            "are opened for that: make it anew with `python -m hpctrain data index`",
            dataset.source,
            unknown,
        )
    shards = tuple(_looked_at(shard, list(dataset.fields)) for shard in dataset.shards)
    return dataclasses.replace(dataset, shards=shards)


def _looked_at(shard: Shard, names: list[str]) -> Shard:
    if shard.codings is not None:
        return shard
    try:
        with open_hdf5_file(shard.path) as file:
            codings = {name: coding_in(file[shard.inside(name)]) for name in names}
    except HDF5_FAILURES as error:
        raise DatasetError(f"{shard.path}: HDF5 cannot read this file: {error}") from error
    return dataclasses.replace(shard, codings=without_plain(codings))


def _select(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """Return fields of an index, and of its files what it does not list or cannot know.

    It has one name of each array, and HDF5 finds arrays by others, too. And of values that are in
    files that it does not list, it does not know whether they are still there.

    Raises:
        DatasetError: if a field is not in a file either.
    """
    elsewhere = {name for s in dataset.shards for name, x in s.layouts.items() if x.is_elsewhere}
    asked = [name for name in names if name not in dataset.fields.keys() - elsewhere]
    if not asked:
        return dataset.select(names)
    known = dataset.select([name for name in names if name not in asked])
    logger.info(
        "%s: asking the files about %s", dataset.source, listed([printable(name) for name in asked])
    )
    files = []
    for shard in known.shards:
        more, fields = inspect_file(shard.path, asked)
        # Values of samples of unequal length have other rows, and alone are what the file says.
        if known.fields and more.samples != shard.samples:
            raise DatasetError(
                f'{shard.path}: field "{asked[0]}" has {more.samples} rows, and {INDEX_NAME} lists '
                f"{shard.samples}. Name fields that belong together"
            )
        codings = None if shard.codings is None else {**shard.codings, **(more.codings or {})}
        layouts = {**shard.layouts, **more.layouts}
        whole = dataclasses.replace(
            shard, samples=more.samples, layouts=layouts, sources=more.sources, codings=codings
        )
        files.append((whole.select(names), {**known.fields, **fields}))
    return fitted(dataset.source, files).select(names)


def _reordered(dataset: Dataset, order: FileOrder) -> Dataset:
    """Return a dataset with its shards in this order."""
    shards = sorted(dataset.shards, key=lambda shard: order_key(order)(shard.path))
    return dataclasses.replace(dataset, shards=tuple(shards))


def require_finished(folder: Path) -> None:
    """Check that nobody is still writing a dataset to a folder.

    Raises:
        DatasetError: if somebody is, or was killed while they did.
    """
    if (folder / UNFINISHED_NAME).exists():
        raise DatasetError(
            f"{folder}: this dataset is still being written, or its writer was killed. "
            "Wait for it, start the same `data pack` again to go on, or remove the folder and "
            "write the dataset anew"
        )


def inspect_file(
    path: str,
    fields: Sequence[str] | None,
    axis: int = 0,
    wishes: Mapping[str, Wish] | None = None,
) -> tuple[Shard, dict[str, Field]]:
    """Return what one HDF5 file holds of these fields; None: all of its datasets.

    Raises:
        DatasetError: if it cannot be read, or a field is not there or cannot become a tensor.
    """
    return look_into(path, fields, wishes, axis).shard(fields, axis)


def find_files(pattern: str, order: FileOrder = "natural") -> list[str]:
    """Return the HDF5 files of a folder, one file, or those that fit a glob, in their order.

    Raises:
        DatasetError: if there are none.
    """
    path = Path(pattern)
    if path.is_dir():
        names = in_order(shards_in(path), order)
        if not names:
            known = ", *".join([*HDF5_SUFFIXES, *FURTHER_SUFFIXES])
            raise DatasetError(f"{path}: there are no HDF5 files in this folder (*{known})")
        return names
    if path.exists():
        return [pattern]
    paths = glob.glob(pattern, recursive=True)  # noqa: PTH207 - absolute ones too
    if not paths:
        raise DatasetError(f"{pattern}: no file has such a name")
    return in_order(paths, order)


def join_files(
    source: str,
    paths: Sequence[str],
    fields: Sequence[str] | None,
    axis: int = 0,
    wishes: Mapping[str, Wish] | None = None,
) -> Dataset:
    """Put files after each other, without a look at any index.

    Raises:
        DatasetError: if one cannot be read, or they do not hold the same.
    """
    found = [(path, functools.partial(inspect_file, path, fields, axis, wishes)) for path in paths]
    return fitted(source, with_rows(source, found))


Found = tuple[Shard, dict[str, Field]]


def with_rows(source: str, files: Sequence[tuple[str, Callable[[], Found]]]) -> list[Found]:
    """Return what those of several files, or groups, hold that have rows; the others are named.

    Args:
        source: what the user calls the dataset.
        files: the name of each, and what looks into it.

    Raises:
        EmptyFileError: if none has rows.
        DatasetError: as what looks into one does.
    """
    found: list[Found] = []
    empty: list[str] = []
    for name, look in files:
        try:
            found.append(look())
        except EmptyFileError:
            if len(empty) + 1 == len(files):
                raise  # the last of files that are all empty
            empty.append(name)
        except DatasetError as error:
            if not isinstance(error.__cause__, NotHDF5Error):
                raise
            behind = [other for other, _ in files[len(found) + len(empty) + 1 :]]
            raise _with_others_like_it(error, behind) from error.__cause__
    if empty:
        _name_empty(source, tuple(empty))
    return found


def _with_others_like_it(error: DatasetError, paths: Sequence[str]) -> DatasetError:
    """Return an error of a file that is no HDF5 which names others of the same pattern, too."""
    others = [f"{path}: {what}" for path, what in others_like_it(paths)]
    if not others:
        return error
    more = listed([printable(each) for each in others], 5)
    return DatasetError(
        f"{error}. The same of {len(others):,} other {'file' if len(others) == 1 else 'files'}: "
        f'{more}. Move them away, or give a pattern that they do not fit, such as "*.h5"'
    )


@functools.cache
def _name_empty(source: str, names: tuple[str, ...]) -> None:
    """Name what is left out, once in a process: files are opened for several fields."""
    logger.warning(
        "%s: %d without rows, left out: %s",
        printable(source),
        len(names),
        listed([printable(name) for name in names], 10),
    )


def fitted(source: str, files: Sequence[tuple[Shard, Mapping[str, Field]]]) -> Dataset:
    """Put files after each other that hold the same.

    Raises:
        DatasetError: if they do not.
    """
    first, found = files[0]
    for shard, others in files[1:]:
        require_fields(found, others, shard.path)
        for name, field in found.items():
            if others[name] != field:
                raise DatasetError(
                    f'{shard.path}: field "{name}" is {describe(others[name])}, but '
                    f"{describe(field)} in {first.path}: give a pattern of files that fit together"
                )
    require_countable(sum(shard.samples for shard, _ in files), source)
    return Dataset(source=source, fields=found, shards=tuple(shard for shard, _ in files))


def verify_share(datasets: Sequence[Dataset], rank: int, world_size: int) -> None:
    """Check a rank's share of the shards against what is listed of them; it reads them whole.

    Bytes against their checksums; and rows, shapes, dtypes and places of the fields, which lead
    readers past HDF5, against what HDF5 says of the file.

    Raises:
        DatasetError: naming the first that is not what it was, or has no checksum.
    """
    listed: dict[str, list[tuple[Shard, Part]]] = {}
    for part in (part for dataset in datasets for part in _parts(dataset)):
        for shard in part.dataset.shards:
            listed.setdefault(shard.path, []).append((shard, part))
    for path in sorted(listed)[rank::world_size]:
        _verify(listed[path][0][0])
        for shard, part in listed[path]:
            # Of what is made of stored rows, the checksum of the file says all.
            fields = {k: v for k, v in part.dataset.fields.items() if v.form is None}
            if not fields:
                continue
            found = _as_shard(shard, list(fields), part.axis)
            problems = unlike_listed(shard, fields, *found)
            if problems:
                raise DatasetError(f"{problems[0]}. {_REMAKE}")


def _as_shard(listed: Shard, fields: Sequence[str], axis: int) -> tuple[Shard, Mapping[str, Field]]:
    """Return what HDF5 says of a shard, which may be a group of its file."""
    if not listed.group:
        return inspect_file(listed.path, fields, axis)
    names = {name: listed.inside(name) for name in fields}
    found = look_into(listed.path, list(names.values()))
    arrays = {name: found.arrays[inside] for name, inside in names.items()}
    return dataclasses.replace(found, arrays=arrays).shard(fields, axis)


_REMAKE = "Make the index anew with `python -m hpctrain data index`, or bring the file back"


def unlike_listed(
    listed: Shard,
    listed_fields: Mapping[str, Field],
    found: Shard,
    found_fields: Mapping[str, Field],
) -> list[str]:
    """Return how a file differs from what an index or a catalogue says of it."""
    problems = []
    if found.samples != listed.samples:
        problems.append(f"{found.path}: {found.samples} rows, the index says {listed.samples}")
    for name, about in listed_fields.items():
        place = f'{found.path}: field "{name}"'
        if found_fields[name] != about:
            there = describe(found_fields[name])
            problems.append(f"{place} is {there}, the index says {describe(about)}")
        elif _where(found.layouts[name]) != _where(listed.layouts[name]):
            there, said = (_where(shard.layouts[name]) for shard in (found, listed))
            problems.append(f"{place} {there}, the index says that it {said}")
        elif listed.codings is not None and _coding(found, name) != _coding(listed, name):
            problems.append(
                f"{place}: its attributes say otherwise how to decode it than the index does: make "
                "that anew with `python -m hpctrain data index`"
            )
    return problems


def _coding(shard: Shard, name: str) -> Coding:
    return (shard.codings or {}).get(name, PLAIN)


def describe(about: Field | None) -> str:
    """Return what a field is, in words."""
    if about is None:
        return "not there"
    made = "" if about.form is None else f", made of {about.form.stored} {about.form.shape}"
    return f"{about.dtype} of shape {about.shape}{made}"


def _where(layout: Layout) -> str:
    """Return where the rows are, in words that differ if readers go elsewhere."""
    begin = layout.base if layout.offset is None else layout.offset
    if begin is not None:
        return f"begins at byte {begin}"
    return f"is in chunks of {layout.chunk_rows} rows"


def _parts(dataset: Dataset) -> Sequence[Part]:
    return dataset.parts if isinstance(dataset, View) else [Part(dataset)]


def _verify(shard: Shard) -> None:
    if shard.checksum is None:
        raise DatasetError(
            f'{shard.path}: data.verify = "start", but this file has no checksum: make an index '
            "with `python -m hpctrain data index`"
        )
    try:
        found = file_checksum(shard.path)
    except OSError as error:
        raise DatasetError(f"{shard.path}: {error.strerror or error}") from error
    if found != shard.checksum:
        raise DatasetError(
            f"{shard.path}: its checksum is not that of the index: bytes of this file have "
            "changed. Bring the file back, or write the dataset anew"
        )


def in_order(paths: Iterable[str], order: FileOrder = "natural") -> list[str]:
    """Return paths in an order that depends on nothing but them."""
    return sorted(paths, key=order_key(order))


def order_key(order: FileOrder) -> Callable[[str], Any]:
    """Return what sorts paths in this order."""
    return natural_key if order == "natural" else str


def natural_key(path: str) -> tuple[object, ...]:
    """Return what sorts paths folder by folder, and the numbers in their names by value.

    Equal numbers that are written differently, 7 and 007, follow by their letters.
    """
    parts = [_DIGITS.split(part) for part in PurePath(path).parts]
    # Text and numbers alternate, so that numbers meet numbers only.
    return (
        [[int(each) if i % 2 else each for i, each in enumerate(part)] for part in parts],
        path,
    )
