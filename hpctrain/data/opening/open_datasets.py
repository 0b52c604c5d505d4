"""From `[data]` to the datasets of a run: files found, fields joined, samples chosen."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from hpctrain.config.schema_data import DataSection, FieldTable, SamplesTable, SourceTable
from hpctrain.config.semantics import NEWEST, Semantics
from hpctrain.data.dataset import Dataset
from hpctrain.data.files.discovery import FileOrder, files_of, open_dataset
from hpctrain.data.files.form_opening import all_texts, as_classes
from hpctrain.data.files.groups import is_pattern
from hpctrain.data.forms import Wish, frozen
from hpctrain.data.opening.attributes import attribute_parts, missing_of
from hpctrain.data.opening.homes import Home, find_sparse, part_of
from hpctrain.data.opening.sample_rows import Purpose, borders_of, choose_rows
from hpctrain.data.opening.static import read_latitude_weights, read_static
from hpctrain.data.order.ragged import Packing, Raggedness
from hpctrain.data.order.selection import MOST_SPANS, SampleSelection, cut
from hpctrain.data.view import Column, Part, View, join_sources
from hpctrain.errors import DatasetError
from hpctrain.utils.text import printable

logger = logging.getLogger(__name__)


def open_datasets(
    section: DataSection, fields: Sequence[str], semantics: Semantics = NEWEST
) -> tuple[Dataset, Dataset | None]:
    """Find out what a run trains and evaluates with. Reads no sample, but the masks.

    Args:
        section: of the config.
        fields: that the task needs; none: all that the files have.
        semantics: the rules of the run.

    Returns:
        The samples to train with, and those to evaluate with, None if there are none.

    Raises:
        DatasetError: if files or fields are not there or do not fit together, or no sample is left.
    """
    return (
        open_for_training(section, fields, semantics),
        open_for_evaluation(section, fields, semantics),
    )


def open_for_training(
    section: DataSection, fields: Sequence[str], semantics: Semantics = NEWEST
) -> Dataset:
    """Return the samples to train with, see `open_datasets`; of several sources all, joined."""
    fields = fields or _all_fields(section, semantics)
    stored = _stored(section, fields, semantics)
    section = _with_common_classes(section, fields, semantics)
    if not section.sources:
        return _open(section, fields, "train", semantics).as_stored(stored)
    return join_sources(
        {
            each.name: _open(_of_source(section, each), fields, "train", semantics).as_stored(
                stored
            )
            for each in section.sources
        }
    )


def _of_source(section: DataSection, source: SourceTable) -> DataSection:
    """Return what the config says of one of several sources."""
    samples = section.samples
    if source.samples is not None:
        samples = dataclasses.replace(samples, train=source.samples)
    return dataclasses.replace(section, train=source.train, samples=samples, sources=())


def _with_common_classes(
    section: DataSection, fields: Sequence[str], semantics: Semantics
) -> DataSection:
    """Return what the config says, with the classes of all sources in place of "sorted".

    A text has the same number in all of them, and in every evaluation.
    """
    named = [
        name
        for name in fields
        if section.sources and section.fields.get(name, FieldTable()).classes == "sorted"
    ]
    if not named:
        return section
    found: dict[str, set[str]] = {name: set() for name in named}
    for each in section.sources:
        opened = _open(_of_source(section, each), fields, "train", semantics)
        for name, texts in found.items():
            home, inside = opened.home(name)
            form = home.fields[inside].form
            assert form is not None
            texts |= {*(form.classes or ())}
    tables = {
        name: dataclasses.replace(
            section.fields[name], classes=as_classes(map(str.encode, texts), name)
        )
        for name, texts in found.items()
    }
    return dataclasses.replace(section, fields={**section.fields, **tables})


def open_for_evaluation(
    section: DataSection, fields: Sequence[str], semantics: Semantics = NEWEST
) -> Dataset | None:
    """Return the samples to evaluate with, None if there are none, see `open_datasets`."""
    of_same_files = section.samples.validation or section.samples.validation_fraction
    if section.validation is None and not of_same_files:
        return None
    fields = fields or _all_fields(section, semantics)
    stored = _stored(section, fields, semantics)
    section = _with_common_classes(section, fields, semantics)
    if section.validation is None and section.sources:  # a part of each of them
        return join_sources(
            {
                each.name: _open(
                    _of_source(section, each), fields, "validation", semantics
                ).as_stored(stored)
                for each in section.sources
            }
        )
    return _open(section, fields, "validation", semantics).as_stored(stored)


def _all_fields(section: DataSection, semantics: Semantics) -> list[str]:
    """Return the fields of the training files, and those that the config finds elsewhere."""
    if any(
        table.batch or table.static or table.attribute or is_pattern(table.path or "")
        for table in section.fields.values()
    ):
        # Whose values, offsets and edges have other numbers of rows, and groups many names: what
        # is wanted is said.
        return [name for name, table in section.fields.items() if not table.static]
    train = section.sources[0].train if section.sources else section.train
    try:
        found = open_dataset(train, None, order=semantics.file_order).fields
    except DatasetError:
        if not section.fields:
            raise
        # Of files whose arrays do not all fit, what was named.
        return [name for name, table in section.fields.items() if not table.static]
    return list(dict.fromkeys([*found, *section.fields]))


def open_named(
    section: DataSection, name: str, fields: Sequence[str], semantics: Semantics = NEWEST
) -> Dataset:
    """Return the samples of one of `data.evaluations`: all of its files, in their windows."""
    samples = SamplesTable(stride=section.samples.stride, across_files=section.samples.across_files)
    named = dataclasses.replace(section, validation=section.evaluations[name], samples=samples)
    fields = fields or _all_fields(section, semantics)
    stored = _stored(section, fields, semantics)
    named = _with_common_classes(named, fields, semantics)
    return _open(named, fields, "validation", semantics).as_stored(stored)


def _stored(section: DataSection, fields: Sequence[str], semantics: Semantics) -> list[str]:
    """Return the fields whose numbers are taken as they are stored."""
    tables = {name: section.fields.get(name, FieldTable()) for name in fields}
    return [name for name, table in tables.items() if (table.decode or semantics.decode) == "none"]


def _says_where(table: FieldTable) -> bool:
    """Tell whether a table says where a field is, and not only how its numbers are read."""
    # An empty one has always made a view, whose fingerprint a run that has begun knows.
    is_empty = table == FieldTable()
    return is_empty or dataclasses.replace(table, decode=None, fill=None, mask=None) != FieldTable()


def _open(
    section: DataSection, fields: Sequence[str], purpose: Purpose, semantics: Semantics
) -> Dataset:
    tables = {name: section.fields.get(name, FieldTable()) for name in fields}
    files: Purpose = "train" if section.validation is None else purpose
    source = section.train if files == "train" else str(section.validation)
    static = {name: table for name, table in section.fields.items() if table.static}
    if (
        section.samples == SamplesTable()
        and not static
        and not any(
            _says_where(section.fields[name]) for name in section.fields.keys() & tables.keys()
        )
    ):
        return open_dataset(source, fields, order=semantics.file_order)
    order = semantics.file_order
    parts, columns = _join(tables, files, source, order, section.train)
    _require_equal_rows(parts)
    reach = max(column.reach for column in columns.values())
    chosen = choose_rows(section, purpose, source, parts, reach, semantics)
    spans = chosen.spans
    stride = section.samples.stride
    packed = _packed_length(columns, source)
    if packed is not None:  # one stream of all files, cut into samples that follow each other
        stride = packed if stride == 1 else stride
    elif max(reach, stride) > 1 and not section.samples.across_files:
        spans = cut(spans, borders_of(parts))
    if len(spans.starts) > MOST_SPANS:
        raise DatasetError(
            f"{source}: the rows of data.samples.{purpose} are in {len(spans.starts):,} pieces, "
            f"and at most {MOST_SPANS:,} are kept in memory: pack the rows that are wanted to "
            "files of their own with `python -m hpctrain data pack`"
        )
    chosen.check_windows(spans, reach)
    selection = SampleSelection.of(spans, reach, stride)
    if not selection.samples:
        longest = int((spans.stops - spans.starts).max()) if len(spans.starts) else 0
        raise DatasetError(
            f"{source}: there is no sample for data.{purpose}: one reaches over {reach} rows "
            f"(steps, lead and every of [data.fields]), and the longest run of rows that are "
            f"wanted, in one file, has {longest}"
        )
    view = View.of(source, parts, columns, selection)
    values = {
        name: read_static(
            name,
            table,
            _wish(name, table, (table.path or name).strip("/"), section.train, order),
            getattr(table, files) or table.train or source,
            order,
            decodes=(table.decode or semantics.decode) != "none",
        )
        for name, table in static.items()
    }
    weights = {
        f"{name}.weight": read_latitude_weights(
            name, table, parts[columns[name].part], columns[name], view.fields[name]
        )
        for name, table in tables.items()
        if table.weight is not None
    }
    return dataclasses.replace(view, notes=chosen.notes, static=values | weights)


def _join(
    tables: Mapping[str, FieldTable],
    files: Purpose,
    source: str,
    order: FileOrder,
    source_of_classes: str,
) -> tuple[list[Part], dict[str, Column]]:
    """Open the files of every field, those that several are in only once."""
    attributes = {name: table for name, table in tables.items() if table.attribute is not None}
    tables = {name: table for name, table in tables.items() if name not in attributes}
    columns_of = {}
    for name, table in list(tables.items()):
        if table.sparse is not None:
            files_here = files_of(getattr(table, files) or source, order)
            columns_of[name] = find_sparse(files_here, (table.path or name).strip("/"))
            tables = {**tables, **_as_ragged(name, table)}
    paths = {name: (table.path or name).strip("/") for name, table in tables.items()}
    homes = {
        name: Home.of(table, paths[name], getattr(table, files) or source, order)
        for name, table in tables.items()
    }
    wished = {
        name: None if wish.is_plain else wish
        for name, table in tables.items()
        for sequence in [bool(homes[name].sequence)]
        for wish in [_wish(name, table, paths[name], source_of_classes, order, sequence=sequence)]
    }
    # One HDF5 dataset may become several fields.
    keys = {
        name: path if wished[name] is None or is_pattern(path) else f"{path} as {name}"
        for name, path in paths.items()
    }
    apart = list(dict.fromkeys(homes.values()))
    parts = []
    for home in apart:
        own = [name for name in tables if homes[name] == home]
        inside = list(dict.fromkeys(keys[name] for name in own))
        wishes = {keys[name]: wish for name in own if (wish := wished[name]) is not None}
        dataset = open_dataset(home.files, inside, home.axis, order, wishes)
        for name in own:
            _require_unpacked(name, tables[name], dataset, keys[name])
        parts.append(part_of(home, dataset, order))
    columns = {
        name: Column(
            part=apart.index(homes[name]),
            name=keys[name],
            steps=table.max_length if table.batch == "pack" else table.steps,
            lead=table.lead,
            every=table.every,
            ragged=_of_matrix(name, table, columns_of) or _raggedness(table),
            packing=_packing(table),
        )
        for name, table in tables.items()
    }
    for name, column in columns.items():
        part = parts[column.part]
        _require_lengths(name, tables[name], part, source)
        _warn_cut(name, column, part)
    files_of_field = {n: getattr(table, files) or source for n, table in attributes.items()}
    for part, names in attribute_parts(
        attributes, files_of_field, source_of_classes, order, list(zip(apart, parts, strict=True))
    ):
        columns |= {name: Column(part=len(parts), name=name) for name in names}
        parts.append(part)
    return parts, columns


def _require_lengths(name: str, table: FieldTable, part: Part, source: str) -> None:
    """Check that something says where the samples of a field of unequal length begin."""
    if not (table.batch or table.image) or part.lengths or part.documents is not None:
        return
    key = "image" if table.image else f'batch = "{table.batch}"'
    raise DatasetError(
        f"{source}: data.fields.{name}.{key}, and nothing says where samples begin: name an HDF5 "
        "dataset of the first value of each (offsets), or of how many there are (counts), or a "
        "pattern of groups that are samples (path); or a variable-length one, which says it itself"
    )


def _wish(
    name: str,
    table: FieldTable,
    path: str,
    source: str,
    order: FileOrder,
    *,
    sequence: bool = False,
) -> Wish:
    """Return what is delivered of a field as it is stored."""
    said = (table.dtype, table.squeeze, table.select, table.classes, table.missing)
    if is_pattern(path) and said != (None, False, {}, None, None):
        raise DatasetError(
            f'{source}: data.fields.{name}.path = "{path}" names groups, whose arrays are '
            "delivered as they are stored: leave dtype, squeeze, select and classes out, or write "
            "the rows one after the other with `python -m hpctrain data pack`"
        )
    classes = table.classes
    if classes == "sorted":
        # An evaluation has the classes of the training.
        texts = all_texts(files_of(table.train or source, order), path)
        classes = texts if missing_of(table) is None else tuple(filter(None, texts))
    return Wish(
        path=path,
        missing=missing_of(table),
        sequence=sequence,
        dtype=table.dtype,
        squeeze=table.squeeze,
        select=tuple((key, frozen(wanted)) for key, wanted in table.select.items()),
        nearest=table.nearest,
        classes=classes,
    )


def _require_unpacked(name: str, table: FieldTable, dataset: Dataset, key: str) -> None:
    """Check that a number format is asked for of numbers that stand for themselves.

    Raises:
        DatasetError: if they are decoded, to a format that their attributes give.
    """
    is_packed = not all(each.is_plain for each in dataset.codings(key))
    if missing_of(table) is not None:
        return  # which is what is known of them
    if table.dtype is not None and table.decode != "none" and is_packed:
        raise DatasetError(
            f'{dataset.source}: data.fields.{name}.dtype = "{table.dtype}", and the attributes of '
            f'"{key}" say how its numbers are decoded (scale_factor, _FillValue, ...), to floats: '
            f'leave the dtype out, or take what is stored: data.fields.{name}.decode = "none"'
        )


def _as_ragged(name: str, table: FieldTable) -> dict[str, FieldTable]:
    """Return the fields of unequal length that rows of a sparse matrix are made of."""
    group = (table.path or name).strip("/")
    indptr = f"{group}/indptr"
    values = dataclasses.replace(table, path=f"{group}/data", offsets=indptr, batch="concat")
    indices = dataclasses.replace(
        values, path=f"{group}/indices", sparse=None, decode="none", mask=None
    )
    return {name: values, f"{name}.indices": indices}


def _of_matrix(name: str, table: FieldTable, columns_of: Mapping[str, int]) -> Raggedness | None:
    """Return how rows of a sparse matrix are put into a batch, and their indices; None: others."""
    of = name.removesuffix(".indices")
    if of not in columns_of:
        return None
    if of != name:
        return Raggedness(batch="indices", columns=columns_of[of])
    assert table.sparse is not None
    return Raggedness(batch=table.sparse, indices=f"{name}.indices", columns=columns_of[name])


def _raggedness(table: FieldTable) -> Raggedness | None:
    if table.image is not None:
        return Raggedness(batch="encoded")
    if table.batch is None or table.batch == "pack":
        return None
    return Raggedness(
        batch=table.batch,
        max_length=table.max_length,
        pad=table.pad or 0.0,
        mask=table.mask,
        sample=table.sample,
        shift_by=table.shift_by,
    )


def _packing(table: FieldTable) -> Packing | None:
    if table.batch != "pack":
        return None
    return Packing(sample=table.sample, position=table.position)


def _packed_length(columns: Mapping[str, Column], source: str) -> int | None:
    """Return the rows of a sample that is cut from documents, None where none are.

    Raises:
        DatasetError: if fields are cut in different ways.
    """
    if not any(column.packing for column in columns.values()):
        return None
    other = [name for name, column in columns.items() if column.packing is None]
    lengths = {column.steps for column in columns.values()}
    if other or len(lengths) > 1:
        what = f"data.fields.{other[0]} is not" if other else "their max_length differs"
        raise DatasetError(
            f'{source}: with batch = "pack" a sample is cut from the documents of all fields in '
            f'one way, and {what}: give all of them batch = "pack" and one max_length'
        )
    (length,) = lengths
    return length


def _warn_cut(name: str, column: Column, part: Part) -> None:
    """Say how many samples a maximum of their length cuts."""
    if column.ragged is None or part.lengths is None:
        return
    counts = part.lengths.counts
    kept = column.ragged.kept(counts)
    cut, values = int((kept < counts).sum()), int(counts.sum())
    if cut:
        logger.warning(
            'field "%s": %s of %s samples are longer than data.fields.%s.max_length = %d and cut: '
            "%.2g %% of all values are left out",
            printable(name),
            f"{cut:,}",
            f"{len(counts):,}",
            printable(name),
            column.ragged.max_length,
            100 * (values - int(kept.sum())) / values,
        )


def _require_equal_rows(parts: Sequence[Part]) -> None:
    first = parts[0]
    for other in parts[1:]:
        if other.samples == first.samples:
            continue
        one, two = first.dataset, other.dataset
        rows, others = np.diff(first.stops, prepend=0), np.diff(other.stops, prepend=0)
        where = ""
        if len(rows) == len(others):
            at = int(np.flatnonzero(rows != others)[0])
            where = (
                f"; {one.shards[at].path} has {rows[at]}, {two.shards[at].path} has {others[at]}"
            )
        raise DatasetError(
            f"fields are joined row by row, but {', '.join(one.fields)} of {one.source} has "
            f"{first.samples} rows and {', '.join(two.fields)} of {two.source} "
            f"{other.samples}{where}: name files that belong together"
        )
