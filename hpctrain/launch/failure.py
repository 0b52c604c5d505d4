"""What happens when one rank fails and the others do not know: it is reported once, then the end.

No collective runs on this path: the others may be anywhere. MPI_Abort, or the launcher that sees a
process die, ends them.

A failed `connect()` that no program catches is one message and its exit code, as on the shell.
Where the program, a notebook or pytest catches it, it is an exception like any other.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from hpctrain.config.schema import LaunchSection
from hpctrain.errors import ExitCode, HpctrainError
from hpctrain.launch.mpi import abort
from hpctrain.launch.reporter import report_once
from hpctrain.launch.watchdog.client import Pulse, WatchdogClient
from hpctrain.launch.watchdog.coordinator import show_own_stacks
from hpctrain.launch.watchdog.evidence import Requests, versions, write_report
from hpctrain.topology import Communicator, Topology
from hpctrain.utils.streams import finish_out
from hpctrain.utils.text import listed

_ABORT_SECONDS = 2.0
_SILENT_SECONDS = 8.0
_HERE = Path(__file__).parent

_OTHERS_MODULES = frozenset(
    {"torch", "numpy", "h5py", "mpi4py", "psutil", "xxhash", "safetensors", "jinja2", "hpctrain"}
)


class Guard:
    """Ends the whole job for a failure of this rank alone.

    Attributes:
        pulse: heartbeats of this rank.
        on_failure: takes the failure that ends the job, on the rank that reports it.
        notify: takes its reason and exit code then, once there is a report of it.
        notify_seconds: that it may take.
    """

    def __init__(self, topology: Topology) -> None:
        self.pulse = Pulse()
        self.on_failure: Callable[[BaseException], None] | None = None
        self.notify: Callable[[str, int], None] | None = None
        self.notify_seconds = 0.0
        self._topology = topology
        self._client: WatchdogClient | None = None
        self._folder: Path | None = None
        self._requests: Requests | None = None
        self._about: dict[str, object] = {"mpi": topology.mpi}

    def watched_by(self, client: WatchdogClient) -> None:
        """Have the watchdog decide from here on which rank reports how the job failed."""
        self._client = client

    def wait_until_watched(self) -> None:
        """Return once the watchdog sees this rank: what ends later is not lost on it."""
        if self._client is not None:
            self._client.wait_until_watched()

    def outside(self) -> None:
        """Say that this rank goes on in its program, where it may take its time."""
        if self._client is not None:
            self._client.outside()

    def entering(self, section: LaunchSection) -> None:
        """Say that this rank enters a job's body, with the limits that hold in there."""
        self.pulse.begin()
        if self._client is not None:
            self._client.entering(section.hang_timeout_seconds, section.first_step_timeout_seconds)

    def leaving(self) -> None:
        """Say that this rank's part is done: the others are to come to their end as well."""
        if self._client is not None:
            self._client.leaving()

    def report_to(self, folder: Path) -> None:
        """Take note of the run folder, where reports go."""
        self._folder = folder
        if self._client is not None and self._topology.is_rank_zero:
            self._client.send_folder(folder)
        if self._client is None and self._topology.world_size == 1:
            self._requests = show_own_stacks(folder)

    def close(self) -> None:
        """End what goes on in the background."""
        if self._requests is not None:
            self._requests.close()

    def runs_on(self, device: str) -> None:
        """Take note of the device, for the report."""
        self._about = {"device": device, "mpi": self._topology.mpi, "versions": versions()}
        if self._client is not None:
            self._client.send_about(self._about)

    def end_job(self, error: BaseException, trace: TracebackType | None) -> None:
        """Tell what failed, write the crash report, and end all ranks. Does not return.

        Not collective: this is how a rank leaves alone.

        Args:
            error: what failed.
            trace: where; None: a program that has ended itself, and said why.
        """
        code = exit_code(error)
        # torch, gloo, NCCL and MPI raise these where another rank has gone.
        may_be_echo = isinstance(error, RuntimeError)
        client = self._client
        if client is not None and not client.ask_to_speak(code, may_be_echo=may_be_echo):
            # Another rank reports it, and the watchdog ends this one.
            time.sleep(_SILENT_SECONDS)
            os._exit(code)
        # Whatever MPI_Abort or a full disk does: this process is gone soon.
        timer = threading.Timer(_ABORT_SECONDS + self.notify_seconds, os._exit, (code,))
        timer.daemon = True
        timer.start()
        text = self._story(error, trace)
        if self.on_failure is not None:
            with suppress(OSError):
                self.on_failure(error)
        finish_out()
        with suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()
        if self._folder is not None:
            write_report(
                self._folder,
                rank=self._topology.rank,
                host=self._topology.host,
                code=code,
                story=text,
                step=self.pulse.step,
                about=self._about,
            )
        if self.notify is not None:
            with suppress(Exception):
                self.notify(text.strip().splitlines()[-1], code)
        # Time for the launcher to pass the report on before it ends everybody.
        time.sleep(0.2)
        abort(code)
        os._exit(code)

    def _story(self, error: BaseException, trace: TracebackType | None) -> str:
        who = f"rank {self._topology.rank}@{self._topology.host}"
        if isinstance(error, HpctrainError):
            return f"hpctrain: error on {who}: {error}\n"
        if isinstance(error, KeyboardInterrupt):
            return f"hpctrain: {who} was interrupted and ends the job\n"
        if isinstance(error, SystemExit) and trace is None:
            said = f"{error.code}\n" if isinstance(error.code, str) else ""
            return f"{said}hpctrain: {who} exited with {exit_code(error)} and ends the job\n"
        while trace is not None and Path(trace.tb_frame.f_code.co_filename).parent == _HERE:
            trace = trace.tb_next  # our own context managers are not of interest
        lines = traceback.format_exception(type(error), error, trace)
        return f"hpctrain: {who} failed and ends the job:\n{''.join(lines)}{_shadows(error)}"


def _shadows(error: BaseException) -> str:
    """Return a line on files of the user's that Python took for modules of others.

    With `python -m` the working directory is the first place that is searched: its `torch.py` is
    everybody's torch.
    """
    here = Path(sys.path[0] or os.curdir).absolute()
    run = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
    found = [
        str(path)
        for path in sorted(here.glob("*.py"))
        if path.stem in sys.stdlib_module_names | _OTHERS_MODULES
        and str(path) in run | {getattr(sys.modules.get(path.stem), "__file__", None)}
    ]
    if not found:
        return ""
    return (
        f"hpctrain: {listed(found, 4)} was imported in place of the module of that name: rename "
        "it, or start from another folder\n"
    )


@contextmanager
def guard(topology: Topology, *, is_callers: bool = False) -> Iterator[Guard]:
    """End the whole job if the body fails on this rank alone.

    A failure that all ranks share (`HpctrainError.everywhere`) passes through, and so does every
    HpctrainError of a single process: they leave by the normal path.

    Args:
        topology: of this rank.
        is_callers: the process belongs to somebody else, such as a notebook or pytest: where it is
            the whole world, every failure of it is for its owner to catch.
    """
    if is_callers and topology.world_size == 1:
        yield Guard(topology)
        return
    around = standing()
    is_part = around is not None and around.topology is topology
    job_guard = around.guard if around is not None and is_part else Guard(topology)
    previous = threading.excepthook

    def thread_failed(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None:
            job_guard.end_job(failed.exc_value, failed.exc_traceback)

    threading.excepthook = thread_failed
    try:
        yield job_guard
    except BaseException as error:
        shared = topology.world_size == 1 or getattr(error, "everywhere", False)
        if isinstance(error, HpctrainError | KeyboardInterrupt) and shared:
            raise
        job_guard.end_job(error, error.__traceback__)
    finally:
        threading.excepthook = previous
        if not is_part:
            job_guard.close()


def exit_code(error: BaseException) -> int:
    """Return the exit code that a failure asks for; never 0."""
    if isinstance(error, HpctrainError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        # As Python does it, but that a failure is never 0.
        return (error.code & 0xFF if isinstance(error.code, int) else 1) or ExitCode.BUG
    return ExitCode.BUG


def end_quietly_if_uncaught(error: HpctrainError) -> None:
    """Have the process end with the error's message and code, should it come to the top."""
    previous = sys.excepthook

    def uncaught(
        kind: type[BaseException], found: BaseException, trace: TracebackType | None
    ) -> None:
        if found is not error:
            previous(kind, found, trace)
            return
        if not error.reported:
            report_once(error)
        # To Python what a hook raises is an error of its own, but for this.
        raise SystemExit(int(error.exit_code))

    sys.excepthook = uncaught


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """This rank among the others, which stand around the whole of a program.

    `python -m hpctrain run` connects them before the program's first line, and has them watched
    until after its last. What the program makes of them, by `hpctrain.connect()` or a Trainer,
    again and again, is of these ranks.

    Attributes:
        guard: ends the job for a failure of this rank.
    """

    topology: Topology
    communicator: Communicator
    guard: Guard


_here: list[Standing] = []


def standing() -> Standing | None:
    """Return the ranks that stand around this program; None where there are none."""
    return _here[0] if _here else None


@contextmanager
def stands(ranks: Standing) -> Iterator[None]:
    """Have these ranks stand around the body, which is a whole program."""
    _here.append(ranks)
    try:
        yield
    finally:
        _here.clear()
