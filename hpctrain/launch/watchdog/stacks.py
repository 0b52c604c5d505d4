"""Python stacks of running ranks: `touch RUN/STACKS` has them written to `RUN/stacks/`.

The watchdog of rank 0's node looks for the file, never a rank: a step pays nothing for it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from hpctrain.utils.files import put_file
from hpctrain.utils.permissions import follow_folder, new_private_folder

REQUEST_NAME = "STACKS"
"""A file of this name in the run folder: all ranks are to show where they are, and to go on."""

STACKS_SIGNAL = signal.SIGQUIT
"""As in other runtimes: `kill -QUIT` has a process show its stacks.

faulthandler does it from C, also while some library holds Python's lock. No launcher or scheduler
stops jobs by it.
"""

_LOOK_SECONDS = 2.0


class Requests:
    """Looks for the request in a thread: on a file system that hangs only that one waits."""

    def __init__(
        self, folder: Path, asked: Callable[[], None], every_seconds: float = _LOOK_SECONDS
    ) -> None:
        """Look from now on.

        Args:
            folder: of the run.
            asked: is called, in the thread, once a request has been taken.
            every_seconds: between two looks.
        """
        self._every_seconds = every_seconds
        self._file = folder / REQUEST_NAME
        self._asked = asked
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="hpctrain-stacks", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(self._every_seconds):
            # Taken away, so that it can be asked again.
            with suppress(OSError):
                self._file.unlink()
                self._asked()


def make_private_folder() -> Path | None:
    """Return a new folder on this node, whose name nobody can have guessed and prepared."""
    with suppress(OSError):
        return new_private_folder("hpctrain-stacks-")
    return None


def python_stacks() -> str:
    """Return the stacks of all threads of this process, in faulthandler's form.

    faulthandler itself reads the frames of threads that run meanwhile, and may trip over them; here
    all of them stand, while Python's lock is held.
    """
    main = threading.main_thread().ident
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    blocks = []
    # The main thread last, as in a traceback.
    for ident, top in sorted(sys._current_frames().items(), key=lambda item: item[0] == main):
        who = "Current thread" if ident == main else "Thread"
        lines = [f"{who} {ident:#018x} [{names.get(ident, '?')}] (most recent call first):"]
        frame: FrameType | None = top
        while frame is not None:
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
            frame = frame.f_back
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def write_stacks(folder: Path, dumps: Mapping[int, str], seconds: float) -> bool:
    """Write one file of stacks per rank; return whether all were written in time."""

    def write() -> None:
        folder.mkdir(exist_ok=True)
        follow_folder(folder)
        for rank, dump in dumps.items():
            if dump:
                put_file(folder / f"rank-{rank}.txt", dump.encode())

    return in_time(write, seconds)


def in_time(write: Callable[[], object], seconds: float) -> bool:
    """Write to a file system that may hang; return whether it was done in time."""
    done = threading.Event()

    def run() -> None:
        with suppress(OSError):
            write()
            done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()


def empty(descriptor: int) -> None:
    """Forget what a rank has written into its memory file."""
    if descriptor >= 0:
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)  # the rank's too: it is one description


def read_all(descriptor: int) -> str:
    """Return what a rank has written into its memory file."""
    if descriptor < 0:
        return ""
    return os.pread(descriptor, 1 << 20, 0).decode(errors="replace")
