"""Where the values of fields are: which files, and which rows of them make each sample."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable
from typing import NamedTuple

import h5py
import numpy as np

from hpctrain.config.schema_data import FieldTable
from hpctrain.data.dataset import WHOLE, Dataset, Layout
from hpctrain.data.files.discovery import FileOrder, files_of, open_dataset
from hpctrain.data.files.form_opening import is_sequence
from hpctrain.data.files.groups import objects_fitting, stem
from hpctrain.data.files.storage import HDF5_FAILURES, open_hdf5_file, read_attribute
from hpctrain.data.files.walking import require_files_behind
from hpctrain.data.order.ragged import (
    Heap,
    Lengths,
    Source,
    as_numbers,
    has_end,
    joined,
    of_counts,
    of_offsets,
)
from hpctrain.data.reading.heaps import find_rows
from hpctrain.data.reading.rows import read_rows
from hpctrain.data.view import Part
from hpctrain.errors import DatasetError
from hpctrain.utils.text import listed, printable

logger = logging.getLogger(__name__)


class Home(NamedTuple):
    """Where the values of fields are; those that agree in all of it are one part of a view.

    Attributes:
        files: as `open_dataset` takes them.
        axis: of their HDF5 datasets, which counts the rows, or WHOLE.
        offsets: the HDF5 dataset that says where samples begin; empty: none does.
        counts: the one that says how many rows they have; empty: none does.
        groups: the pattern of groups that they are in; empty: they are in none.
        group_is_sample: whether all rows of such a group are one sample, or document.
        packs: whether samples are cut from documents.
        sequence: the HDF5 dataset whose rows may be samples of variable length; empty: none may.
    """

    files: str
    axis: int
    offsets: str
    counts: str
    groups: str
    group_is_sample: bool
    packs: bool
    sequence: str

    @classmethod
    def of(cls, table: FieldTable, path: str, files: str, order: FileOrder) -> Home:
        """Return that of a field; of arrays in groups a look at the first one tells what they are.

        Raises:
            DatasetError: if there are no files.
        """
        offsets, counts = (table.offsets or "").strip("/"), (table.counts or "").strip("/")
        groups = stem(path)
        is_ragged = bool(table.batch or table.image) and not offsets and not counts
        packs = table.batch == "pack"
        return cls(
            files=files,
            axis=WHOLE if table.axis == "none" else table.axis,
            offsets=offsets,
            counts=counts,
            groups=groups,
            group_is_sample=bool(groups) and is_ragged,
            packs=packs,
            sequence=path
            if is_ragged and (not groups or _are_sequences(files, path, order))
            else "",
        )


def _are_sequences(files: str, pattern: str, order: FileOrder) -> bool:
    """Tell whether the array of the first group of a pattern is of variable-length rows."""
    first = files_of(files, order)[0]
    try:
        with open_hdf5_file(first) as file:
            name = next(objects_fitting(file, pattern), None)
            found = None if name is None else file[name]
            return isinstance(found, h5py.Dataset) and is_sequence(found)
    except HDF5_FAILURES:
        return False  # who opens the files says what is wrong


def part_of(home: Home, dataset: Dataset, order: FileOrder) -> Part:
    """Return the files of a home, and which of their rows make a sample."""
    heap = None
    if any(field.form and field.form.sequence for field in dataset.fields.values()):
        dataset, heap = _in_heaps(dataset)
        lengths: Lengths | None = heap.lengths
    else:
        lengths = _lengths(home, dataset, order)
    if home.packs and lengths is not None:
        documents = lengths.firsts[lengths.counts > 0]
        return Part(dataset, home.axis, documents=documents, heap=heap)
    return Part(dataset, home.axis, lengths, heap=heap)


def _in_heaps(dataset: Dataset) -> tuple[Dataset, Heap]:
    """Return a variable-length HDF5 dataset by its values, and where they are.

    Raises:
        DatasetError: if a row says what cannot be, or there is no value.
    """
    ((key, field),) = dataset.fields.items()
    assert field.form is not None
    name, begin = field.form.path, time.perf_counter()
    found = find_rows(dataset.shards, field)
    values = [int(rows.counts.sum()) for rows in found]
    if not sum(values):
        raise DatasetError(f'{dataset.source}: field "{name}" has no values in any row')
    lengths = joined(
        [(np.cumsum(each.counts) - each.counts, each.counts) for each in found], values
    )
    heap = Heap(
        lengths,
        np.concatenate([each.collections for each in found]),
        np.concatenate([each.objects for each in found]),
    )
    if unknown := int((heap.collections < 0).sum()):
        logger.warning(
            'field "%s": %s of %s rows are read through HDF5, which is slower: `python -m hpctrain '
            "data info` shows how they are stored",
            printable(name),
            f"{unknown:,}",
            f"{lengths.samples:,}",
        )
    logger.info(
        'field "%s": the lengths of %s rows are known after %.2g s',
        printable(name),
        f"{lengths.samples:,}",
        time.perf_counter() - begin,
    )
    shards = tuple(
        # Readers find values by the bytes of the file.
        dataclasses.replace(shard, samples=count, layouts={key: Layout(0)})
        for shard, count in zip(dataset.shards, values, strict=True)
    )
    return dataclasses.replace(dataset, shards=shards), heap


def _lengths(home: Home, dataset: Dataset, order: FileOrder) -> Lengths | None:
    """Return which rows of a dataset make each sample, by its files; None: one row does.

    Raises:
        DatasetError: if they say what cannot be.
    """
    values = [shard.samples for shard in dataset.shards]
    if home.group_is_sample:
        whole = [(np.zeros(1, np.int64), np.array([rows], np.int64)) for rows in values]
        return joined(whole, values)
    if not home.offsets and not home.counts:
        return None
    name = home.offsets or home.counts
    about = open_dataset(home.files, [name], order=order)
    paths = [shard.name for shard in dataset.shards]
    if (said := [shard.name for shard in about.shards]) != paths:
        other = next(iter({*said} ^ {*paths}), home.files)
        raise DatasetError(
            f'{other}: "{name}" says which values of {listed(list(dataset.fields))} belong to a '
            "sample, and only one of them is in this file: name files that have both"
        )
    stored = read_rows(about, np.arange(about.samples, dtype=np.int64))[name]
    places = [Source((shard.path, shard.inside(name))) for shard in about.shards]
    per_file = [
        as_numbers(numbers, at)
        for numbers, at in zip(np.split(stored, about.shard_stops[:-1]), places, strict=True)
    ]
    if home.counts:
        made = [of_counts(*each) for each in zip(per_file, values, places, strict=True)]
    else:
        ended = has_end(per_file, values)
        made = [
            of_offsets(numbers, total, ended=ended, at=at)
            for numbers, total, at in zip(per_file, values, places, strict=True)
        ]
    return joined(made, values)


def find_sparse(paths: Iterable[str], path: str) -> int:
    """Return the columns of a matrix of sparse rows, in the files of AnnData or of 10x Genomics.

    Raises:
        DatasetError: if there is none at the path, its columns are stored in place of its rows,
            or files differ.
    """
    found: dict[int, str] = {}
    for each in paths:
        try:
            with open_hdf5_file(each) as file:
                require_files_behind(file, path)
                found.setdefault(_columns_of(file.get(path), path), each)
        except ValueError as error:
            raise DatasetError(f"{each}: {error}") from None
        except HDF5_FAILURES as error:
            raise DatasetError(f"{each}: HDF5 cannot read this file: {error}") from error
    if len(found) > 1:
        (one, first), (two, second), *_ = found.items()
        raise DatasetError(
            f'{second}: "{path}" has {two:,} columns, and {one:,} in {first}: write files of the '
            "same genes (anndata.concat), or name those that are alike"
        )
    return next(iter(found))


def _columns_of(group: object, path: str) -> int:
    """Return the columns of a matrix of sparse rows.

    Source: AnnData's on-disk format (encoding-type, shape; h5sparse_* before 0.8), and 10x
    Genomics' feature-barcode matrices, which hold the columns, barcodes, of genes x barcodes.

    Raises:
        ValueError: saying what it is instead.
    """
    if not isinstance(group, h5py.Group) or not {"data", "indices", "indptr"} <= group.keys():
        raise ValueError(
            f'"{path}" is not a group of data, indices and indptr, as sparse matrices are: leave '
            "data.fields.NAME.sparse out, or name another path (X, layers/counts, raw/X, matrix)"
        )
    there = group.attrs
    names = [name for name in ("encoding-type", "h5sparse_format") if name in there]
    kind = read_attribute(there, names[0]) if names else None
    kind = kind.decode() if isinstance(kind, bytes) else kind
    if kind is None and isinstance(shape := group.get("shape"), h5py.Dataset):
        if shape.shape != (2,):
            raise ValueError(f'"{path}/shape" has shape {shape.shape}: expected rows and columns')
        columns, rows = shape[()]
    elif kind in ("csr_matrix", "csr"):
        rows, columns = there.get("shape", there.get("h5sparse_shape"))
    elif kind in ("csc_matrix", "csc"):
        raise ValueError(
            f'"{path}" is stored by columns (CSC), and samples are rows: '
            "`adata.X = adata.X.tocsr()` and write the file anew"
        )
    else:
        raise ValueError(f'"{path}" does not say what it is: its encoding-type is {kind!r:.40}')
    if group["indptr"].shape != (rows + 1,):
        raise ValueError(f'"{path}" has {rows} rows, and indptr of shape {group["indptr"].shape}')
    return int(columns)
