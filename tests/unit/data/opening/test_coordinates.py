"""Samples by coordinate: dates of every calendar of CF, against cftime and xarray themselves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import cftime
import h5py
import numpy as np
import pytest
import xarray as xr
from helpers.jobs import here

from hpctrain.config.schema_data import DataSection, FieldTable, SamplesTable, SourceTable
from hpctrain.convert.sources.indexed import Indexed
from hpctrain.data.files.calendars import CALENDARS, Clock, parse_date
from hpctrain.data.opening.open_datasets import (
    open_datasets,
    open_for_evaluation,
    open_for_training,
)
from hpctrain.data.reading.rows import read_rows
from hpctrain.data.view import View
from hpctrain.errors import ConfigError, DatasetError

UNITS = (
    "hours since 1900-01-01 00:00:0.0",
    "days since 0001-01-01",
    "seconds since 1970-01-01T00:00:00Z",
    "minutes since 1850-1-1",
    "days since 2000-02-28 12:00 +05:30",
)
PER_DAY = {"days": 1, "hours": 24, "minutes": 1440, "seconds": 86400}


def _shown(date: Any) -> str:
    """Return a date of cftime as ours are shown."""
    day = f"{date.year:04d}-{date.month:02d}-{date.day:02d}"
    clock = f"{date.hour:02d}:{date.minute:02d}" + (f":{date.second:02d}" if date.second else "")
    return day if clock == "00:00" else f"{day}T{clock}"


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("calendar", CALENDARS)
def test_dates_are_those_of_cftime(calendar: str, units: str) -> None:
    clock = Clock.of(units, calendar)
    assert clock is not None
    per_day = PER_DAY[units.split(maxsplit=1)[0]]
    first = 0 if "0001" in units else -150_000 * per_day
    whole = np.random.default_rng(0).integers(first, 300_000 * per_day, 100)
    for values in (whole, whole.astype(np.float64), whole + 0.25, (whole * 24 // 24) + 1 / 3):
        expected = cftime.num2date(np.rint(values * 24) / 24 if per_day == 1 else values, units,
                                   calendar)  # fmt: skip
        times = clock.times(values)
        shown = [clock.calendar.text(time) for time in times]
        near = [date.replace(microsecond=0) for date in expected + _HALF_A_SECOND]
        assert shown == [_shown(each) for each in near]
        parsed = [parse_date(text, clock.calendar) for text in shown]
        assert all(abs(each.first - time) < 10**6 for each, time in zip(parsed, times, strict=True))


_HALF_A_SECOND = np.timedelta64(500, "ms").astype("timedelta64[us]").item()


@pytest.mark.parametrize(
    ("units", "calendar", "problem"),
    [
        ("months since 1900-01-01", "standard", "months differ in length"),
        ("hours since yesterday", "standard", '"yesterday" is not a date'),
        ("hours since 1900-01-01", "lunar", 'calendar "lunar" is none of standard'),
        ("days since 0000-01-01", "standard", "year 0, which the standard calendar does not have"),
        ("days since 2001-02-29", "noleap", "day 29 of a month of 28 in the noleap calendar"),
    ],
)
def test_units_that_cannot_be_followed(units: str, calendar: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Clock.of(units, calendar)
    assert Clock.of("hPa", "standard") is None


def _write(path: Path, times: Any, **encoding: Any) -> xr.Dataset:
    """Write a file as xarray does; the values of a row are its number, counted from the first."""
    data = np.arange(len(times) * 2, dtype=np.float32).reshape(-1, 2)
    made = xr.Dataset({"t": (("time", "x"), data)}, {"time": times})
    made.to_netcdf(path, engine="h5netcdf", encoding={"time": encoding} if encoding else None)
    return made


def _section(pattern: str, fields: dict[str, FieldTable] | None = None, **samples: Any) -> Any:
    return DataSection(
        train=pattern,
        global_batch_size=4,
        fields=fields or {},
        samples=SamplesTable(**samples),
    )


def _rows(dataset: Any, name: str = "t") -> np.ndarray:
    return read_rows(dataset.select([name]), np.arange(dataset.samples))[name]


RANGES = (
    ("1999", "2000"),
    ("1999-12", "2000-02"),
    ("1999-12-30", "2000-01-02"),
    ("2000-01-01T06", "2000-01-01T12"),
    ("2000-01-01T06:00:00", "2000-01-01T17:59:59"),
    ("", "1999-12-30"),
    ("2000-02-28", ""),
)


@pytest.mark.parametrize(
    ("calendar", "dtype"),
    [
        *((name, "float64") for name in ("julian", "noleap", "all_leap", "360_day")),
        *(("standard", dtype) for dtype in ("int64", "float32")),
        ("proleptic_gregorian", "float64"),
    ],
)
def test_rows_between_dates_are_those_of_xarray(tmp_path: Path, calendar: str, dtype: str) -> None:
    times = xr.date_range("1999-12-01", periods=400, freq="6h", calendar=calendar, use_cftime=True)
    units = ("hours since 1900-01-01 00:00:0.0", "days since 1999-12-01 06:00")
    for number, part in enumerate((slice(0, 150), slice(150, 400))):
        # Files of one dataset may count from other dates.
        encoding = {"units": units[number if dtype != "int64" else 0], "dtype": dtype}
        _write(tmp_path / f"{number}.nc", times[part], calendar=calendar, **encoding)
    coder = xr.coders.CFDatetimeCoder(use_cftime=True)
    opened = [xr.open_dataset(tmp_path / f"{n}.nc", decode_times=coder) for n in (0, 1)]
    whole = xr.concat(opened, "time")
    for first, last in RANGES:
        wanted = whole.sel(time=slice(first or None, last or None)).t.to_numpy()
        section = _section(str(tmp_path / "*.nc"), train={"time": [first, last]})
        train = open_for_training(section, ["t"])
        np.testing.assert_array_equal(_rows(train), wanted, err_msg=f"{first} to {last}")
        assert isinstance(train, View)
        (note,) = train.notes
        assert note.endswith(f"{len(wanted)} rows of 400")


def test_windows_stay_inside_of_their_split_and_file(tmp_path: Path) -> None:
    for year in (1999, 2000, 2001):
        _write(tmp_path / f"{year}.nc", xr.date_range(f"{year}-01-01", f"{year}-12-31"))
    fields = {
        "now": FieldTable(path="t", steps=2),
        "then": FieldTable(path="t", lead=3),
    }
    samples = {
        "train": {"time": ["1999", "2000-06"]},
        "validation": {"time": ["2000-07", "2000"]},
        "test": {"time": ["2001-01-01", "2001-12-31"]},
    }
    section = _section(str(tmp_path / "*.nc"), fields, **samples)
    train, validation = open_datasets(section, ["now", "then"])
    assert validation is not None
    assert (train.samples, validation.samples) == (365 - 3 + 182 - 3, 366 - 182 - 3)
    now, then = (_rows(train, name)[..., 0] / 2 for name in ("now", "then"))
    # A row's value is its day of the year: the last one of a file or split has none behind it.
    np.testing.assert_array_equal(now[:, 0] + 3, then)
    np.testing.assert_array_equal(now[:, 0] + 1, now[:, 1])
    assert then[:362].max() == 364
    assert then[362:].max() == 181
    last = _rows(validation, "then")[..., 0] / 2
    assert (last.min(), last.max()) == (182 + 3, 365)
    assert isinstance(train, View)
    assert train.notes == ("train: time 1999-01-01 to 2000-06-30, 547 rows of 1,096",)
    other = _section(str(tmp_path / "*.nc"), fields, train={"time": ["1999", "2000-05"]})
    assert open_for_training(other, ["now"]).fingerprint != train.fingerprint


@pytest.mark.parametrize("other", ["validation", "test"])
def test_splits_that_overlap_are_refused(tmp_path: Path, other: str) -> None:
    _write(tmp_path / "a.nc", xr.date_range("2014-01-01", "2016-12-31"))
    pattern = str(tmp_path / "a.nc")
    given = {"train": {"time": ["2014", "2015"]}, other: {"time": ["2015-12-31", "2016"]}}
    with pytest.raises(ConfigError, match=rf"train and {other} have 1 row in common, time 2015-12"):
        open_for_training(_section(pattern, **given), ["t"])
    given[other] = {"time": ["2015", "2015"]}
    with pytest.raises(ConfigError, match="365 rows in common, time 2015-01-01 to 2015-12-31"):
        open_for_training(_section(pattern, **given), ["t"])
    given[other] = {"time": ["2016", "2016"]}
    assert open_for_training(_section(pattern, **given), ["t"]).samples == 730
    # Whoever names the files again means it.
    named = DataSection(
        train=pattern,
        validation=pattern,
        test=pattern,
        global_batch_size=4,
        samples=SamplesTable(train={"time": ["2014", "2015"]}, validation={"time": ["2015", ""]}),
    )
    assert open_for_training(named, ["t"]).samples == 730
    assert open_for_evaluation(named, ["t"]).samples == 731  # type: ignore[union-attr]


def test_several_ranges_and_several_coordinates(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(10, dtype=np.float32)
        file["level"] = np.array([0.1, 0.2, 0.3, 0.4, 0.5] * 2, np.float32)
        file["group/run"] = np.arange(10)
        file["group/y"] = np.arange(10)
        file["name"] = np.array([b"a", b"b", b"c", b"d", b"e"] * 2)
        file["when"] = [f"2000-01-{day:02d}" for day in range(1, 11)]

    def found(fields: str = "x", **train: Any) -> list[float]:
        section = _section(str(path), {"f": FieldTable(path=fields)}, train=train)
        return _rows(open_for_training(section, ["f"]), "f").tolist()

    assert found(level=[0.1, 0.3]) == [0, 1, 2, 5, 6, 7]
    assert found(level=[["", 0.1], [0.4, 0.45]]) == [0, 3, 5, 8]
    assert found("group/y", run=[2, 3]) == [2, 3]
    assert found("group/y", run=[2, 8], level=[0.2, 0.2]) == [6]
    assert found(name=["b", "c"]) == [1, 2, 6, 7]
    assert found(when=["2000-01-03", "2000-01-04"]) == [2, 3]


def test_descending_unordered_and_double_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    days = xr.date_range("2000-01-01", periods=20)
    double = days[[*range(10), 9, *range(10, 20)]]
    for name, times in (("down", days[::-1]), ("mixed", days[[*range(10, 20), *range(10)]]),
                        ("double", double), ("gap", days[[*range(5), *range(9, 20)]])):  # fmt: skip
        _write(tmp_path / f"{name}.nc", times)

    def opened(name: str, lead: int) -> Any:
        fields = {"t": FieldTable(lead=lead)} if lead else {}
        chosen = {"time": ["2000-01-03", "2000-01-18"]}
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            return open_for_training(
                _section(str(tmp_path / f"{name}.nc"), fields, train=chosen), ["t"]
            )

    whole = (
        xr.open_dataset(tmp_path / "down.nc")
        .sortby("time")
        .sel(time=slice("2000-01-03", "2000-01-18"))[{"time": slice(None, None, -1)}]
    )
    np.testing.assert_array_equal(_rows(opened("down", 0)), whole.t)
    assert not caplog.text
    np.testing.assert_array_equal(_rows(opened("down", 2)), whole.t[2:])
    assert 'coordinate "time" descends' in caplog.text
    assert opened("mixed", 0).samples == 16
    # From the last row of the later part to the first of the earlier one none is wanted: no window.
    assert opened("mixed", 1).samples == 14
    np.testing.assert_array_equal(_rows(opened("double", 0))[:, 0] / 2, [*range(2, 19)])
    assert "1 row with the same value as the row before, the first one of 2000-01-10" in caplog.text
    with pytest.raises(DatasetError, match=r"goes from 2000-01-10 \(row 9\) to 2000-01-10, not as"):
        opened("double", 1)
    assert opened("gap", 1).samples == 11
    assert "reach over 1 gap, the first one from 2000-01-05 to 2000-01-10" in caplog.text


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    _write(tmp_path / "a.nc", xr.date_range("2000", periods=5, calendar="360_day", use_cftime=True))
    pattern = str(tmp_path / "a.nc")
    for train, error, problem in (
        ({"time": ["2010", "2011"]}, DatasetError, 'no row is there: "time" has 2000-01-01 to 20'),
        ({"time": ["2001", "2000"]}, ConfigError, "begins with '2001', which is after '2000'"),
        ({"time": ["2000-01-31", ""]}, ConfigError, "day 31 of a month of 30 in the 360_day"),
        ({"time": [0, 5]}, ConfigError, "has 0, and it holds times: write a date"),
        ({"x": [0, 1]}, DatasetError, '"x" counts axis 1 of its samples, and not them: take val'),
        ({"tiem": [0, 1]}, DatasetError, 'there is no coordinate "tiem" beside it'),
    ):
        with pytest.raises(error, match=problem):
            open_for_training(_section(pattern, train=train), ["t"])
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["t"] = np.zeros((5, 2), np.float32)
        file["time"] = np.zeros(4)
    with pytest.raises(DatasetError, match=r"has the shape \(4,\), and there are 5 rows"):
        open_for_training(_section(str(tmp_path / "b.h5"), train={"time": [0, 1]}), ["t"])


def test_calendars_of_files_have_to_agree(tmp_path: Path) -> None:
    for name, first, calendar in (
        ("a0", "2000", "gregorian"),
        ("a1", "2001", "proleptic_gregorian"),
        ("b0", "2000", "noleap"),
        ("b1", "2001", "360_day"),
    ):
        times = xr.date_range(first, periods=5, calendar=calendar, use_cftime=True)
        _write(tmp_path / f"{name}.nc", times)
    section = _section(str(tmp_path / "a*.nc"), train={"time": ["2000-01-04", "2001-01-02"]})
    assert open_for_training(section, ["t"]).samples == 4
    section = _section(str(tmp_path / "b*.nc"), train={"time": ["2000", "2001"]})
    with pytest.raises(DatasetError, match=r"not the same in all files \(360_day, nolea"):
        open_for_training(section, ["t"])


def test_missing_times_and_joined_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    times = xr.date_range("2000-01-01", periods=6).to_numpy().copy()
    _write(tmp_path / "y.nc", times + np.timedelta64(1, "D"))
    times[2] = np.datetime64("NaT")
    _write(tmp_path / "x.nc", times)
    fields = {"t": FieldTable(), "y": FieldTable(path="t", train=str(tmp_path / "y.nc"))}
    section = _section(str(tmp_path / "x.nc"), fields, train={"time": ["2000-01-02", "2000-01-04"]})
    found = open_for_training(section, ["y", "t"])
    np.testing.assert_array_equal(_rows(found)[:, 0] / 2, [1, 3])
    assert 'row 0 has "time" 2000-01-01 in' in caplog.text


def test_times_since_other_dates_are_not_packed_as_if_since_one(tmp_path: Path) -> None:
    for year in (2000, 2001):
        times = xr.date_range(f"{year}-01-01", periods=3)
        units = {"units": f"days since {year}-01-01"}
        data = np.arange(6, dtype=np.float32).reshape(3, 2)
        made = xr.Dataset({"t": (("time", "x"), data)}, {"time": times})
        made.to_netcdf(tmp_path / f"{year}.nc", engine="h5netcdf", encoding={"time": units})
    said = here(tmp_path, "data", "pack", "200?.nc", "packed", code=65)
    assert 'field "time" is in' in said
    assert "days since 2000-01-01" in said
    with pytest.raises(DatasetError, match='field "time" is in'):
        Indexed.open(str(tmp_path / "200?.nc"))
    assert Indexed.open(str(tmp_path / "200?.nc"), ["t"]).samples == 6


def test_mixed_sources_by_date(tmp_path: Path) -> None:
    for name in "ab":
        _write(tmp_path / f"{name}.nc", xr.date_range("2000-01-01", periods=9))
    sources = (
        SourceTable(name="a", train=str(tmp_path / "a.nc"), weight=0.5),
        SourceTable(
            name="b",
            train=str(tmp_path / "b.nc"),
            weight=0.5,
            samples={"time": ["2000-01-02", "2000-01-03"]},
        ),
    )
    section = DataSection(
        sources=sources,
        global_batch_size=4,
        samples=SamplesTable(
            train={"time": ["2000-01-01", "2000-01-05"]},
            validation={"time": ["2000-01-06", ""]},
        ),
    )
    train, validation = open_datasets(section, ["t"])
    assert validation is not None
    assert (train.samples, validation.samples) == (7, 8)
    assert isinstance(train, View)
    assert train.notes[1] == "b: train: time 2000-01-02 to 2000-01-03, 2 rows of 9"
