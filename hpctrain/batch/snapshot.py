"""A copy of the user's code as it is when a job is submitted, for the job to run from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from hpctrain.config.importing import MARKER
from hpctrain.errors import UsageError
from hpctrain.utils.files import temporary_name
from hpctrain.utils.json_files import SMALL, parse_json, read_whole
from hpctrain.utils.text import first_lines, size

_FOLDER = "code"
MOST_BYTES = 200 * 10**6

_DATA = {
    *(".h5", ".hdf5", ".he5", ".nc", ".npy", ".npz", ".zarr", ".parquet", ".tfrecord"),
    *(".pt", ".pth", ".ckpt", ".safetensors", ".sif", ".tar", ".gz", ".zip", ".mp4"),
}
"""Suffixes of what no module is: it stays where it is, and paths in the config lead to it."""
_NO_CODE = {"__pycache__", "node_modules", "site-packages"}


def take_snapshot(run_folder: Path, runs: Path) -> Path:
    """Copy the project that the current directory belongs to.

    In a git repository that is what git knows or would add; else the files below the current
    directory. Data, environments and runs are left out.

    Args:
        run_folder: the run's folder, in which the snapshot goes.
        runs: the folder of all runs.

    Returns:
        The root of the snapshot.

    Raises:
        UsageError: if it cannot be made, or is too large to be code.
    """
    here = Path.cwd().resolve()
    project = _git_root(here) or here
    apart = {run_folder.resolve(), runs.resolve()} - {project}
    files = {
        path: path.stat().st_size
        for path in (_of_git(project) if (project / ".git").exists() else _below(project))
        if path.is_file() and path.suffix not in _DATA and apart.isdisjoint(path.parents)
    }
    if (total := sum(files.values())) > MOST_BYTES:
        largest = sorted(files, key=lambda path: files[path], reverse=True)
        lines = [f"{path.relative_to(project)}: {size(files[path])}" for path in largest]
        raise UsageError(
            f"--snapshot: {project} has {size(total)} of files beside data, more than "
            f"{size(MOST_BYTES)} of code; name what is none in .gitignore:\n"
            + "\n".join(first_lines(lines, 5, indent="  "))
        )
    target = run_folder.resolve() / _FOLDER / time.strftime("%Y%m%d-%H%M%S")
    temporary = temporary_name(target)
    try:
        for path in files:
            copy = temporary / path.relative_to(project)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
        temporary.mkdir(parents=True, exist_ok=True)
        (temporary / MARKER).write_text(json.dumps({"project": str(project)}), encoding="utf-8")
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UsageError(f"--snapshot: cannot copy {project} to {target}: {error}") from error
    return target


def in_snapshot(path: Path, root: Path) -> Path:
    """Return where a file of the project is in a snapshot; the file itself if it is not there."""
    project = Path(parse_json(read_whole(root / MARKER, SMALL))["project"])
    whole = path.resolve()
    copied = root / whole.relative_to(project) if whole.is_relative_to(project) else whole
    return copied if copied.is_file() else path


def _git_root(here: Path) -> Path | None:
    return next((path for path in (here, *here.parents) if (path / ".git").exists()), None)


def _of_git(root: Path) -> Iterator[Path]:
    """Yield the files that git knows or would add, those of submodules too.

    Raises:
        UsageError: if git does not say.
    """
    command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"]
    try:
        result = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode(errors="replace").strip()
        raise UsageError(f"--snapshot: git does not list {root}: {said or error}") from error
    for name in dict.fromkeys(result.stdout.decode(errors="surrogateescape").split("\0")):
        path = root / name
        if name and path.is_dir() and (path / ".git").exists():
            yield from _of_git(path)
        elif name:
            yield path


def _below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that may be code."""
    for place, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if name not in _NO_CODE
            and not name.startswith(".")
            and not (Path(place) / name / "pyvenv.cfg").exists()
        ]
        yield from (Path(place) / name for name in files if not name.startswith("."))
