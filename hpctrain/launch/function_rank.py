"""One rank of `hpctrain.launch(function)`: its entry point, and what it exchanges with its caller.

The function and its result are pickled, and pickle runs what it reads. So all of it lies in a
folder that is this user's alone, under a name that nobody knew before; whoever opens a file in
there has looked at the folder's owner and mode, and follows no link.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hpctrain.errors import LaunchError
from hpctrain.launch.environment import this_process
from hpctrain.utils.permissions import names_in, open_private
from hpctrain.utils.proc import start_time

CALL, RESULT, FAILED = "call", "result", "failed"


@dataclass(frozen=True, slots=True)
class Failed:
    """How the function failed on a rank.

    Attributes:
        error: pickled; None where pickle cannot take it.
        text: of the traceback.
    """

    rank: int
    host: str
    error: bytes | None
    text: str


class Handover:
    """The folder."""

    def __init__(self, folder: Path) -> None:
        """Open it.

        Raises:
            OSError: if it is not there, or not this user's alone.
        """
        self.folder = folder
        parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._folder = open_private(folder.name, parent, folder, make=False)
        finally:
            os.close(parent)

    def close(self) -> None:
        """Close the folder, and leave it."""
        os.close(self._folder)

    def write(self, name: str, data: bytes) -> None:
        """Write a file that is not there yet, whole before it has its name."""
        written = f"{name}.{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(written, flags, 0o600, dir_fd=self._folder), "wb") as file:
            file.write(data)
        os.rename(written, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def read(self, name: str) -> bytes | None:
        """Return what a file holds; None if it is not there.

        Raises:
            PermissionError: if it is not this user's own.
        """
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=self._folder)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if facts.st_uid != os.geteuid() or not stat.S_ISREG(facts.st_mode):
                raise PermissionError(f"{self.folder / name} is not this user's own")
            return file.read()

    def failures(self) -> list[Failed]:
        """Return how ranks have failed, the first one first."""
        names = [name for name in names_in(self._folder) if name.startswith(f"{FAILED}-")]
        names = [name for name in names if "." not in name]
        names.sort(key=lambda name: os.stat(name, dir_fd=self._folder).st_mtime_ns)
        return [pickle.loads(data) for name in names if (data := self.read(name)) is not None]


def pickled_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Return a call as bytes: by cloudpickle where it is there, which takes notebooks' functions.

    Raises:
        LaunchError: if that cannot be.
    """
    cloudpickle = find_cloudpickle()
    name = getattr(function, "__qualname__", repr(function))
    if cloudpickle is None and getattr(function, "__module__", None) in ("__main__", "__mp_main__"):
        raise LaunchError(
            f"{name} is defined in a notebook or script, which no other process imports: pip "
            "install cloudpickle, or put it into a module"
        )
    try:
        data: bytes = (cloudpickle or pickle).dumps((function, args, kwargs))
    except Exception as error:
        fix = "" if cloudpickle else "; pip install cloudpickle, which takes more than pickle"
        raise LaunchError(
            f"{name} or its arguments cannot be handed to other processes: "
            f"{type(error).__name__}: {error}{fix}"
        ) from error
    return data


def pickled_result(result: Any) -> bytes:
    """Return what a rank's function has returned as bytes.

    Raises:
        LaunchError: if that cannot be.
    """
    try:
        data: bytes = (find_cloudpickle() or pickle).dumps(result)
    except Exception as error:
        raise LaunchError(
            f"what the function returned on rank 0, a {type(result).__name__}, cannot be handed "
            f"back: {type(error).__name__}: {error}"
        ) from error
    return data


def pickled_failure(rank: int, host: str, error: BaseException) -> bytes:
    """Return how a function has failed on a rank as bytes."""
    text = "".join(traceback.format_exception(error))
    data: bytes | None = None
    try:
        data = (find_cloudpickle() or pickle).dumps(error)
        pickle.loads(data)  # some can be written, and not made again
    except Exception:  # noqa: BLE001 - whatever an object's own method raises
        data = None
    return pickle.dumps(Failed(rank=rank, host=host, error=data, text=text))


def find_cloudpickle() -> ModuleType | None:
    """Return cloudpickle, None where it is not installed."""
    try:
        import cloudpickle  # type: ignore[import-untyped]
    except ImportError:
        return None
    module: ModuleType = cloudpickle
    return module


_LOOK_SECONDS = 2.0
_GRACE_SECONDS = 30.0


def main() -> None:
    """Call the function in the folder that the command line names."""
    folder, caller, began = sys.argv[-3:]
    handover = Handover(Path(folder))
    _end_with(int(caller), began)
    claim = this_process()
    if claim.launcher is None or claim.world_size == 1:
        _call(handover, rank=0, is_alone=True)
        return
    from hpctrain.launch.process_group import standing_ranks

    with standing_ranks(claim) as ranks:
        rank = ranks.topology.rank
        # What ends the job from within connect() comes to no handler of ours.
        ranks.guard.on_failure = lambda error: _record(handover, rank, error)
        _call(handover, rank, is_alone=False)


def _call(handover: Handover, rank: int, *, is_alone: bool) -> None:
    if rank != 0:
        _silence()
    try:
        data = handover.read(CALL)
        assert data is not None
        paths, call = pickle.loads(data)
        sys.path[:] = paths  # modules are found where the caller finds them
        function, args, kwargs = pickle.loads(call)
        # Runs are called after the program.
        sys.argv[:] = [getattr(function, "__name__", "function")]
        result = _result_of(function, args, kwargs)
        if rank == 0:
            handover.write(RESULT, pickled_result(result))
    except BaseException as error:
        # A rank that fails by itself leaves word at the end of the job, if it is the cause.
        if is_alone or getattr(error, "everywhere", False):
            _record(handover, rank, error)
        raise


def _result_of(function: Any, args: Any, kwargs: Any) -> Any:
    """Return what the function returns; `sys.exit(0)` returns None."""
    try:
        return function(*args, **kwargs)
    except SystemExit as asked:
        if asked.code not in (0, None):
            raise
    return None


def _record(handover: Handover, rank: int, error: BaseException) -> None:
    """Leave word of a failure to the caller."""
    handover.write(f"{FAILED}-{rank}", pickled_failure(rank, socket.gethostname(), error))


def _silence() -> None:
    """Lead stdout nowhere: rank 0's is what the caller shows."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _end_with(caller: int, began: str) -> None:
    """End this rank if the notebook or script that has started it is gone."""

    def look() -> None:
        while start_time(caller) == began:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=look, name="hpctrain-caller", daemon=True).start()
