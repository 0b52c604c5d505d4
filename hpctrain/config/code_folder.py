"""Where the user's own modules are: the current directory, or a snapshot of it.

A job that waits for a day in a queue is to run the code that it was submitted with. So `job
--snapshot` copies the project, and the job's script names the copy: modules come from there, while
data and run folders stay relative to the directory that the job runs in.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hpctrain.errors import ConfigError
from hpctrain.utils.json_files import SMALL, parse_json, read_whole

MARKER = ".hpctrain-snapshot.json"
"""Lies in the root of a snapshot, and says what it is one of."""

_VARIABLE = "HPCTRAIN_CODE"
"""Set by `use_snapshot`, for the processes that a rank starts."""


def code_folder() -> Path:
    """Return the folder whose modules come first."""
    return Path(os.environ.get(_VARIABLE) or Path.cwd())


def snapshot() -> tuple[Path, Path] | None:
    """Return the root of the snapshot in use and of the project it was taken of; None: of none."""
    folder = os.environ.get(_VARIABLE)
    if folder:
        for root in (Path(folder), *Path(folder).parents):
            if (root / MARKER).is_file():
                return root, _project_of(root)
    return None


def use_snapshot(root: Path) -> None:
    """Have modules of the project come from a snapshot, in this process and those it starts.

    Raises:
        ConfigError: if that is no snapshot.
    """
    root = root.resolve()
    project, here = _project_of(root), Path.cwd().resolve()
    folder = root / here.relative_to(project) if here.is_relative_to(project) else root
    os.environ[_VARIABLE] = str(folder)
    kept = []
    for entry in sys.path:
        path = Path(entry or ".").resolve()
        if path == here:  # what `python -m` puts first
            continue
        # Where the project is installed from its folder, or on PYTHONPATH: the copy of that.
        copied = root / path.relative_to(project) if path.is_relative_to(project) else None
        kept.append(str(copied) if copied is not None and copied.is_dir() else entry)
    sys.path[:] = [str(folder), *kept]


def _project_of(root: Path) -> Path:
    try:
        return Path(parse_json(read_whole(root / MARKER, SMALL))["project"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--code {root}: this is no snapshot that `job --snapshot` has made: {error}"
        ) from error
