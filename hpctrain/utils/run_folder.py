"""What a run's folder holds, for rooms that do not know each other. Standard library only.

runs/digits/
  checkpoints/step-00000120/   a checkpoint, see `hpctrain.checkpoint.format`
  latest                       the name of the newest one
  STOP                         put there by somebody: stop, and stay stopped until it is removed

The folder of a sweep has sweep.json, and in it the folders of its runs, 000, 001 and so on.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.utils.json_files import read_name

CHECKPOINTS, LATEST, STOP_FILE_NAME = "checkpoints", "latest", "STOP"
SWEEP = "sweep.json"

_CHECKPOINT = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """Return the name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's folder name, None if it is no such name."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


def refuse_sweep(run: Path) -> None:
    """Refuse the folder of a sweep as that of a run: the points have run folders of their own.

    Raises:
        ConfigError: if it is one.
    """
    # A folder that is closed to this user is for its writers to name.
    if os.path.isfile(run / SWEEP):  # noqa: PTH113 - Path.is_file raises where the folder is closed
        raise ConfigError(
            f"{run} holds a sweep ({SWEEP}), whose runs are in its folders 000, 001 and so on, and "
            "this run would mix with them: set another run.name; one of the points goes on with "
            f"that one's overrides and run.directory={run} run.name=000"
        )


def read_latest(run: Path) -> str | None:
    """Return the name of the newest checkpoint, by a run's `latest`; None where there is none yet.

    Raises:
        CheckpointError: if `latest` is damaged, or cannot be read.
    """
    path = run / LATEST
    try:
        return read_name(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Name a checkpoint in {run / CHECKPOINTS} itself, or "
            "remove the file: the next save writes it anew"
        ) from error
