"""Lightning's loggers: those whose files a run has in any case, and those that are handed lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.lightning.keys import Keys

_WITH_A_WRITER = "TensorBoardLogger"
_IN_THE_RUN_FOLDER = ("CSVLogger", _WITH_A_WRITER)
"""A run has metrics.jsonl, metrics.csv and, where it is installed, TensorBoard's files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loggers:
    """What becomes of the loggers of a Trainer.

    Attributes:
        keys: where the run is to be.
        handed: those that are handed every line of metrics.
        shown: what a module finds as its loggers; None: the run's own.
    """

    keys: Keys
    handed: Sequence[Any]
    shown: Sequence[Any]

    @classmethod
    def of(cls, given: Any) -> Loggers:
        """Return what becomes of one of them, or several; None is True, and False is none."""
        loggers = list(given) if isinstance(given, list | tuple | set) else [given]
        loggers = [None if logger is True else logger for logger in loggers if logger is not False]
        real = [logger for logger in loggers if logger is not None]
        ours = [logger for logger in real if type(logger).__name__ in _IN_THE_RUN_FOLDER]
        keys: Keys = {}
        if ours:
            # As there: DIRECTORY/NAME/VERSION, where the files of the first logger are.
            first = ours[0]
            parts = [part for part in (first.save_dir, first.name) if part]
            keys["run.directory"] = "/".join(str(part) for part in parts) or "."
            version = getattr(first, "_version", None)
            if version is not None:
                keys["run.name"] = version if isinstance(version, str) else f"version_{version}"
        return cls(
            keys=keys,
            handed=[logger for logger in real if logger not in ours],
            shown=[None if type(each).__name__ == "CSVLogger" else each for each in loggers],
        )

    @staticmethod
    def move(shown: Sequence[Any], version: str) -> None:
        """Have TensorBoard's logger, of which a module asks the writer, be in the run's folder."""
        for each in shown:
            if type(each).__name__ == _WITH_A_WRITER and each._version is None:
                each._version = version
