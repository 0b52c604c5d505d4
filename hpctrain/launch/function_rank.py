"""One rank of `hpctrain.launch(function)`: our own entry point, which calls the function."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hpctrain.launch.environment import this_process
from hpctrain.launch.handover import (
    CALL,
    FAILED,
    RESULT,
    Handover,
    pickled_failure,
    pickled_result,
)
from hpctrain.utils.proc import start_time

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
        ranks.guard.leave_word = lambda error: _record(handover, rank, error)
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
