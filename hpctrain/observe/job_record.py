"""What one job of a run was: `jobs/<n>.json` in the run folder. For rank 0 only.

It says what ran, where, when and how it ended, so that somebody can tell years later what a
checkpoint was made by. Threads gather it beside the training, and nothing waits for them for long:
git may hang, a file system may be slow, and none of that is a reason for a job to fail.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from hpctrain.observe import surroundings
from hpctrain.observe.code import Modules, modules_now, user_modules
from hpctrain.observe.repository import look_into, root_of
from hpctrain.utils.files import replace_file
from hpctrain.utils.permissions import explained, follow_folder

logger = logging.getLogger("hpctrain")

FOLDER = "jobs"
VERSION = 1
"""Of the format of a record."""

_MOST_REPOSITORIES = 4
_PATIENCE_SECONDS = 2.0
"""How long a job waits for its record at most, where a header or the end could do without it."""


class JobRecord:
    """The record of this job, written anew whenever more is known.

    Attributes:
        number: of the job among those of the run, from 1; None: it could not be taken.
    """

    def __init__(self, run_folder: Path) -> None:
        """Prepare; nothing is written before `begin`.

        Args:
            run_folder: of the run; its lease is held by this job.
        """
        self.number: int | None = None
        self._folder = run_folder / FOLDER
        self._lock = threading.Lock()
        self._about: dict[str, Any] = {"version": VERSION}
        self._modules: Modules | None = None
        self._gathering: threading.Thread | None = None
        self._reading: threading.Thread | None = None

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Take a number, and start to gather the rest.

        Args:
            facts: that are known by now, as JSON.
        """
        try:
            self._folder.mkdir(exist_ok=True)
            follow_folder(self._folder)
            taken = [
                int(path.stem) for path in self._folder.glob("*.json") if path.stem.isdecimal()
            ]
        except OSError as error:
            logger.warning(
                "this job leaves no record: %s: %s", self._folder, explained(error, self._folder)
            )
            return
        # Only one job at a time holds the run, so nobody else takes the same.
        self.number = max(taken, default=0) + 1
        self._about |= {"number": self.number, **facts, "end": None, "reason": "running"}
        self._gathering = _started(self._add, self._note_surroundings, self._note_repositories)

    def note_modules(self) -> None:
        """Begin to read the user's modules that are imported by now."""
        self._reading = _started(self._read_modules)

    def modules(self) -> Modules | None:
        """Return those modules; None where their files cannot be read soon."""
        reading, self._reading = self._reading, None
        _wait(reading)  # once, not at every save
        return self._modules

    def checkpoint_note(self) -> dict[str, Any]:
        """Return what a checkpoint says of the job that saves it."""
        return {"job": self.number, "modules": self.modules()}

    def end(self, **facts: Any) -> None:
        """Note how the job has ended. Waits only a moment for what is still being gathered."""
        if self.number is None:
            return
        self.modules()
        _wait(self._gathering)
        _wait(_started(lambda: self._add(end=timestamp(), **facts)))

    def _note_surroundings(self) -> None:
        self._add(
            packages=surroundings.packages(),
            system=surroundings.system(),
            driver=surroundings.driver(),
            image=surroundings.image(os.environ),
            variables=surroundings.variables(os.environ),
        )

    def _note_repositories(self) -> None:
        places = [Path.cwd(), *(path.parent for path in user_modules().values())]
        roots = dict.fromkeys(root for place in places if (root := root_of(place)) is not None)
        found = [asdict(look_into(root)) for root in list(roots)[:_MOST_REPOSITORIES]]
        # That of the current directory is the project, where it is in one.
        self._add(git=found[0] if found else None, other_repositories=found[1:])

    def _read_modules(self) -> None:
        self._modules = modules_now()
        if self.number is not None:
            self._add(modules=self._modules)

    def _add(self, **facts: Any) -> None:
        with self._lock:
            self._about |= facts
            content = json.dumps(self._about, indent=1) + "\n"
            replace_file(self._folder / f"{self.number}.json", content.encode())


def timestamp(seconds: float | None = None) -> str:
    """Return a time, such as 2026-11-28T15:04:05+01:00; None: now."""
    moment = datetime.now() if seconds is None else datetime.fromtimestamp(seconds)
    return moment.astimezone().isoformat(timespec="seconds")


def _started(*works: Callable[[], None]) -> threading.Thread | None:
    """Do works in a thread that the job may leave behind; where one fails, that is only told.

    Returns:
        The thread; None where there can be no more of them.
    """

    def run() -> None:
        for work in works:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a record is no reason for a job to fail
                with suppress(Exception):
                    logger.warning("the record of this job is not complete: %s", error)

    thread = threading.Thread(target=run, name="hpctrain-record", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # a limit of processes
        logger.warning("the record of this job is not complete: %s", error)
        return None
    return thread


def _wait(thread: threading.Thread | None) -> None:
    if thread is not None:
        thread.join(_PATIENCE_SECONDS)
