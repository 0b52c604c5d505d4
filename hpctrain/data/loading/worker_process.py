"""A process that works for a rank: started afresh when it is first needed, and ended with it.

It is not forked, and imports nobody's main module. What it does is a function of ours, which gets
the connection to the rank.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from typing import Any

from hpctrain.data.loading.worker import IGNORED

# Its path is that of the rank, and no main module of anybody's is imported.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from hpctrain.data.loading.worker import main; main()"
)
_LAST_SECONDS = 5.0


class WorkerError(Exception):
    """A worker process has ended, or cannot be started."""


class WorkerProcess:
    """One process, and the connection to it.

    Attributes:
        connection: to send and to receive; None while no process runs.
    """

    def __init__(
        self,
        name: str,
        service: str,
        hello: Any,
        environment: Mapping[str, str],
        descriptors: Sequence[int] = (),
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            name: of what it works for, for messages.
            service: the function that it runs, "package.module:name", given the connection.
            hello: what it is sent first; it answers None, or why it cannot serve.
            environment: of the process.
            descriptors: of files that it has too, under the same numbers.
        """
        self._name = name
        self._descriptors = descriptors
        self._service = service
        self._hello = hello
        # The rank's threads and other workers have the other cores.
        self._environment = {**environment, "OMP_NUM_THREADS": "1"}
        self._process: subprocess.Popen[bytes] | None = None
        self.connection: Any = None

    @property
    def pid(self) -> int:
        """Its number, while it runs."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> bool:
        """Start it if it does not run; tell whether it did not.

        Raises:
            WorkerError: if it cannot serve.
            EOFError, OSError: if it ends instead.
        """
        if self._process is not None:
            return False
        self.connection, theirs = Pipe()
        # From its first instant the process must not die of what the scheduler sends to all.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-X", "faulthandler", "-c", _START),
                    *(self._service, str(theirs.fileno()), json.dumps(sys.path)),
                ],
                stdin=subprocess.DEVNULL,
                env=self._environment,
                pass_fds=[theirs.fileno(), *self._descriptors],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self.connection.send(self._hello)
        refusal = self.connection.recv()
        if refusal is not None:
            self.close()
            raise WorkerError(f"{self._name}, but not a worker process: {refusal.rstrip()}")
        return True

    def close(self) -> None:
        """End it; it can be started again."""
        if self.connection is not None:
            self.connection.close()  # the process ends by itself
        if self._process is not None:
            try:
                self._process.wait(_LAST_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = self.connection = None

    def exit_message(self, worker: str, must_not: str) -> str:
        """Return how the process ended, for the message of the rank.

        Args:
            worker: what to call it.
            must_not: who must not end it.
        """
        if self._process is None:
            return f"{worker} could not be started"
        worker = f"{worker} (pid {self._process.pid})"
        try:
            code = self._process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{worker} does not answer"
        if code >= 0:
            return f"{worker} ended with exit code {code}; {must_not} must not end it"
        name = signal.Signals(-code).name
        hint = "; if nobody did that, the node may be out of memory" if name == "SIGKILL" else ""
        return f"{worker} was killed by {name}{hint}"
