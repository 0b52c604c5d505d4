"""A worker process that transforms samples: what it does between its start and its end.

Started afresh, not forked, and by nobody's main module: MPI, torch and the rank's threads are not
in it. It has the rank's place in no world: those variables are not in its environment.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import traceback
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

from hpctrain.config.importing import build_transform
from hpctrain.data.loading.samples import SampleError, SampleRunner
from hpctrain.data.loading.slots import Slot
from hpctrain.errors import ConfigError

IGNORED = frozenset(
    {
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGXCPU,
    }
)
"""Signals that schedulers send to all processes of a job, of which the ranks decide."""


def main() -> None:
    """Serve the process at the other end of the socket whose descriptor is the last argument."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)  # blocked since before this process began
    descriptor = int(sys.argv.pop())
    threading.Thread(target=_end_with_rank, args=(descriptor,), daemon=True).start()
    connection = Connection(descriptor)
    try:
        _serve(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the rank has closed its end, or is gone


def _serve(connection: Any) -> None:
    key, reference, arguments = connection.recv()
    try:
        runner = SampleRunner(build_transform(key, reference, arguments))
    except ConfigError as error:
        connection.send(str(error))
        return
    except Exception:  # noqa: BLE001 - whatever the user's class raises
        connection.send(traceback.format_exc())
        return
    connection.send(None)
    slots: dict[int, Slot] = {}
    while True:
        number, layout, start, stop, keys, training = connection.recv()
        if layout is not None:
            slots[number] = Slot(layout, reduction.recv_handle(connection))
        slot = slots[number]
        rows = slice(start, stop)
        try:
            runner.fill(
                {name: array[rows] for name, array in slot.inputs.items()},
                keys,
                {name: array[rows] for name, array in slot.outputs.items()},
                training=training,
            )
        except SampleError as error:
            connection.send(error)
        else:
            connection.send(None)


def _end_with_rank(descriptor: int) -> None:
    """End at once when the rank does, also in the midst of a sample."""
    poll = select.poll()
    poll.register(descriptor, 0)  # hanging up is told always
    poll.poll()
    os._exit(0)
