"""When this job has to be over: asked of the scheduler in a thread, seldom, and remembered."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Mapping

from hpctrain.batch.schedulers import Scheduler, scheduler_of
from hpctrain.batch.time_left import from_user

VARIABLE = "HPCTRAIN_DEADLINE"
ASK_EVERY_SECONDS = 600.0
"""Limits are changed while jobs run, but schedulers serve thousands of jobs."""

ASK_AGAIN_SECONDS = 60.0
"""After no answer: a busy scheduler may answer the next time."""

_LONGEST_ANSWER_SECONDS = 30.0


class Deadline:
    """The earliest end that anybody names: the user, the config, or the scheduler.

    For rank 0 only. Nothing here communicates; `refresh` is the one method that may take long.

    Args:
        max_seconds: the config's own limit, from the beginning of the job; None: none.
        environ: names the job; HPCTRAIN_DEADLINE in it is believed before any scheduler, and works
            in containers without its commands.
        began: when this job began, Unix time.
        tell: is told, once, if the scheduler does not say.
        clock: Unix time.

    Raises:
        ConfigError: if HPCTRAIN_DEADLINE is no time.
    """

    def __init__(
        self,
        *,
        max_seconds: float | None,
        environ: Mapping[str, str],
        began: float,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._environ = environ
        self._tell = tell
        self._clock = clock
        self._own = math.inf if max_seconds is None else began + max_seconds
        self._scheduler: Scheduler | None = None
        self._scheduled = math.inf
        self._ask_at = math.inf
        self._told = False
        if environ.get(VARIABLE):
            self._own = min(self._own, from_user(environ[VARIABLE], began))
            return
        self._scheduler = scheduler_of(environ)
        if self._scheduler is None:
            return
        self._ask_at = clock()
        end = environ.get(self._scheduler.end, "") if self._scheduler.end else ""
        if end.isdecimal():
            self._scheduled = float(end)
            self._ask_at += ASK_EVERY_SECONDS

    def seconds_left(self) -> float:
        """Return the seconds until the job has to be over; infinite where no end is known."""
        return min(self._own, self._scheduled) - self._clock()

    def refresh(self) -> None:
        """Ask the scheduler if it is time to. May wait for it: not for the training thread."""
        if self._scheduler is None or self._clock() < self._ask_at:
            return
        question = self._scheduler.question(self._environ)
        text, problem = ask(question, self._environ)
        now = self._clock()
        left = self._scheduler.answer(text, now) if problem is None else None
        if left is not None:
            self._scheduled = now + left
            self._ask_at = now + ASK_EVERY_SECONDS
            return
        self._ask_at = now + ASK_AGAIN_SECONDS
        if not self._told:
            self._told = True
            reason = problem or f"says {text.strip()[:80]!r}"
            known = "" if math.isinf(self._scheduled) else "; the limit known so far stays"
            self._tell(
                f"the time left is unknown: {' '.join(question)} {reason}{known}. Set "
                f"{VARIABLE} in the job script, or rely on its signal before the limit"
            )


def ask(
    command: tuple[str, ...],
    environ: Mapping[str, str],
    longest_seconds: float = _LONGEST_ANSWER_SECONDS,
) -> tuple[str, str | None]:
    """Return what a command prints, and what went wrong, None if nothing.

    Python starts it by vfork, which copies no page of this process: after MPI_Init, memory that
    the network has registered must not be copied on write.
    """
    try:
        result = subprocess.run(
            command,
            env={**environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=longest_seconds,
            check=False,
        )
    except FileNotFoundError:
        return "", "is not installed here"
    except subprocess.TimeoutExpired:
        return "", f"has not answered within {longest_seconds:g} s"
    except OSError as error:
        return "", f"cannot be run: {error.strerror}"
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[0]
        return "", f"fails with code {result.returncode}: {said[:120]}"
    return result.stdout, None
