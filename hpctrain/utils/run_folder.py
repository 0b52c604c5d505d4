"""What a run's folder holds, for rooms that do not know each other. Standard library only.

runs/digits/
  checkpoints/step-00000120/   a checkpoint, see `hpctrain.checkpoint.format`
  latest                       the name of the newest one
  STOP                         put there by somebody: stop, and stay stopped until it is removed
"""

from __future__ import annotations

import re
from pathlib import Path

from hpctrain.errors import CheckpointError
from hpctrain.utils.json_files import read_name

CHECKPOINTS, LATEST, STOP_FILE_NAME = "checkpoints", "latest", "STOP"

_CHECKPOINT = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """Return the name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's folder name, None if it is no such name."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


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
