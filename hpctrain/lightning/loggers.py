"""Lightning's loggers: those whose files a run has in any case, and those that are handed lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpctrain.lightning.keys import Keys

_IN_THE_RUN_FOLDER = ("CSVLogger", "TensorBoardLogger")
"""A run has metrics.jsonl, metrics.csv and, where it is installed, TensorBoard's files."""


def logger_keys(given: Any) -> tuple[Keys, Sequence[Any]]:
    """Return where the run is to be, and the loggers that are handed every line of metrics.

    Args:
        given: one of them or several; True, False and None say nothing here.
    """
    loggers = list(given) if isinstance(given, list | tuple | set) else [given]
    loggers = [logger for logger in loggers if logger not in (None, True, False)]
    ours = [logger for logger in loggers if type(logger).__name__ in _IN_THE_RUN_FOLDER]
    handed = [logger for logger in loggers if logger not in ours]
    keys: Keys = {}
    if ours:
        # As there: DIRECTORY/NAME/VERSION, where the files of the first logger are.
        first = ours[0]
        parts = [part for part in (first.save_dir, first.name) if part]
        keys["run.directory"] = "/".join(str(part) for part in parts) or "."
        version = getattr(first, "_version", None)
        if version is not None:
            keys["run.name"] = version if isinstance(version, str) else f"version_{version}"
    return keys, handed
