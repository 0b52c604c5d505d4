"""Coordinates: what the axes of an HDF5 dataset are counted by, such as time, level and latitude.

Asked of an open file, as netCDF-4 keeps them: scales that are attached to an axis, or else an array
of the same name beside the dataset, or above it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.data.coding import coding_of
from hpctrain.data.files.calendars import MISSING, Calendar, Clock, Instants, parse_date
from hpctrain.data.files.global_heaps import require_sound_heap
from hpctrain.data.files.storage import HDF5_FAILURES, read_attribute
from hpctrain.utils.text import listed

Bools = npt.NDArray[np.bool_]


class NoCoordinateError(ValueError):
    """There is no coordinate of a name."""


def find_coordinate(file: h5py.File, dataset: h5py.Dataset, name: str) -> tuple[h5py.Dataset, int]:
    """Return the coordinate of a name, and which axis of a dataset it is of.

    Raises:
        ValueError: if there is none, or it is not clear of which axis it is.
    """
    for number, scale in scales_of(dataset):
        if is_called(scale, name):
            return scale, number
    for group in (dataset.parent, file):
        found = group.get(name)
        if isinstance(found, h5py.Dataset) and found.ndim == 1:
            axes = [each for each in range(dataset.ndim) if dataset.shape[each] == len(found)]
            if len(axes) == 1:
                return found, axes[0]
            raise ValueError(
                f'"{name}" has {len(found)} values, and of its axes {dataset.shape} '
                f"{'none has' if not axes else 'several have'} as many: select by the number of "
                "the axis of a sample, such as select = {0 = [1, 3]}"
            )
    raise ValueError(f'there is no coordinate "{name}" to select by')


def scales_of(dataset: h5py.Dataset) -> Iterator[tuple[int, h5py.Dataset]]:
    """Yield the scales that are attached to a dataset, each with the number of its axis.

    A list of them that is damaged, which would end the process in HDF5's own reading of it, and
    scales that were deleted, are none.
    """
    for number, references in enumerate(_scale_references(dataset)):
        for reference in references:
            scale = None
            with suppress(*HDF5_FAILURES):
                scale = dataset.file[reference]
            if isinstance(scale, h5py.Dataset) and scale.name is not None:
                yield number, scale


_SCALES = "DIMENSION_LIST"
"""Source: HDF5's dimension scales keep in this attribute, by axis, a list of references."""


def _scale_references(dataset: h5py.Dataset) -> Iterable[Iterable[h5py.Reference]]:
    """Return references to the scales of each axis; none where these are not such lists."""
    if _SCALES not in dataset.attrs:
        return ()
    about = dataset.attrs.get_id(_SCALES)
    base = h5py.check_vlen_dtype(about.dtype)
    is_list = base is not None and h5py.check_ref_dtype(np.dtype(base)) is h5py.Reference
    if not is_list or about.shape != (dataset.ndim,):
        return ()
    found: Iterable[Iterable[h5py.Reference]] = read_attribute(dataset.attrs, _SCALES)
    return found


def is_called(scale: h5py.Dataset, name: str) -> bool:
    """Tell whether a scale has this name, or this path."""
    path = str(scale.name).strip("/")
    return path == name.strip("/") or path.rpartition("/")[2] == name


def coordinate_of_rows(dataset: h5py.Dataset, axis: int, name: str, rows: int) -> h5py.Dataset:
    """Return the coordinate by which the rows of a file are counted.

    Args:
        dataset: of a field, in a file that is open.
        axis: of it, which counts the rows, or the values of samples of unequal length.
        name: of the coordinate.
        rows: in the file.

    Raises:
        NoCoordinateError: if there is none such.
        ValueError: if it counts something else.
    """
    others = []
    is_counted = dataset.shape[axis] == rows
    for number, scale in scales_of(dataset) if is_counted else ():
        if is_called(scale, name) and number == axis:
            return scale
        if is_called(scale, name):
            raise ValueError(
                f'"{name}" counts axis {number} of its samples, and not them: take values of it by '
                f"data.fields.NAME.select = {{{name} = [...]}}"
            )
        others.append(str(scale.name).strip("/"))
    group = dataset.parent
    while True:
        found = group.get(name)
        if isinstance(found, h5py.Dataset) and found.ndim <= 1 and found.size == rows:
            return found
        if isinstance(found, h5py.Dataset):
            raise ValueError(
                f'"{name}" has the shape {found.shape}, and there are {rows:,} rows: name what has '
                "one value for each of them"
            )
        if group.name == "/":
            break
        group = group.parent
    known = f"; it has {listed(others)}" if others else ""
    raise NoCoordinateError(f'there is no coordinate "{name}" beside it{known}')


_LATITUDE_UNITS = frozenset(
    f"{degree}{joint}{north}"
    for degree in ("degree", "degrees")
    for joint, north in (("_", "north"), ("_", "N"), ("", "N"))
)
"""Source: the CF conventions, section 4.1."""
_LATITUDE_NAMES = frozenset({"latitude", "lat"})
_FEWEST_LATITUDES = 2
_POLE = 90.0


def latitudes_of(file: h5py.File, dataset: h5py.Dataset) -> tuple[int, npt.NDArray[np.float64]]:
    """Return which axis of a dataset is that of latitude, and its values in degrees. Reads them.

    It is found by the attributes that CF names, or by its own name.

    Raises:
        ValueError: if there is none, or several, or its values are not latitudes of a grid.
    """
    there = list(scales_of(dataset))
    found = [(number, scale) for number, scale in there if _is_latitude(scale)]
    if not found:
        found = list(_latitudes_beside(file, dataset))
    if len(found) != 1:
        names = listed([str(scale.name) for _, scale in (found or there)]) or "no coordinates"
        raise ValueError(
            f"{'none' if not found else 'more than one'} of its coordinates is a latitude of one "
            f'of its axes {dataset.shape} ({names}): it is one by standard_name = "latitude", by '
            'units = "degrees_north", or by its name, latitude or lat'
        )
    ((axis, scale),) = found
    values = np.asarray(scale[()], np.float64)
    if _attribute_text(scale, "units").lower().startswith("rad"):
        values = np.rad2deg(values)
    steps = np.diff(values)
    is_grid = values.ndim == 1 and len(values) >= _FEWEST_LATITUDES
    if not is_grid or not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(f'"{scale.name}" does not go from south to north, or back, on a grid')
    if np.abs(values).max() > _POLE + 1e-3:
        raise ValueError(f'"{scale.name}" goes to {np.abs(values).max():g} degrees')
    return axis, np.clip(values, -_POLE, _POLE)


def _latitudes_beside(file: h5py.File, dataset: h5py.Dataset) -> Iterator[tuple[int, h5py.Dataset]]:
    """Yield arrays beside a dataset, or at the root, that are latitudes of one axis of it."""
    groups = [dataset.parent] if dataset.parent.name == "/" else [dataset.parent, file]
    for group in groups:
        for name in _LATITUDE_NAMES & set(group):
            item = group.get(name)
            if not isinstance(item, h5py.Dataset) or item.ndim != 1 or not _is_latitude(item):
                continue
            axes = [each for each in range(dataset.ndim) if dataset.shape[each] == len(item)]
            if len(axes) == 1:
                yield axes[0], item


def _is_latitude(scale: h5py.Dataset) -> bool:
    standard = _attribute_text(scale, "standard_name")
    if standard:
        return standard == "latitude"
    if _attribute_text(scale, "units") in _LATITUDE_UNITS:
        return True
    return str(scale.name).rpartition("/")[2].lower() in _LATITUDE_NAMES


def _attribute_text(dataset: h5py.Dataset, name: str) -> str:
    return _text(read_attribute(dataset.attrs, name)) if name in dataset.attrs else ""


def latitude_weights(latitudes: npt.NDArray[np.float64], kind: str) -> npt.NDArray[np.float64]:
    """Return how much the values at latitudes count, as parts of the area of a sphere.

    Args:
        latitudes: (latitudes,) degrees, in one direction.
        kind: "cos_latitude": their cosine; "cell_area": that of a cell, whose edges are half way
            between latitudes, and at a pole where there is no room for another one.

    Source: "cell_area" is what WeatherBench 2 does (weatherbench2.metrics.get_lat_weights).
    """
    if kind == "cos_latitude":
        cosines: npt.NDArray[np.float64] = np.cos(np.deg2rad(latitudes)).clip(0)
        return cosines
    middles = (latitudes[1:] + latitudes[:-1]) / 2
    first, last = _edge(latitudes[0], latitudes[1]), _edge(latitudes[-1], latitudes[-2])
    edges = np.concatenate([[first], middles, [last]])
    areas: npt.NDArray[np.float64] = np.abs(np.diff(np.sin(np.deg2rad(edges))))
    return areas


def _edge(end: float, inner: float) -> float:
    """Return the outer edge of the last cell of a grid, whose neighbour is at `inner`."""
    step = abs(end - inner)
    outwards = 1 if end > inner else -1
    return _POLE * outwards if _POLE - end * outwards < step else end + outwards * step / 2


@dataclass(frozen=True, slots=True)
class Values:
    """The values of a coordinate.

    Attributes:
        numbers: (values,) whole microseconds where there is a calendar; else as they are stored,
            or texts.
        calendar: of times; None: they are none.
        is_there: (values,) bool, which of them stand for a value at all.
    """

    numbers: npt.NDArray[Any]
    calendar: Calendar | None
    is_there: Bools

    def __len__(self) -> int:
        return len(self.numbers)

    def grown_to(self, rows: int) -> Values:
        """Return so many values, the further ones missing, as netCDF has what was never written."""
        if rows <= len(self):
            return self
        more = rows - len(self)
        numbers = np.concatenate([self.numbers, np.zeros(more, self.numbers.dtype)])
        return Values(numbers, self.calendar, np.append(self.is_there, np.zeros(more, bool)))

    def only(self, which: Any) -> Values:
        """Return some of them, by index or mask."""
        return Values(self.numbers[which], self.calendar, self.is_there[which])

    def between(self, first: Any, last: Any) -> Bools:
        """Return which values lie between two, both of which belong to it.

        A date stands for all of its time, so that "1979" as the last one is the end of that year.

        Args:
            first: a date, a number or a text, as the values are; "": none.
            last: the same.

        Raises:
            ValueError: if these are no values of such a coordinate, or in the wrong order.
        """
        low, high = self._bounds(first), self._bounds(last)
        if low is not None and high is not None and low.first > high.last:
            raise ValueError(f"begins with {first!r}, which is after {last!r}")
        found: Bools = self.is_there.copy()
        if low is not None:
            found &= self.numbers >= low.first
        if high is not None:
            found &= self.numbers <= high.last
        return found

    def nearest(self, wanted: Any) -> int:
        """Return where the value is that is nearest to another one.

        Raises:
            ValueError: if that is no value of such a coordinate, or nothing is near a text.
        """
        point = self._bounds(wanted)
        if point is None or self.numbers.dtype.kind in "US" or not self.is_there.any():
            raise ValueError(f"has nothing that is near {wanted!r}")
        numbers = self.numbers[self.is_there].astype(np.float64)
        at = int(np.abs(numbers - float(point.first)).argmin())
        return int(np.flatnonzero(self.is_there)[at])

    def text(self, number: Any) -> str:
        """Return one of the values as people read it."""
        return str(number) if self.calendar is None else self.calendar.text(number)

    def ends(self, which: Bools) -> tuple[str, str] | None:
        """Return the least and the largest of some values; None where there are none."""
        own = self.numbers[which & self.is_there]
        if not len(own):
            return None
        if own.dtype.kind in "US":
            own = np.sort(own)
            return str(own[0]), str(own[-1])
        return self.text(own.min()), self.text(own.max())

    def _bounds(self, given: Any) -> Any:
        """Return what a value stands for, from its first to its last; None: it is no bound."""
        if isinstance(given, str) and not given:
            return None
        if self.calendar is not None:
            if not isinstance(given, str):
                raise ValueError(f'has {given!r}, and it holds times: write a date, "1979-01-01"')
            return parse_date(given, self.calendar)
        is_text = self.numbers.dtype.kind in "US"
        if isinstance(given, str) != is_text:
            what = "texts" if is_text else "numbers, in units that give no date"
            raise ValueError(f"has {given!r}, and it holds {what}")
        if self.numbers.dtype.kind == "f":
            # A coordinate of 32 bits holds 0.1 as the nearest number that it has.
            given = self.numbers.dtype.type(given)
        return _Single(given, given)


@dataclass(frozen=True, slots=True)
class _Single:
    """A value that is one point."""

    first: Any
    last: Any


_NEVER_WRITTEN: Mapping[str, float | int] = {
    "i2": -32767,
    "i4": -2147483647,
    "i8": -9223372036854775806,
    "f4": float(np.float32(9.969209968386869e36)),
    "f8": 9.969209968386869e36,
}
"""What netCDF fills times with that were never written. Source: NC_FILL_* of netcdf.h."""


def values_of(coordinate: h5py.Dataset) -> Values:
    """Return the values of a coordinate, decoded as its attributes say. Reads it.

    Raises:
        ValueError: if they cannot be followed.
    """
    require_sound_heap(coordinate)
    stored = np.atleast_1d(np.asarray(coordinate[()]))
    return decoded(stored, _attributes(coordinate))


def decoded(stored: npt.NDArray[Any], said: Mapping[str, Any]) -> Values:
    """Return what stored values stand for, by the attributes of a coordinate.

    Raises:
        ValueError: if they cannot be followed.
    """
    if stored.dtype.kind in "SO":
        texts = np.array([v.decode() if isinstance(v, bytes) else str(v) for v in stored.tolist()])
        return _of_texts(texts)
    if stored.dtype.kind not in "iufb":
        raise ValueError(f"it is {stored.dtype}, and neither numbers, nor times, nor texts")
    numbers = stored.astype(stored.dtype.newbyteorder("="))
    units, calendar = (_text(said.get(key)) for key in ("units", "calendar"))
    # `units` of times would keep the coding from being read.
    coding = coding_of(numbers.dtype, {k: v for k, v in said.items() if k != "units"})
    if coding.problem:
        raise ValueError(coding.problem)
    numbers = numbers.view(coding.view(numbers.dtype))
    missing = coding.is_missing(numbers)
    is_there = np.ones(len(numbers), bool) if missing is None else ~missing
    if coding.is_scaled:
        numbers = coding.decode(numbers, np.dtype(np.float64))
    if numbers.dtype.kind == "f":
        is_there &= ~np.isnan(numbers)
    clock = Clock.of(units, calendar)
    if clock is None:
        return Values(numbers, None, is_there)
    if numbers.dtype == np.int64:  # xarray writes numpy's NaT as it is, and no _FillValue
        is_there &= numbers != MISSING
    if "_FillValue" not in said and numbers.dtype.str[1:] in _NEVER_WRITTEN:
        is_there &= numbers != _NEVER_WRITTEN[numbers.dtype.str[1:]]
    times = clock.times(np.where(is_there, numbers, 0).astype(numbers.dtype))
    times[~is_there] = MISSING
    return Values(times, clock.calendar, is_there)


def joined(parts: Sequence[Values]) -> Values:
    """Return the values of files that follow each other.

    Raises:
        ValueError: if some are times and others not, or they are of different calendars.
    """
    calendars = {part.calendar for part in parts}
    calendar = _common(calendars, parts) if len(calendars) > 1 else parts[0].calendar
    return Values(
        np.concatenate([part.numbers for part in parts]),
        calendar,
        np.concatenate([part.is_there for part in parts]),
    )


_REFORM = parse_date("1582-10-15", Calendar.named("standard")).first


def _common(calendars: set[Calendar | None], parts: Sequence[Values]) -> Calendar:
    """Return one calendar for times in several, which agree on them."""
    names = sorted("none" if each is None else each.name for each in calendars)
    gregorian = {"standard", "proleptic_gregorian"}
    if gregorian.issuperset(names) and all(
        (part.numbers[part.is_there] >= _REFORM).all() for part in parts
    ):
        return Calendar.named("standard")
    raise ValueError(
        f"its calendar is not the same in all files ({', '.join(names)}): name files that have one"
    )


def _of_texts(texts: npt.NDArray[np.str_]) -> Values:
    """Return texts, as times where all of them are dates."""
    is_there = texts != ""
    calendar = Calendar.named("proleptic_gregorian")
    try:
        times = [parse_date(text, calendar) if text else Instants(MISSING, 0) for text in texts]
    except ValueError:
        return Values(texts, None, is_there)
    return Values(np.array([each.first for each in times], np.int64), calendar, is_there)


_SAID = ("units", "calendar", "scale_factor", "add_offset", "_FillValue", "missing_value")


def _attributes(coordinate: h5py.Dataset) -> dict[str, Any]:
    there = coordinate.attrs
    try:
        return {name: read_attribute(there, name) for name in _SAID if name in there}
    except (OSError, TypeError) as error:
        raise ValueError(f"its attributes cannot be read: {error}") from error


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        value = value.ravel()[0] if value.size == 1 else ""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else ""
