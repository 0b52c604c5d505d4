"""From what a user calls a dataset to a Dataset: an indexed folder, or any HDF5 files."""

from __future__ import annotations

import dataclasses
import glob
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpctrain.data.claims import require_countable
from hpctrain.data.dataset import Dataset, Field, Shard, require_fields
from hpctrain.data.file_order import FileOrder, in_order, order_key
from hpctrain.data.finding.arrays import look_into
from hpctrain.data.finding.attributes import with_codings
from hpctrain.data.finding.catalogue import is_catalogue, read_catalogue
from hpctrain.data.finding.contents import Contents
from hpctrain.data.index import (
    HDF5_SUFFIXES,
    INDEX_NAME,
    UNFINISHED_NAME,
    is_shard_name,
    read_index,
)
from hpctrain.errors import DatasetError
from hpctrain.utils.text import listed, printable

logger = logging.getLogger(__name__)


def open_dataset(
    pattern: str,
    fields: Sequence[str] | None = None,
    axis: int = 0,
    order: FileOrder = "natural",
) -> Dataset:
    """Find out what a dataset holds. Reads no sample.

    Args:
        pattern: a folder written by hpctrain, a folder of HDF5 files, one such file, a glob, or a
            catalogue of files.
        fields: paths of the HDF5 datasets that are wanted; None: all that there are.
        axis: of these HDF5 datasets, which counts the samples.
        order: in which the files follow each other, whatever an index or a catalogue says.

    Raises:
        DatasetError: if there are no files, a field is not in them or cannot become a tensor, or
            the files do not fit together.
    """
    path = Path(pattern)
    require_finished(path)
    if is_catalogue(path):
        files = sorted(read_catalogue(path), key=lambda file: order_key(order)(file.path))
        whole = [_with_unlisted(file, fields) for file in files]
        return with_codings(fitted(pattern, [file.shard(fields, axis) for file in whole]))
    if (path / INDEX_NAME).exists() and not axis:
        dataset = _reordered(read_index(path), order)
        return with_codings(_select(dataset, list(fields or dataset.fields)))
    return join_files(pattern, find_files(pattern, order), fields, axis)


def _with_unlisted(file: Contents, fields: Sequence[str] | None) -> Contents:
    """Return what a catalogue says of a file, with the fields that only the file can tell of."""
    names = list(file.arrays if fields is None else fields)
    known = {name: array for name, array in file.arrays.items() if not array.is_elsewhere}
    asked = [name for name in names if name not in known]
    if not asked:
        return file
    return dataclasses.replace(file, arrays={**known, **look_into(file.path, asked).arrays})


def _select(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """Return fields of an index, and of its files what it does not list or cannot know.

    It has one name of each array, and HDF5 finds arrays by others, too. And of values that are in
    files that it does not list, it cannot tell whether they are still there.

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
        if more.samples != shard.samples:
            raise DatasetError(
                f'{shard.path}: field "{asked[0]}" has {more.samples} rows, and {INDEX_NAME} lists '
                f"{shard.samples}. Name fields that belong together"
            )
        codings = None if shard.codings is None else {**shard.codings, **(more.codings or {})}
        layouts = {**shard.layouts, **more.layouts}
        whole = dataclasses.replace(shard, layouts=layouts, sources=more.sources, codings=codings)
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
    path: str, fields: Sequence[str] | None, axis: int = 0
) -> tuple[Shard, dict[str, Field]]:
    """Return what one HDF5 file holds of these fields; None: all of its datasets.

    Raises:
        DatasetError: if it cannot be read, or a field is not there or cannot become a tensor.
    """
    return look_into(path, fields).shard(fields, axis)


def find_files(pattern: str, order: FileOrder = "natural") -> list[str]:
    """Return the HDF5 files of a folder, one file, or those that fit a glob, in their order.

    Raises:
        DatasetError: if there are none.
    """
    path = Path(pattern)
    if path.is_dir():
        shards = (str(entry) for entry in path.iterdir() if is_shard_name(entry.name))
        names = in_order(shards, order)
        if not names:
            raise DatasetError(
                f"{path}: there are no HDF5 files in this folder (*{', *'.join(HDF5_SUFFIXES)})"
            )
        return names
    if path.exists():
        return [pattern]
    paths = glob.glob(pattern, recursive=True)  # noqa: PTH207 - absolute ones too
    if not paths:
        raise DatasetError(f"{pattern}: no file has such a name")
    return in_order(paths, order)


def join_files(
    source: str, paths: Sequence[str], fields: Sequence[str] | None, axis: int = 0
) -> Dataset:
    """Put files after each other, without a look at any index.

    Raises:
        DatasetError: if one cannot be read, or they do not hold the same.
    """
    return fitted(source, [inspect_file(path, fields, axis) for path in paths])


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
                    f'{shard.path}: field "{name}" is {_describe(others[name])}, but '
                    f"{_describe(field)} in {first.path}: give a pattern of files that fit together"
                )
    require_countable(sum(shard.samples for shard, _ in files), source)
    return Dataset(source=source, fields=found, shards=tuple(shard for shard, _ in files))


def _describe(field: Field) -> str:
    return f"{field.dtype} of shape {field.shape}"
