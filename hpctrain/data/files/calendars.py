"""Times by the CF conventions: calendars, units such as "hours since 1900-01-01", partial dates.

Pure arithmetic. A time is a whole number of microseconds since the first day of a calendar, so that
files with other units and other reference dates are compared exactly.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Int64s

MISSING = np.iinfo(np.int64).min
"""In place of a time that is not there."""
SECOND = 10**6
DAY = 86_400 * SECOND
_MOST_DAYS = 10**8
"""From the first day of a calendar: more do not fit into 64 bits."""

_MONTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_LEAP_MONTHS = (31, 29, *_MONTHS[2:])
_EQUAL_MONTHS = (30,) * 12

Date = tuple[int, int, int]
"""Year, month and day, from 1."""


@dataclass(frozen=True, slots=True)
class _Years:
    """A calendar that is regular from its first year to its last.

    Attributes:
        is_leap: whether a year is one.
        before: days from the beginning of year 0 to that of a year.
        usual: days of the months of a usual year.
        leap: those of a leap year.
    """

    is_leap: Callable[[int], bool]
    before: Callable[[int], int]
    usual: tuple[int, ...] = _MONTHS
    leap: tuple[int, ...] = _LEAP_MONTHS

    def months(self, year: int) -> tuple[int, ...]:
        """Return the days of each month of a year."""
        return self.leap if self.is_leap(year) else self.usual

    def day(self, date: Date) -> int:
        """Return the number of a date's day."""
        year, month, day = date
        return self.before(year) + sum(self.months(year)[: month - 1]) + day - 1

    def date(self, day: int) -> Date:
        """Return the date of a day."""
        year = day // 366
        while self.before(year + 1) <= day:
            year += max(1, (day - self.before(year)) // 366)
        within = day - self.before(year)
        stops = list(accumulate(self.months(year)))
        month = bisect_right(stops, within)
        return year, month + 1, within - (stops[month - 1] if month else 0) + 1


_JULIAN = _Years(lambda year: year % 4 == 0, lambda year: 365 * year + (year + 3) // 4)
_GREGORIAN = _Years(
    lambda year: year % 4 == 0 and (year % 100 != 0 or year % 400 == 0),
    lambda year: 365 * year + (year + 3) // 4 - (year + 99) // 100 + (year + 399) // 400,
)
_NEVER_LEAP = _Years(lambda year: False, lambda year: 365 * year)
_ALWAYS_LEAP = _Years(lambda year: True, lambda year: 366 * year)
_OF_360_DAYS = _Years(lambda year: False, lambda year: 360 * year, _EQUAL_MONTHS)

_REFORM: Date = (1582, 10, 15)
"""First day of the Gregorian calendar; the day before was the 4th."""
_REFORM_DAY = _GREGORIAN.day(_REFORM)
_BEFORE_REFORM = _REFORM_DAY - _JULIAN.day((1582, 10, 5))


class _Mixed:
    """The Julian calendar up to 1582-10-04, and the Gregorian one from the next day on."""

    def months(self, year: int) -> tuple[int, ...]:
        """Return the days of each month of a year; those that were left out count."""
        return _JULIAN.months(year) if year <= _REFORM[0] else _GREGORIAN.months(year)

    def day(self, date: Date) -> int:
        """Return the number of a date's day.

        Raises:
            ValueError: if the date was left out.
        """
        if date >= _REFORM:
            return _GREGORIAN.day(date)
        if date > (1582, 10, 4):
            raise ValueError("is none of the standard calendar, in which 1582-10-15 follows 10-04")
        return _JULIAN.day(date) + _BEFORE_REFORM

    def date(self, day: int) -> Date:
        """Return the date of a day."""
        return _GREGORIAN.date(day) if day >= _REFORM_DAY else _JULIAN.date(day - _BEFORE_REFORM)


_CALENDARS: dict[str, _Years | _Mixed] = {
    "standard": _Mixed(),
    "gregorian": _Mixed(),
    "proleptic_gregorian": _GREGORIAN,
    "julian": _JULIAN,
    "noleap": _NEVER_LEAP,
    "365_day": _NEVER_LEAP,
    "all_leap": _ALWAYS_LEAP,
    "366_day": _ALWAYS_LEAP,
    "360_day": _OF_360_DAYS,
}
CALENDARS = tuple(_CALENDARS)
"""By CF's names; the standard one is the default."""
_SAME = {"gregorian": "standard", "365_day": "noleap", "366_day": "all_leap"}
_WITHOUT_YEAR_0 = frozenset({"standard", "julian"})


class Calendar(NamedTuple):
    """How days are counted; what has the same name has the same days."""

    name: str

    @classmethod
    def named(cls, name: str) -> Calendar:
        """Return a calendar by its CF name.

        Raises:
            ValueError: if there is none such.
        """
        known = name.strip().lower()
        if known not in _CALENDARS:
            raise ValueError(f'calendar "{name}" is none of {", ".join(CALENDARS)}')
        return cls(_SAME.get(known, known))

    def day(self, date: Date) -> int:
        """Return the number of a date's day.

        Raises:
            ValueError: if the calendar has no such date.
        """
        year, month, day = date
        days = _CALENDARS[self.name]
        if year == 0 and self.name in _WITHOUT_YEAR_0:
            raise ValueError(f"has the year 0, which the {self.name} calendar does not have")
        if not 1 <= month <= 12:
            raise ValueError(f"has the month {month}")
        if not 1 <= day <= (longest := days.months(year)[month - 1]):
            raise ValueError(f"has day {day} of a month of {longest} in the {self.name} calendar")
        return days.day(date)

    def text(self, time: int) -> str:
        """Return a time as people read it: the date alone at midnight, else to the second."""
        day, within = divmod(int(time) + SECOND // 2, DAY)
        year, month, number = _CALENDARS[self.name].date(day)
        date = f"{year:04d}-{month:02d}-{number:02d}"
        seconds = within // SECOND
        if not seconds:
            return date
        clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}"
        return f"{date}T{clock}" + (f":{seconds % 60:02d}" if seconds % 60 else "")


_DATE = re.compile(
    r"(?P<year>[+-]?\d{1,6})(-(?P<month>\d{1,2})(-(?P<day>\d{1,2})"
    r"((T|\s+)(?P<hour>\d{1,2})(:(?P<minute>\d{1,2})(:(?P<second>\d{1,2})"
    r"(\.(?P<fraction>\d*))?)?)?)?)?)?"
    r"(\s*(?P<zone>Z|UTC|GMT|[+-]\d{1,2}(:?\d{2})?))?",
    re.IGNORECASE | re.ASCII,
)


class Instants(NamedTuple):
    """The time that a date stands for, from its first microsecond to its last."""

    first: int
    last: int


def parse_date(text: str, calendar: Calendar) -> Instants:
    """Return the time that a date stands for: "1979" is a year, "1979-01-01T06" is an hour.

    Raises:
        ValueError: if it is none of the calendar.
    """
    found = _DATE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f'"{text}" is not a date such as "1979", "1979-01" or "1979-01-01T06:00"')
    part = found.groupdict()
    year, month = int(part["year"]), int(part["month"] or 1)
    clock = [int(part[key] or 0) for key in ("hour", "minute", "second")]
    if clock[0] > 23 or clock[1] > 59 or clock[2] > 59:
        raise ValueError(f'"{text}" has a time of day that there is not')
    try:
        first = calendar.day((year, month, int(part["day"] or 1))) * DAY
        if part["month"] is None:
            stop = calendar.day((_after(year, calendar), 1, 1)) * DAY
        elif part["day"] is None:
            then = (year, month + 1, 1) if month < 12 else (_after(year, calendar), 1, 1)
            stop = calendar.day(then) * DAY
        else:
            first += (clock[0] * 3600 + clock[1] * 60 + clock[2]) * SECOND
            stop = first + _precision(part)
    except ValueError as error:
        raise ValueError(f'"{text}" {error}') from None
    if part["fraction"]:
        first += int(part["fraction"][:6].ljust(6, "0"))
        stop = first + 1
    shift = _zone(part["zone"])
    return Instants(first - shift, stop - 1 - shift)


def _after(year: int, calendar: Calendar) -> int:
    return 1 if year == -1 and calendar.name in _WITHOUT_YEAR_0 else year + 1


def _precision(part: dict[str, str | None]) -> int:
    """Return how long that lasts which a date is precise to."""
    if part["hour"] is None:
        return DAY
    if part["minute"] is None:
        return 3600 * SECOND
    return 60 * SECOND if part["second"] is None else SECOND


def _zone(zone: str | None) -> int:
    """Return by how much a clock is ahead of UTC."""
    if zone is None or zone[0] not in "+-":
        return 0
    digits = zone[1:].replace(":", "")
    hours, minutes = (digits, "0") if len(digits) <= 2 else (digits[:-2], digits[-2:])
    seconds = int(hours) * 3600 + int(minutes) * 60
    return (-seconds if zone[0] == "-" else seconds) * SECOND


_UNITS = re.compile(r"\s*([A-Za-z_]+)\s+since\s+(.*\S)\s*", re.IGNORECASE | re.ASCII)
_NANOSECOND = "nanosecond"
_LENGTHS: dict[int, tuple[str, ...]] = {
    1: ("microsecond", "microsec", "us"),
    1000: ("millisecond", "millisec", "msec", "ms"),
    SECOND: ("second", "sec", "s"),
    60 * SECOND: ("minute", "min"),
    3600 * SECOND: ("hour", "hr", "h"),
    DAY: ("day", "d"),
    7 * DAY: ("week",),
}
_UNIT_LENGTHS = {
    name + plural: length
    for length, names in _LENGTHS.items()
    for name in names
    for plural in ("", "s")
}


@dataclass(frozen=True, slots=True)
class Clock:
    """What the numbers of a time coordinate stand for.

    Attributes:
        calendar: of the dates.
        unit: microseconds of 1.
        divisor: how many units of that 1 microsecond has, of nanoseconds.
        start: the time of 0.
    """

    calendar: Calendar
    unit: int
    start: int
    divisor: int = 1

    @classmethod
    def of(cls, units: str, calendar: str) -> Clock | None:
        """Return what attributes say; None: the units are none of times.

        Raises:
            ValueError: if they are, and cannot be followed.
        """
        found = _UNITS.fullmatch(units)
        if found is None:
            return None
        known = Calendar.named(calendar or "standard")
        word = found[1].lower()
        unit, divisor = _UNIT_LENGTHS.get(word, 0), 1
        if word.rstrip("s") in (_NANOSECOND, "nanosec", "n"):
            unit, divisor = 1, 1000
        elif word in ("month", "months") and known.name == "360_day":
            unit = 30 * DAY
        elif word in ("common_year", "common_years") and known.name == "noleap":
            unit = 365 * DAY
        if not unit:
            raise ValueError(
                f'units "{units}": {word} differ in length, or are not units of time; expected '
                "seconds, minutes, hours or days"
            )
        return cls(known, unit, parse_date(found[2], known).first, divisor)

    def times(self, values: npt.NDArray[Any]) -> Int64s:
        """Return the times of numbers, MISSING where one is NaN.

        Raises:
            ValueError: if one is too far away for 64 bits.
        """
        if values.dtype.kind in "iub":
            if len(values) and np.abs(values.astype(np.float64)).max() * self.unit > _MOST:
                raise ValueError("it holds times that are millions of years away")
            whole: Int64s = values.astype(np.int64) * self.unit // self.divisor + self.start
            return whole
        exact = values.astype(np.float64)
        there = np.isfinite(exact)
        kept = np.where(there, exact, 0.0)
        if len(kept) and np.abs(kept).max() * self.unit > _MOST:
            raise ValueError("it holds times that are millions of years away")
        full = np.floor(kept)
        within = np.rint((kept - full) * self.unit)
        made = (full.astype(np.int64) * self.unit + within.astype(np.int64)) // self.divisor
        # A third of a day is no float: what is a second but for that is the second.
        coarse = np.spacing(np.abs(np.where(there, values, 0))).astype(np.float64) * self.unit
        seconds = (made + SECOND // 2) // SECOND * SECOND
        near = np.abs(made - seconds) <= coarse / self.divisor
        times: Int64s = np.where(near, seconds, made) + self.start
        times[~there] = MISSING
        return times


_MOST = _MOST_DAYS * DAY
