"""What happens when one rank fails and the others do not know: its story once, then the end.

No collective runs on this path: the others may be anywhere. MPI_Abort, or the launcher that sees a
process die, ends them.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from hpctrain.batch.outcome import read_outcome, write_outcome
from hpctrain.errors import CheckpointError, ExitCode, HpctrainError
from hpctrain.launch.mpi import abort
from hpctrain.topology import Topology
from hpctrain.version import __version__

_ABORT_SECONDS = 2.0
_HERE = Path(__file__).parent


class Guard:
    """Ends the whole job for a failure of this rank alone.

    Attributes:
        folder: where the crash report goes; None while no run folder is known.
        step: the last step that this rank finished, for the report.
    """

    def __init__(self, topology: Topology) -> None:
        self.folder: Path | None = None
        self.step: int | None = None
        self._topology = topology

    def end_job(
        self,
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        """Tell what failed, write the crash report, and end all ranks. Does not return.

        Not collective: this is how a rank leaves alone.
        """
        code = exit_code(error)
        # Whatever MPI_Abort or a full disk does: this process is gone soon.
        timer = threading.Timer(_ABORT_SECONDS, os._exit, (code,))
        timer.daemon = True
        timer.start()
        text = self._story(error, trace)
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()
        if self.folder is not None:
            _write_report(self.folder, self._report(code, text))
        # Time for the launcher to carry the story out before it ends everybody.
        time.sleep(0.2)
        abort(code)
        os._exit(code)

    def _story(self, error: BaseException, trace: TracebackType | None) -> str:
        who = f"rank {self._topology.rank}@{self._topology.host}"
        if isinstance(error, HpctrainError):
            return f"hpctrain: error on {who}: {error}\n"
        while trace is not None and Path(trace.tb_frame.f_code.co_filename).parent == _HERE:
            trace = trace.tb_next  # our own context managers are not the story
        lines = traceback.format_exception(type(error), error, trace)
        return f"hpctrain: {who} failed and ends the job:\n{''.join(lines)}"

    def _report(self, code: int, text: str) -> dict[str, object]:
        return {
            "rank": self._topology.rank,
            "world_size": self._topology.world_size,
            "host": self._topology.host,
            "step": self.step,
            "code": code,
            "traceback": text,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": {
                "hpctrain": __version__,
                "python": platform.python_version(),
                "mpi": self._topology.mpi,
            },
        }


@contextmanager
def guard(topology: Topology) -> Iterator[Guard]:
    """End the whole job if the body fails on this rank alone.

    A failure that all ranks share (`HpctrainError.everywhere`) passes through, and so does every
    HpctrainError of a single process: they leave by the normal path.
    """
    keeper = Guard(topology)
    previous = threading.excepthook

    def thread_failed(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None:
            keeper.end_job(failed.exc_value, failed.exc_traceback)

    threading.excepthook = thread_failed
    try:
        yield keeper
    except BaseException as error:
        shared = topology.world_size == 1 or getattr(error, "everywhere", False)
        if isinstance(error, HpctrainError) and shared:
            raise
        keeper.end_job(error, error.__traceback__)
    finally:
        threading.excepthook = previous


def exit_code(error: BaseException) -> int:
    """Return the exit code that a failure asks for; never 0."""
    if isinstance(error, HpctrainError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code != 0:
        return error.code
    return ExitCode.BUG


def _write_report(folder: Path, report: dict[str, object]) -> None:
    """Write crash-rank-N.json, and exit.json for whoever looks after the job."""
    try:
        path = folder / f"crash-rank-{report['rank']}.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        running = read_outcome(folder)
        if running is not None:
            reason = f"rank {report['rank']} on {report['host']} failed: see {path.name}"
            write_outcome(folder, replace(running, code=int(str(report["code"])), reason=reason))
    except (OSError, CheckpointError) as error:
        sys.stderr.write(f"hpctrain: no crash report: {error}\n")
