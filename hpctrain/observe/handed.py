"""Loggers of the user's: objects that are handed every line of metrics, such as W&B's."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpctrain.observe.records import WALL_TIME, Record

_logger = logging.getLogger(__name__)

_OF_THE_LINE = ("kind", "step", "split", WALL_TIME)


class Handed:
    """A logger with `log_metrics(metrics, step)`, as Lightning's are; for one rank only.

    Whatever it raises waits for another try, as a full disk does: training does not end for it.
    """

    def __init__(self, logger: Any, arguments: Mapping[str, Any]) -> None:
        """Begin, and hand over the hyperparameters.

        Args:
            logger: of the user's.
            arguments: of the model.
        """
        self._user_logger = logger
        self.path = Path(type(logger).__name__)
        try:
            if callable(hand := getattr(logger, "log_hyperparams", None)):
                hand(dict(arguments))
        except Exception as error:  # noqa: BLE001 - a service's, of any kind
            _logger.warning("%s takes no hyperparameters: %s", self.path, error)

    def append(self, records: Sequence[Record]) -> None:
        """Hand the numbers of the records over, under the names that the module logs them by."""
        try:
            for record in records:
                self._user_logger.log_metrics(numbers_of(record), step=record["step"])
        except Exception as error:
            raise _as_os_error(error) from error

    def close(self) -> None:
        """Tell it that this was all."""
        try:
            if callable(finalize := getattr(self._user_logger, "finalize", None)):
                finalize("success")
        except Exception as error:
            raise _as_os_error(error) from error


def numbers_of(record: Record) -> dict[str, float]:
    """Return the numbers of a record, without those that are of its line."""
    flat = {**record, **record.get("logged", {})}
    return {
        name: value
        for name, value in flat.items()
        if name not in _OF_THE_LINE
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }


def _as_os_error(error: Exception) -> OSError:
    return OSError(errno.EIO, f"{type(error).__name__}: {error}")
