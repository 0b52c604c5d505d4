"""Predictions as one netCDF-4 file: on the coordinates of the files that they were made from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from hpctrain.config import Config
from hpctrain.config.schema_data import FieldTable
from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Dataset, DatasetFacts
from hpctrain.data.files.contents import look_into
from hpctrain.data.files.index import read_index
from hpctrain.data.forms import Form, Pick, Wish, frozen
from hpctrain.data.view import View
from hpctrain.errors import DatasetError
from hpctrain.utils.files import replacement

if TYPE_CHECKING:
    import xarray as xr

SUFFIX = ".nc"

LEAD, VALID = "lead_time", "valid_time"

# Attributes that say how numbers are stored, or how a file is put together: not these ones.
_PACKING = {"scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned"}
_LIMITS = {"valid_min", "valid_max", "valid_range", "actual_range"}
_LINKS = {"DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME", "_Netcdf4Dimid", "coordinates"}
_OF_STORAGE = _PACKING | _LIMITS | _LINKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the coordinates of predictions are.

    Attributes:
        paths: netCDF-4 files, whose rows follow each other.
        variable: path of one in each of them that has the dimensions of the predictions.
        axis: of its dimensions, which counts the rows.
        rows: (samples,) int64: of each sample the row that is its own.
        leads: rows from there to those that are predicted; empty: it is its own.
        has_steps: whether the predictions of a sample have an axis of leads.
        picks: indices that are taken of the other dimensions, each; None: all. Empty: of none.
        squeeze: whether dimensions of length 1 are left out.
    """

    paths: Sequence[str]
    variable: str
    axis: int
    rows: Int64s
    leads: Sequence[int] = ()
    has_steps: bool = False
    picks: Sequence[Pick] = ()
    squeeze: bool = False


def gather(folder: Path, target: Path, config: Config, dataset: DatasetFacts) -> None:
    """Make one file of a folder of predictions, and remove the folder.

    Args:
        folder: a dataset of predictions.
        target: the file.
        config: says which field is predicted, and how far ahead.
        dataset: the samples, as the model received them.

    Raises:
        DatasetError: if the samples are not from netCDF-4 files, or the file cannot be written.
    """
    if not isinstance(dataset, Dataset):
        raise DatasetError(
            f"{target}: the samples are not from files, and have no coordinates: give --output a "
            f"folder. {folder} holds the predictions"
        )
    write(folder, target, *source_of(config, dataset))
    shutil.rmtree(folder)


def source_of(config: Config, dataset: Dataset) -> tuple[str, Source]:
    """Return the name of what is predicted, and where its coordinates are.

    They are those of the target's variable, where the files of an input have it, else of an input.

    Raises:
        DatasetError: if the files have no variable whose dimensions have names.
    """
    target = config.task.target
    tables = config.data.fields
    inputs = [name for name in config.task.inputs if name in dataset.fields]
    home, inside = dataset.home(inputs[0]) if isinstance(dataset, View) else (dataset, inputs[0])
    paths = [shard.path for shard in home.shards]
    table = tables.get(target or "", FieldTable())
    input_form = home.fields[inside].form
    for name, variable, axis in (
        (target, table.path or target, table.axis),
        (
            inputs[0],
            inside if input_form is None else input_form.path,
            tables.get(inputs[0], FieldTable()).axis,
        ),
    ):
        if axis == "none" or name is None or variable is None or not _is_netcdf(paths[0], variable):
            continue
        form = input_form if name == inputs[0] else _form(paths[0], name, variable, table, axis)
        samples = np.arange(dataset.samples, dtype=np.int64)
        leads = [table.lead + step * table.every for step in range(table.steps or 1)]
        return variable.rpartition("/")[2], Source(
            paths=paths,
            variable=variable,
            axis=axis,
            rows=dataset.selection.rows(samples) if isinstance(dataset, View) else samples,
            leads=leads if any(leads) or table.steps else (),
            has_steps=table.steps is not None,
            picks=form.picks if form is not None else (),
            squeeze=form is not None and form.squeeze,
        )
    raise DatasetError(
        f"{paths[0]}: neither {target} nor {inputs[0]} has named dimensions there, as netCDF-4 "
        "files have them: give --output a folder, for predictions as HDF5"
    )


def _form(path: str, name: str, variable: str, table: FieldTable, axis: int) -> Form | None:
    """Return what is taken of a target, as the files of an input have it.

    Raises:
        DatasetError: if it cannot be taken there.
    """
    wish = Wish(
        path=variable.strip("/"),
        squeeze=table.squeeze,
        select=tuple((key, frozen(each)) for key, each in table.select.items()),
        nearest=table.nearest,
    )
    if wish.is_plain:
        return None
    return look_into(path, [name], {name: wish}, axis).arrays[name].form


def _is_netcdf(path: str, variable: str) -> bool:
    try:
        with h5py.File(path, "r") as file:
            found = file.get(variable)
            return isinstance(found, h5py.Dataset) and "DIMENSION_LIST" in found.attrs
    except OSError:
        return False


def require_libraries() -> None:
    """Check that the libraries are there.

    Raises:
        DatasetError: if one is not.
    """
    try:
        import h5netcdf  # noqa: F401
        import xarray  # noqa: F401
    except ImportError as error:
        raise DatasetError(
            f"predictions as netCDF need {error.name}: pip install 'hpctrain[netcdf]', or give "
            "--output a folder"
        ) from error


def write(folder: Path, target: Path, name: str, source: Source) -> None:
    """Write a dataset of predictions as a netCDF-4 file, there whole or not at all.

    Args:
        folder: of the dataset.
        target: the file.
        name: of the variable.
        source: of its coordinates.

    Raises:
        DatasetError: if the coordinates cannot be read, or the file not be written.
    """
    import h5netcdf

    predictions = read_index(folder)
    frame = _frame(source)
    try:
        with replacement(target) as temporary:
            frame.coordinates.to_netcdf(temporary, engine="h5netcdf")
            with h5netcdf.File(temporary, "a") as file:
                for field, about in predictions.fields.items():
                    called = name if field == "prediction" else field
                    named = _dimensions(file, called, about.shape, frame.dimensions)
                    made = file.create_variable(
                        called, named, about.dtype, fillvalue=_fill(about.dtype)
                    )
                    if called == name:
                        made.attrs.update(frame.attributes)
                    for first, values in _values(predictions.shards, field):
                        made[first : first + len(values)] = values
    except OSError as error:
        raise DatasetError(f"{target}: cannot write here: {error}") from error


def _fill(dtype: np.dtype[Any]) -> float | None:
    return float("nan") if dtype.kind == "f" else None


def _values(shards: Sequence[Any], field: str) -> Iterator[tuple[int, Any]]:
    first = 0
    for shard in shards:
        with h5py.File(shard.path, "r") as file:
            values = file[field][...]
        yield first, values
        first += len(values)


def _dimensions(
    file: Any, name: str, shape: Sequence[int], known: Sequence[tuple[str, int]]
) -> tuple[str, ...]:
    """Return names for the dimensions of a field, new ones where the source has no such."""
    sample, *others = known
    if [length for _, length in others] == list(shape):
        return tuple(each for each, _ in known)
    made = [f"{name}_{index}" for index in range(len(shape))]
    for each, length in zip(made, shape, strict=True):
        file.dimensions[each] = length
    return (sample[0], *made)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """What predictions are put into.

    Attributes:
        coordinates: of the samples and of the grid.
        dimensions: by name and length, that of the samples first.
        attributes: of the variable that is predicted, but for those that say how it is stored.
    """

    coordinates: xr.Dataset
    dimensions: Sequence[tuple[str, int]]
    attributes: Mapping[str, Any]


def _frame(source: Source) -> _Frame:
    """Read the coordinates of a source: those of the grid from the first file, of rows from all.

    Raises:
        DatasetError: if a file cannot be read.
    """
    import xarray as xr

    group, _, leaf = source.variable.strip("/").rpartition("/")
    of_rows: list[xr.Dataset] = []
    first: xr.DataArray | None = None
    for path in source.paths:
        try:
            with xr.open_dataset(path, engine="h5netcdf", group=group or None) as opened:
                variable = opened[leaf]
                rows = variable.dims[source.axis]
                along = [key for key, item in variable.coords.items() if rows in item.dims]
                of_rows.append(variable.coords.to_dataset()[along].load())
                if first is None:
                    # Its values are not read: they may be large.
                    first = variable
                    grid = variable.coords.to_dataset().drop_vars(along).load()
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(f"{path}: its coordinates cannot be read: {error}") from error
    assert first is not None
    sample = str(first.dims[source.axis])
    whole = xr.concat(of_rows, sample, coords="minimal", compat="override")
    coordinates = grid.merge(whole.isel({sample: source.rows}), compat="override")
    dimensions = [(sample, len(source.rows))]
    others = [str(d) for d in first.dims if d != sample]
    taken = dict(zip(others, source.picks, strict=True)) if source.picks else {}
    picked = {d: list(pick) for d, pick in taken.items() if pick is not None}
    coordinates = coordinates.isel({d: pick for d, pick in picked.items() if d in coordinates.dims})
    sizes = {d: len(picked.get(d, range(first.sizes[d]))) for d in others}
    if source.squeeze:
        single = [d for d in others if sizes[d] == 1]
        coordinates = coordinates.squeeze([d for d in single if d in coordinates.dims])
        sizes = {d: size for d, size in sizes.items() if size != 1}
    dimensions += sizes.items()
    if source.leads:
        coordinates = _with_leads(coordinates, whole.get(sample), sample, source)
    if source.has_steps:
        dimensions.insert(1, (LEAD, len(source.leads)))
    kept = {key: value for key, value in first.attrs.items() if key not in _OF_STORAGE}
    return _Frame(coordinates=coordinates, dimensions=dimensions, attributes=kept)


def _with_leads(coordinates: Any, times: xr.DataArray | None, sample: str, source: Source) -> Any:
    """Return coordinates with the lead time, and the time that predictions are valid at.

    Where the times of rows are not equally far apart, a lead is told as a number of rows.
    """
    leads = np.array(source.leads)
    steps = None if times is None or times.size < 2 else np.unique(np.diff(times.values))
    if steps is None or len(steps) != 1:
        values: Any = leads if source.has_steps else leads[0]
        facts = {"long_name": "rows from the sample to the prediction", "units": "1"}
        return coordinates.assign_coords({LEAD: (LEAD if source.has_steps else (), values, facts)})
    lead = leads * steps[0]
    valid = coordinates[sample].values[:, None] + lead
    facts = {"standard_name": "forecast_period", "long_name": "time from the sample on"}
    about = {"standard_name": "time", "long_name": "time that the prediction is for"}
    if not source.has_steps:
        return coordinates.assign_coords(
            {LEAD: ((), lead[0], facts), VALID: (sample, valid[:, 0], about)}
        )
    return coordinates.assign_coords(
        {LEAD: (LEAD, lead, facts), VALID: ((sample, LEAD), valid, about)}
    )
