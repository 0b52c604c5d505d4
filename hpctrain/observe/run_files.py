"""A run by what its folder holds, for those who look at it from outside. Reads only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

from hpctrain.observe.goodput import Goodput, end_of_outcome, goodput, read_phases
from hpctrain.observe.job_record import JobTime
from hpctrain.observe.machine_log import energy_of, read_hosts, signs_of_life
from hpctrain.utils.json_files import SMALL, parse_json, read_whole

BEAT_SECONDS = 90.0
"""A lease that was renewed within this time is that of a job that runs."""


def read_object(path: Path) -> dict[str, Any]:
    """Return a small JSON object, empty where there is none that can be read."""
    try:
        document = parse_json(read_whole(path, SMALL))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def heartbeat(run: Path) -> float | None:
    """Return when a job renewed its lease on a run for the last time; None: none holds it."""
    try:
        return (run / "lease.json").stat().st_mtime
    except OSError:
        return None


def runs_now(run: Path, lives: bool | None = None, clock: Callable[[], float] = time.time) -> bool:
    """Tell whether a job runs on a folder.

    Args:
        run: the folder.
        lives: whether its process lives; None: that cannot be told from here, and its heartbeat is
            to say it.
        clock: seconds since 1970.
    """
    if lives is not None or read_object(run / "exit.json").get("code") is not None:
        return bool(lives)
    beat = heartbeat(run)
    return beat is not None and clock() - beat < BEAT_SECONDS


def goodput_of(run: Path, *, runs: bool | None = None) -> Goodput | None:
    """Return what came of a run's seconds; None where its jobs have noted nothing.

    Args:
        run: its folder.
        runs: whether a job runs, see `runs_now`.
    """
    outcome = read_object(run / "exit.json")
    beat = heartbeat(run)
    return goodput(
        read_phases(run),
        signs_of_life=lambda: [*signs_of_life(run), *([] if beat is None else [beat])],
        end=_end(outcome),
        now=time.time() if runs_now(run, runs) else None,
    )


def energy_of_run(run: Path, jobs: Sequence[JobTime]) -> dict[str, Any] | None:
    """Return the energy of a run and of each of its jobs, in kWh; None where none was measured.

    Args:
        run: its folder.
        jobs: of the run, by number.
    """
    hosts = read_hosts(run)
    whole = energy_of(hosts)
    if whole is None:
        return None
    used = 0.0 if any(job.end is None for job in jobs) else sum(job.node_seconds for job in jobs)
    # A job's last line is written as it ends, its record's time is in whole seconds.
    ends = [*(job.begin for job in jobs[1:]), inf]
    of_jobs = {}
    for job, end in zip(jobs, ends, strict=True):
        found = energy_of(hosts, job.begin, end)
        of_jobs[str(job.number)] = None if found is None else found.to_json(None)["kwh"]
    return {**whole.to_json(used or None), "jobs": of_jobs}


def _end(outcome: Mapping[str, Any]) -> tuple[int, str, float] | None:
    code = outcome.get("code")
    if not isinstance(code, int):
        return None
    with suppress(TypeError):
        return end_of_outcome(code, str(outcome.get("reason")), str(outcome.get("time")))
    return None
