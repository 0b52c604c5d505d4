"""Starts, feeds and ends the workers of `data.sample_transform`: threads, or processes."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe, reduction
from typing import Any, NamedTuple, Protocol

from hpctrain.config.importing import build_transform
from hpctrain.data.loading.sample_transform import SampleError, SampleRunner, SampleTransform
from hpctrain.data.loading.worker import IGNORED, Slot
from hpctrain.data.permutation import UInt64s

# Its path is that of the rank, and no main module of anybody's is imported.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from hpctrain.data.loading.worker import main; main()"
)
_LAST_SECONDS = 5.0


class WorkerError(Exception):
    """A worker process has ended, or cannot be started."""


class Job(NamedTuple):
    """Some rows of a slot, to be transformed.

    Attributes:
        slot: that holds them, and takes what is made of them.
        start, stop: the rows.
        keys: (stop - start,) uint64.
        training: False in an evaluation.
    """

    slot: Slot
    start: int
    stop: int
    keys: UInt64s
    training: bool


class Worker(Protocol):
    """Does one job after the other."""

    def run(self, job: Job) -> None:
        """Transform rows.

        Raises:
            SampleError: with the index of the sample in the job, if the transform fails.
            WorkerError: if the worker has ended.
        """
        ...

    def close(self) -> None:
        """Let go of everything. It can be used again."""
        ...


class ThreadWorker:
    """Transforms in the thread that it is called from."""

    def __init__(self, transform: SampleTransform) -> None:
        self._runner = SampleRunner(transform)

    def run(self, job: Job) -> None:
        rows = slice(job.start, job.stop)
        self._runner.fill(
            {name: array[rows] for name, array in job.slot.inputs.items()},
            job.keys,
            {name: array[rows] for name, array in job.slot.outputs.items()},
            training=job.training,
        )

    def close(self) -> None:
        pass


class ProcessWorker:
    """Has a process of its own transform, started with the first job."""

    def __init__(
        self,
        key: str,
        reference: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> None:
        """Prepare.

        Args:
            key: of the config that names the transform.
            reference: the transform, "package.module:Name".
            arguments: its arguments.
            environment: of the process.
        """
        self._transform = (key, reference, dict(arguments))
        # The rank's threads and other workers have the other cores.
        self._environment = {**environment, "OMP_NUM_THREADS": "1"}
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Any = None
        self._known: set[Slot] = set()

    def run(self, job: Job) -> None:
        try:
            if self._process is None:
                self._start()
            answer = self._ask(job)
        except (EOFError, OSError) as error:
            message = self._exit_message()
            self.close()
            raise WorkerError(message) from error
        if isinstance(answer, SampleError):
            raise answer

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()  # the process ends by itself
        if self._process is not None:
            try:
                self._process.wait(_LAST_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = self._connection = None
        self._known.clear()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        # From its first instant the process must not die of what the scheduler sends to all.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-X", "faulthandler", "-c", _START),
                    *(str(theirs.fileno()), json.dumps(sys.path)),
                ],
                stdin=subprocess.DEVNULL,
                env=self._environment,
                pass_fds=[theirs.fileno()],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._connection.send(self._transform)
        refusal = self._connection.recv()
        if refusal is not None:
            self.close()
            raise WorkerError(
                f"{self._transform[0]}: the rank could make the transform, but not a worker "
                f"process: {refusal.rstrip()}"
            )

    def _ask(self, job: Job) -> SampleError | None:
        slot = job.slot
        layout = None if slot in self._known else slot.layout
        message = (id(slot), layout, job.start, job.stop, job.keys, job.training)
        self._connection.send(message)
        if layout is not None:
            assert self._process is not None
            reduction.send_handle(self._connection, slot.descriptor, self._process.pid)
            self._known.add(slot)
        answer: SampleError | None = self._connection.recv()
        return answer

    def _exit_message(self) -> str:
        """Return how the process ended, for the message of the rank."""
        key, reference, _ = self._transform
        worker = f'{key} = "{reference}": a worker process'
        if self._process is None:
            return f"{worker} could not be started"
        worker = f"{worker} (pid {self._process.pid})"
        try:
            code = self._process.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{worker} does not answer"
        if code >= 0:
            return f"{worker} ended with exit code {code}; sample transforms must not end it"
        name = signal.Signals(-code).name
        hint = "; if nobody did that, the node may be out of memory" if name == "SIGKILL" else ""
        return f"{worker} was killed by {name}{hint}"


class WorkerPool:
    """Workers that transform samples side by side.

    Attributes:
        transform: what is done, for the rank itself to try.
        size: how many jobs are done at a time.
    """

    def __init__(self, transform: SampleTransform, workers: Sequence[Worker]) -> None:
        self.transform = transform
        self.size = len(workers)
        self._workers = workers
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(len(workers), thread_name_prefix="hpctrain-samples")

    @classmethod
    def of(
        cls,
        key: str,
        reference: str,
        arguments: Mapping[str, Any],
        workers: int,
        environment: Mapping[str, str] | None,
    ) -> WorkerPool:
        """Return a pool of so many threads, or, with an environment for them, processes.

        Raises:
            ConfigError: if the transform cannot be imported, or refuses its arguments.
        """
        transform = build_transform(key, reference, arguments)
        if environment is None:
            return cls(transform, [ThreadWorker(transform) for _ in range(workers)])
        return cls(
            transform,
            [ProcessWorker(key, reference, arguments, environment) for _ in range(workers)],
        )

    def submit(self, job: Job) -> Future[None]:
        """Have a job done; the future raises what its worker does."""
        return self._threads.submit(self._do, job)

    def close(self) -> None:
        """End processes; they start again when they are needed. No job may be under way."""
        for worker in self._workers:
            worker.close()

    def _do(self, job: Job) -> None:
        worker = self._idle.get()
        try:
            worker.run(job)
        finally:
            self._idle.put(worker)
