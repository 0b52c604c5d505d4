"""What is the same for every sample: fields without an axis of samples, and weights of latitudes.

Such are orography, a land mask, or how much a point of a grid counts. They are read once, from all
files, which have to hold the same; ranks get them with the dataset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.config.schema_data import FieldTable
from hpctrain.data.coding import Coding
from hpctrain.data.dataset import Field, require_supported
from hpctrain.data.decoding import decoded_dtype
from hpctrain.data.files.contents import coding_in
from hpctrain.data.files.coordinates import latitude_weights, latitudes_of
from hpctrain.data.files.discovery import FileOrder, files_of
from hpctrain.data.files.form_opening import find_stored, form_in
from hpctrain.data.files.storage import HDF5_FAILURES, open_hdf5_file
from hpctrain.data.files.type_texts import type_of
from hpctrain.data.forms import UnfitRowError, Wish
from hpctrain.data.view import Column, Part
from hpctrain.errors import DatasetError

Values = npt.NDArray[Any]


def read_static(
    name: str, table: FieldTable, wish: Wish, files: str, order: FileOrder, *, decodes: bool
) -> Values:
    """Return a field that is one array, as samples of it would be delivered. Reads it.

    Args:
        name: of the field.
        table: what the config says of it.
        wish: the same, of how it is stored.
        files: that hold it.
        order: in which files follow each other.
        decodes: whether numbers are what attributes say that they stand for.

    Raises:
        DatasetError: if a file does not have it, or another array than the others.
    """

    def values_in(file: h5py.File) -> Values:
        dataset, members = find_stored(file, wish.path)
        if dataset is None:
            raise ValueError(
                f"is not there: name a file that has it, data.fields.{name}.train"
                f"{'' if table.path else ', or its HDF5 dataset, path'}"
            )
        form = form_in(file, dataset, members, wish, None)
        stored = dataset.fields(members[0])[()] if form.stored.hasobject else dataset[()]
        coding = coding_in(dataset) if decodes and not members else Coding()
        if coding.problem:
            raise ValueError(coding.problem)
        if wish.dtype is not None and not coding.is_plain:
            raise ValueError("its attributes give its number format: leave dtype out")
        try:
            made = form.make(np.asarray(stored)[None])[0]
        except UnfitRowError as error:
            raise ValueError(str(error)) from None
        numbers = np.ascontiguousarray(made, made.dtype.newbyteorder("="))
        if coding.is_plain:
            values = numbers
        else:
            seen = numbers.view(coding.view(numbers.dtype))
            values = coding.decode(seen, decoded_dtype(seen.dtype, [coding]))
        try:
            require_supported(name, Field(values.shape, values.dtype), file.filename)
        except DatasetError as error:
            raise ValueError(f"is {type_of(dataset)}: {error}") from None
        return values

    return _same_in_all(f'field "{name}"', files_of(files, order), values_in)


def read_latitude_weights(
    name: str, table: FieldTable, part: Part, column: Column, field: Field
) -> Values:
    """Return how much the values of a sample count by their latitude, 1 on average.

    Args:
        name: of the field.
        table: what the config says of it.
        part: the files that hold it.
        column: of the field.
        field: as it is delivered.

    Returns:
        As many axes as a sample has, all but that of latitude of length 1, float64.

    Raises:
        DatasetError: if a file has no latitude along an axis of the field, or another one.
    """
    assert table.weight is not None
    kind = table.weight
    about = part.dataset.fields[column.name]
    form = about.form

    def weights_and_latitudes(file: h5py.File) -> Values:
        inside = column.name if form is None else form.path
        dataset = file[inside]
        axis, latitudes = latitudes_of(file, dataset)
        if axis == part.axis:
            raise ValueError(f'"{inside}" has its samples along latitude, which weighs none of it')
        at = axis - (axis > part.axis)
        weights = latitude_weights(latitudes, kind)
        shape = dataset.shape[: part.axis] + dataset.shape[part.axis + 1 :]
        if form is not None and form.picks:
            shape = tuple(
                size if pick is None else len(pick)
                for size, pick in zip(shape, form.picks, strict=True)
            )
            if (pick := form.picks[at]) is not None:
                weights, latitudes = weights[list(pick)], latitudes[list(pick)]
        if not weights.sum() > 0:
            raise ValueError("only poles are left of its latitudes, whose weight is 0")
        sizes = [len(weights) if number == at else 1 for number in range(len(shape))]
        if form is not None and form.squeeze:
            sizes = [n for n, size in zip(sizes, shape, strict=True) if size != 1]
        ones = [1] * (len(field.shape) - len(sizes))
        both: Values = np.stack([weights / weights.mean(), latitudes])
        return both.reshape([2, *ones, *sizes])

    paths = [shard.path for shard in part.dataset.shards]
    # Two files may be upside down to each other, whose weights are the same.
    where = f"latitude (data.fields.{name}.weight)"
    weights: Values = _same_in_all(where, list(dict.fromkeys(paths)), weights_and_latitudes)[0]
    return weights


def _same_in_all(what: str, paths: list[str], look: Callable[[h5py.File], Values]) -> Values:
    """Return what is found in every file.

    Raises:
        DatasetError: if a file does not have it, or has something else than the first one.
    """
    first: Values | None = None
    for path in paths:
        try:
            with open_hdf5_file(path) as file:
                found = look(file)
        except ValueError as error:
            raise DatasetError(f"{path}: {what}: {error}") from None
        except HDF5_FAILURES as error:
            raise DatasetError(f"{path}: HDF5 cannot read this file: {error}") from error
        if first is None:
            first = found
        elif not _equal(first, found):
            raise DatasetError(
                f"{path}: {what} is not the same as in {paths[0]}: what is static has one value "
                "for all samples. Name files that fit together, or one file in "
                "data.fields.NAME.train"
            )
    assert first is not None
    return first


def _equal(one: Values, two: Values) -> bool:
    nan = one.dtype.kind in "fc"
    return one.dtype == two.dtype and np.array_equal(one, two, equal_nan=nan)
