"""The time that a job has left, from what schedulers print. Pure functions of text and clock."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from hpctrain.errors import ConfigError

Answer = float | None
"""Seconds left, infinite where a job has no limit; None where the text does not tell."""

_SLURM = re.compile(r"(?:(?P<days>\d+)-)?(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)")
_LSF = re.compile(r"(?P<hours>\d+):(?P<minutes>\d+)(?::(?P<seconds>\d+))?(?:\s*(?P<status>[LEX]))?")
_CLOCK = re.compile(r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)")

_FIRST_UNIX_TIME = 1e9
"""September 2001: a larger number is a date, a smaller one a length of time."""


def from_squeue(text: str, _now: float = 0.0) -> Answer:
    """Read `squeue -h -o %L`: "1-02:03:04", "59:58", "UNLIMITED", "INVALID"."""
    word = text.strip()
    if word == "UNLIMITED":
        return math.inf
    return _seconds(_SLURM.fullmatch(word))


def from_bjobs(text: str, _now: float = 0.0) -> Answer:
    """Read `bjobs -noheader -o time_left`: "1:59 L", or "01:59:59 L" under LSB_HMS_TIME_FORMAT.

    L is a limit, E an estimate that LSF enforces no more than X, one that is exceeded; "-" is a job
    without any.

    Source: IBM Spectrum LSF 10.1, command reference, bjobs -WL.
    """
    word = text.strip()
    if word == "-":
        return math.inf
    match = _LSF.fullmatch(word)
    return None if match is None or match["status"] in ("E", "X") else _seconds(match)


def from_qstat(text: str, now: float) -> Answer:
    """Read `qstat -f -F json JOB`: the limit, less the time since the start.

    `resources_used.walltime` is some minutes old on many sites and does not count suspensions;
    `stime` is exact. The one that leaves less time counts.
    """
    try:
        # OpenPBS 19 writes numbers such as 007 and control characters into values of -v.
        job = next(iter(json.loads(text, strict=False)["Jobs"].values()))
        limit = _seconds(_CLOCK.fullmatch(job["Resource_List"]["walltime"]))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
        return _from_damaged_qstat(text)
    if limit is None:
        return None
    used = _seconds(_CLOCK.fullmatch(str(_walltime_used(job))))
    since = _since(str(job.get("stime", "")), now)
    known = [value for value in (used, since) if value is not None]
    return limit - max(known) if known else None


def _walltime_used(job: Mapping[str, Any]) -> object:
    used = job.get("resources_used")
    return used.get("walltime") if isinstance(used, dict) else None


def _from_damaged_qstat(text: str) -> Answer:
    """Read the two times alone: variables of the job can make PBS's JSON invalid."""
    times = re.findall(r'"walltime"\s*:\s*"(\d+:\d+:\d+)"', text)
    if len(times) != 2:
        return None
    # resources_used and Resource_List come in either order; the limit is the longer one.
    one, other = (_seconds(_CLOCK.fullmatch(item)) or 0.0 for item in times)
    return abs(one - other)


def _since(started: str, now: float) -> float | None:
    try:
        then = time.mktime(time.strptime(started, "%a %b %d %H:%M:%S %Y"))
    except (ValueError, OverflowError):
        return None
    return max(0.0, now - then)


def from_user(text: str, began: float) -> float:
    """Return the end in Unix time that HPCTRAIN_DEADLINE names.

    Args:
        text: an ISO time ("2026-11-21T18:00", local unless it has a zone), a Unix time, or the
            seconds that the job may take from its beginning.
        began: when this process began, Unix time.

    Raises:
        ConfigError: if it is none of these.
    """
    word = text.strip()
    try:
        number = float(word)
    except ValueError:
        pass
    else:
        if math.isfinite(number) and number > 0:
            return number if number >= _FIRST_UNIX_TIME else began + number
    try:
        # Python 3.10 reads no "Z".
        return datetime.fromisoformat(re.sub(r"Z$", "+00:00", word)).timestamp()
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"HPCTRAIN_DEADLINE={text!r} is no time: give an ISO time (2026-11-21T18:00), a Unix "
            "time, or seconds from the start of the job"
        ) from error


def _seconds(match: re.Match[str] | None) -> Answer:
    if match is None:
        return None
    parts = {name: int(value or 0) for name, value in match.groupdict().items() if name != "status"}
    minutes = (parts.get("days", 0) * 24 + parts.get("hours", 0)) * 60 + parts["minutes"]
    return 60.0 * minutes + parts["seconds"]
