"""Worker processes and threads: started when they are first needed, doing jobs side by side."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe, reduction
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from hpctrain.config.importing import build_transform
from hpctrain.data.arrays import UInt64s
from hpctrain.data.loading.worker import IGNORED, SampleError, SampleRunner, SampleTransform, Slot

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


JobT_contra = TypeVar("JobT_contra", contravariant=True)
ResultT_co = TypeVar("ResultT_co", covariant=True)


class Worker(Protocol[JobT_contra, ResultT_co]):
    """Does one job after the other."""

    def run(self, job: JobT_contra) -> ResultT_co:
        """Do a job.

        Raises:
            SampleError: with the index of the sample in the job, if the user's code fails.
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
        self._name = f'{key} = "{reference}"'
        self._process = WorkerProcess(
            f"{key}: the rank could make the transform",
            "hpctrain.data.loading.worker:serve_transform",
            (key, reference, dict(arguments)),
            environment,
        )
        self._known: set[Slot] = set()

    def run(self, job: Job) -> None:
        try:
            self._process.start()
            answer = self._ask(job)
        except (EOFError, OSError) as error:
            worker = f"{self._name}: a worker process"
            message = self._process.exit_message(worker, "sample transforms")
            self.close()
            raise WorkerError(message) from error
        if isinstance(answer, SampleError):
            raise answer

    def close(self) -> None:
        self._process.close()
        self._known.clear()

    def _ask(self, job: Job) -> SampleError | None:
        slot, connection = job.slot, self._process.connection
        layout = None if slot in self._known else slot.layout
        connection.send((id(slot), layout, job.start, job.stop, job.keys, job.training))
        if layout is not None:
            reduction.send_handle(connection, slot.descriptor, self._process.pid)
            self._known.add(slot)
        answer: SampleError | None = connection.recv()
        return answer


J = TypeVar("J")
R = TypeVar("R")


class Workers(Generic[J, R]):
    """Workers that do jobs side by side.

    Attributes:
        size: how many jobs are done at a time.
    """

    def __init__(self, workers: Sequence[Worker[J, R]]) -> None:
        self.size = len(workers)
        self._workers = workers
        self._idle: queue.SimpleQueue[Worker[J, R]] = queue.SimpleQueue()
        for worker in workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(len(workers), thread_name_prefix="hpctrain-samples")

    def submit(self, job: J) -> Future[R]:
        """Have a job done; the future raises what its worker does."""
        return self._threads.submit(self._do, job)

    def close(self) -> None:
        """End processes; they start again when they are needed. No job may be under way."""
        for worker in self._workers:
            worker.close()

    def _do(self, job: J) -> R:
        worker = self._idle.get()
        try:
            return worker.run(job)
        finally:
            self._idle.put(worker)


class WorkerPool(Workers[Job, None]):
    """Workers that transform samples.

    Attributes:
        transform: what is done, for the rank itself to try.
    """

    def __init__(self, transform: SampleTransform, workers: Sequence[Worker[Job, None]]) -> None:
        super().__init__(workers)
        self.transform = transform

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
