"""The period that the times of a netCDF file cover, by the CF conventions.

Source: https://cfconventions.org, section 4.4.
"""

from __future__ import annotations

import datetime
import re

import h5py

from hpctrain.data.finding.attributes import text_attribute
from hpctrain.data.storage import HDF5_FAILURES

_UNITS = re.compile(r"\s*(\w+?)s?\s+since\s+(\S+(?:\s+[\d:.]+)?)", re.IGNORECASE)
_SECONDS = {
    **dict.fromkeys(("second", "sec", "s"), 1.0),
    **dict.fromkeys(("minute", "min"), 60.0),
    **dict.fromkeys(("hour", "hr", "h"), 3600.0),
    **dict.fromkeys(("day", "d"), 86400.0),
}
_REAL_CALENDARS = ("", "standard", "gregorian", "proleptic_gregorian")


def covered(first: h5py.Dataset, last: h5py.Dataset) -> str | None:
    """Return the period of files that follow each other, in words; None: these are no times.

    Args:
        first: the times in the first file, which is open.
        last: those in the last one; it may be the same.
    """
    units = [text_attribute(each, "units") for each in (first, last)]
    if not all(map(_UNITS.match, units)):
        return None
    calendar = text_attribute(first, "calendar")
    try:
        if not all(each.ndim == 1 and len(each) for each in (first, last)):
            return f"times in {units[0]}, {calendar or 'standard'} calendar"
        ends = float(first[0]), float(last[-1])
    except HDF5_FAILURES:
        return f"times in {units[0]}, {calendar or 'standard'} calendar"
    begin, end = (_date(end, each, calendar) for end, each in zip(ends, units, strict=True))
    return f"{begin} to {end}, {calendar or 'standard'} calendar"


def _date(value: float, units: str, calendar: str) -> str:
    """Return a time as a date, or as it is where Python's calendar does not reach."""
    found = _UNITS.match(units)
    assert found is not None
    as_it_is = f"{value:g} {units}"
    seconds = _SECONDS.get(found[1].lower())
    if seconds is None or calendar.lower() not in _REAL_CALENDARS:
        return as_it_is
    try:
        start = datetime.datetime.fromisoformat(_padded(found[2].rstrip("Z")))
        date = start.replace(tzinfo=None) + datetime.timedelta(seconds=value * seconds)
    except (ValueError, OverflowError):
        return as_it_is
    return date.isoformat(" ", "minutes")


def _padded(date: str) -> str:
    """Return "1900-1-1 0:0:0.0" as ISO 8601 has it."""
    day, _, time = date.replace("T", " ").partition(" ")
    year, *rest = day.split("-")
    padded = "-".join([year.zfill(4), *(part.zfill(2) for part in rest)])
    if not time:
        return padded
    clock = [part.zfill(2) for part in time.split(".")[0].split(":")]
    return f"{padded} {':'.join([*clock, '00'][: max(2, len(clock))])}"
