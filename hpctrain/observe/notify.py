"""`[notify]`: a user's command learns how a job ends. Whatever it does, the job ends as it would.

The command is run as it is written, without a shell: what it learns is in environment variables
alone, where nothing takes it for a part of a command.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hpctrain.config.schema import NotifySection
from hpctrain.errors import ExitCode
from hpctrain.utils.text import printable

_MOST_CHARACTERS = 2000

_CRASH_SECONDS = 5.0
"""For the command of a rank that ends the job: others wait for that, or leave first."""

_logger = logging.getLogger("hpctrain")


_STATES: dict[int, str] = {ExitCode.DONE: "end", ExitCode.STOPPED: "stop"}


def state_of(code: int) -> str:
    """Return the state that an exit code stands for, as `notify.on` calls it."""
    return _STATES.get(code, "failure")


class Notifier:
    """Runs the command; for rank 0, and a rank that ends the job.

    Attributes:
        crash_seconds: which a rank that ends the job gives to the command.
    """

    def __init__(self, section: NotifySection, run_folder: Path) -> None:
        """Prepare.

        Args:
            section: of the config.
            run_folder: of the run.
        """
        self.crash_seconds = min(section.timeout_seconds, _CRASH_SECONDS) if section.command else 0
        self._section = section
        self._folder = run_folder
        self._reported: set[str] = set()

    def notify_beside(self, state: str, reason: str, *, step: int) -> None:
        """Do so while training goes on."""
        if state not in self._reported:
            thread = threading.Thread(
                target=self.notify,
                args=(state, reason),
                kwargs={"step": step},
                name="hpctrain-notify",
                daemon=True,
            )
            with suppress(RuntimeError):  # a limit of processes
                thread.start()

    def notify(
        self,
        state: str,
        reason: str,
        *,
        step: int,
        code: int | None = None,
        seconds: float | None = None,
    ) -> None:
        """Run the command, if it is to learn this, once a state and job; wait with a bound.

        Args:
            state: "end", "failure", "stop" or "nonfinite".
            reason: for people.
            step: of the run.
            code: exit code of the job; None: it goes on.
            seconds: to wait; None: as the config says.
        """
        section = self._section
        if not section.command or state not in section.on or state in self._reported:
            return
        self._reported.add(state)
        facts = {
            "RUN": self._folder.name,
            "FOLDER": str(self._folder.resolve()),
            "STATE": state,
            "REASON": reason,
            "STEP": str(step),
            "CODE": "" if code is None else str(int(code)),
        }
        problem = _run(
            list(section.command),
            {
                f"HPCTRAIN_{name}": printable(value)[:_MOST_CHARACTERS]
                for name, value in facts.items()
            },
            section.timeout_seconds if seconds is None else seconds,
        )
        if problem:
            _logger.warning("notify.command: %s: %s", section.command[0], problem)


def _run(command: list[str], facts: Mapping[str, str], seconds: float) -> str | None:
    """Run a command; return what was wrong with it, None if nothing was."""
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **facts},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that all of it can be ended
        )
    except (OSError, ValueError) as error:
        return str(error)
    with process:
        try:
            written = _end_of_stderr(process, time.monotonic() + seconds)
        except subprocess.TimeoutExpired:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            # What has left its session may hold the pipe: that is not waited for.
            assert process.stderr is not None
            process.stderr.close()
            return f"it took longer than {seconds:g} s (notify.timeout_seconds) and was ended"
    if process.returncode:
        last = written.decode("utf-8", "replace").strip().splitlines()[-1:]
        return f"it ended with {process.returncode}{': ' if last else ''}{printable(''.join(last))}"
    return None


def _end_of_stderr(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """Wait for a command, and return the end of what it writes to stderr: it may be anything long.

    Raises:
        TimeoutExpired: if it has not come to its end by then.
    """
    assert process.stderr is not None
    descriptor, end = process.stderr.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(process.args, 0)
            if selector.select(left):
                data = os.read(descriptor, 1 << 16)
                if not data:
                    break
                end = (end + data)[-2 * _MOST_CHARACTERS :]
    process.wait(max(0.0, deadline - time.monotonic()))
    return end
