"""Evidence of a failure: Python stacks, collectives of flight recorders, and crash-rank-N.json.

Standard library only: the watchdog writes crash reports for ranks that no longer can.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from hpctrain.batch.exit_status import Outcome, conclude, read_outcome
from hpctrain.errors import CheckpointError
from hpctrain.utils.batch_job import job_identity
from hpctrain.utils.files import put_file, replace_file
from hpctrain.utils.permissions import follow_folder, new_private_folder
from hpctrain.version import __version__

REQUEST_NAME = "STACKS"
"""A file of this name in the run folder: all ranks are to show where they are, and to go on."""

STACKS_SIGNAL = signal.SIGQUIT
"""As in other runtimes: `kill -QUIT` has a process show its stacks.

faulthandler does it from C, also while some library holds Python's lock. No launcher or scheduler
stops jobs by it.
"""

_LOOK_SECONDS = 2.0

MOST_GROUPS = 8
_NAME_CHARACTERS = 80


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


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPosition:
    """How far one rank has come in the collectives of one process group.

    Attributes:
        group: name of the process group.
        last: number of the last collective that the rank has called.
        pending: number of the first one that it still waits for, 0 where it waits for none.
        name: of that, or else of the last: "gloo:all_reduce of 340 Float".
    """

    group: str
    last: int
    pending: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldUp:
    """A collective that some ranks wait in.

    Attributes:
        number: of the collective, within its process group.
        waiting: ranks, by what each of them takes the collective to be; more than one name means
            that the ranks call collectives in different orders.
        absent: ranks of the group that have not entered it.
    """

    number: int
    waiting: Mapping[str, Sequence[int]]
    absent: Sequence[int]


def positions(record: bytes) -> list[GroupPosition]:
    """Return how far a rank has come in each process group, by its flight recorder's JSON.

    Raises:
        ValueError, KeyError, TypeError: if it is none.
    """
    by_group: dict[str, list[dict[str, Any]]] = {}
    for entry in json.loads(record).get("entries", []):
        if not entry["is_p2p"]:
            by_group.setdefault(str(entry["process_group"][0]), []).append(entry)
    return [_position(group, by_group[group]) for group in sorted(by_group)[:MOST_GROUPS]]


def _position(group: str, entries: Sequence[Mapping[str, Any]]) -> GroupPosition:
    ordered = sorted(entries, key=_number)
    # torch retires what has ended; NCCL's entries say "completed" a little earlier.
    pending = [each for each in ordered if not each["retired"] and each["state"] != "completed"]
    shown = (pending or ordered[-1:])[0]
    return GroupPosition(
        group=group,
        last=_number(ordered[-1]),
        pending=_number(pending[0]) if pending else 0,
        name=_name(shown),
    )


def _number(entry: Mapping[str, Any]) -> int:
    return int(entry["collective_seq_id"])


def _name(entry: Mapping[str, Any]) -> str:
    name = str(entry["profiling_name"])
    elements = 0
    for size in entry["input_sizes"]:
        count = 1
        for length in size:
            count *= int(length)
        elements += count
    if elements:
        name = f"{name} of {elements:,} {entry['input_dtypes'][0]}"
    return name[:_NAME_CHARACTERS]


def held_up(ranks: Mapping[int, Sequence[GroupPosition]]) -> HeldUp | None:
    """Return the collective that ranks wait in while others have not come to it.

    Where all have entered the same one, it is that: then it is the network that does not get on.

    Args:
        ranks: how far each has come; a rank whose record could not be had is not in it.

    Returns:
        None if no rank waits in a collective.
    """
    found = list(_candidates(ranks))
    telling = [each for each in found if each.absent or len(each.waiting) > 1]
    return next(iter(telling or found), None)


def _candidates(ranks: Mapping[int, Sequence[GroupPosition]]) -> Iterator[HeldUp]:
    groups = sorted({position.group for own in ranks.values() for position in own})
    for group in groups:
        members = {
            rank: position
            for rank, own in ranks.items()
            for position in own
            if position.group == group
        }
        pending = [position.pending for position in members.values() if position.pending]
        if not pending:
            continue
        # What comes later waits for this one.
        number = min(pending)
        waiting: dict[str, list[int]] = {}
        for rank, position in sorted(members.items()):
            if position.pending == number:
                waiting.setdefault(position.name, []).append(rank)
        absent = [rank for rank, position in members.items() if position.last < number]
        yield HeldUp(number=number, waiting=waiting, absent=sorted(absent))


def write_report(
    folder: Path,
    *,
    rank: int,
    host: str,
    code: int,
    story: str,
    step: int | None,
    about: Mapping[str, object],
) -> None:
    """Write the crash report of a rank, and into exit.json how the job ended.

    A folder that cannot be written is reported on stderr: nothing may raise on the way out.

    Args:
        folder: of the run.
        rank: the one that failed.
        host: its node.
        code: exit code of the job.
        story: what was reported to the user.
        step: the last one that the rank finished; None if it is not known.
        about: more of the rank: its device, versions.
    """
    report = {
        "rank": rank,
        "host": host,
        "step": step,
        "code": code,
        "traceback": story,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **about,
    }
    path = folder / f"crash-rank-{rank}.json"
    reason = f"rank {rank} on {host} failed: see {path.name}"
    try:
        replace_file(path, (json.dumps(report, indent=2) + "\n").encode())
        write_ending(folder, code, reason)
    except OSError as error:
        sys.stderr.write(f"hpctrain: no crash report: {error}\n")


def write_ending(folder: Path, code: int, reason: str) -> None:
    """Write into exit.json that the job failed, if it says that this job runs."""
    try:
        running = read_outcome(folder)
        if running is not None and running.code is None and _is_of_this_job(running):
            conclude(folder, replace(running, code=code, reason=reason))
    except CheckpointError as error:
        sys.stderr.write(f"hpctrain: {error}\n")


def _is_of_this_job(outcome: Outcome) -> bool:
    """Tell whether a word is of the job of this process, as far as its environment says.

    The next job may have begun while this one finds out how it ended.
    """
    here = job_identity(os.environ)
    return here is None or outcome.job in (None, here)


def versions() -> dict[str, str | None]:
    """Return the versions of what is loaded in this process."""
    torch = sys.modules.get("torch")
    return {
        "hpctrain": __version__,
        "python": platform.python_version(),
        "torch": None if torch is None else str(torch.__version__),
    }
