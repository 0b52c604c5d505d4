"""What a job that ends badly leaves in the run folder: crash-rank-N.json, and the end in exit.json.

Standard library only: the watchdog writes these for ranks that no longer can.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hpctrain.batch.exit_status import Outcome, conclude, read_outcome
from hpctrain.errors import CheckpointError
from hpctrain.utils.batch_job import job_identity
from hpctrain.utils.files import replace_file
from hpctrain.version import __version__


def write_report(
    folder: Path,
    *,
    rank: int,
    host: str,
    code: int,
    story: str,
    step: int | None,
    about: Mapping[str, object],
) -> None:
    """Write the crash report of a rank, and into exit.json how the job ended.

    A folder that cannot be written is told on stderr: nothing may raise on the way out.

    Args:
        folder: of the run.
        rank: the one that failed.
        host: its node.
        code: exit code of the job.
        story: what the user was told.
        step: the last one that the rank finished; None if it is not known.
        about: more of the rank: its device, versions.
    """
    report = {
        "rank": rank,
        "host": host,
        "step": step,
        "code": code,
        "traceback": story,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **about,
    }
    path = folder / f"crash-rank-{rank}.json"
    reason = f"rank {rank} on {host} failed: see {path.name}"
    try:
        replace_file(path, (json.dumps(report, indent=2) + "\n").encode())
        write_ending(folder, code, reason)
    except OSError as error:
        sys.stderr.write(f"hpctrain: no crash report: {error}\n")


def write_ending(folder: Path, code: int, reason: str) -> None:
    """Write into exit.json that the job failed, if it says that this job runs."""
    try:
        running = read_outcome(folder)
        if running is not None and running.code is None and _is_of_this_job(running):
            conclude(folder, replace(running, code=code, reason=reason))
    except CheckpointError as error:
        sys.stderr.write(f"hpctrain: {error}\n")


def _is_of_this_job(outcome: Outcome) -> bool:
    """Tell whether a word is of the job of this process, as far as its environment tells.

    The next job may have begun while this one finds out how it ended.
    """
    here = job_identity(os.environ)
    return here is None or outcome.job in (None, here)


def versions() -> dict[str, str | None]:
    """Return the versions of what is loaded in this process."""
    torch = sys.modules.get("torch")
    return {
        "hpctrain": __version__,
        "python": platform.python_version(),
        "torch": None if torch is None else str(torch.__version__),
    }
