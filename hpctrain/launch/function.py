"""`hpctrain.launch(function, np=4)`: ranks from within a notebook or a script.

The ranks are processes of their own, under the mpirun of the bound MPI, so that the notebook's
kernel never calls MPI_Init, and lives on whatever becomes of them.
"""

from __future__ import annotations

import codecs
import os
import pickle
import selectors
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from hpctrain.config.choices import (
    ACCELERATOR,
    PRECISION,
    STRATEGY,
    device_of,
    is_preparing,
    precision_of,
    training_of,
)
from hpctrain.errors import LaunchError, TrainingError
from hpctrain.launch.environment import this_process
from hpctrain.launch.function_rank import CALL, RESULT, Failed, Handover, pickled_call
from hpctrain.launch.start_ranks import command_here, find_launch
from hpctrain.utils.permissions import new_private_folder
from hpctrain.utils.proc import start_time

_SOURCE = Path(__file__).parents[2]
_SCRIPT = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from hpctrain.launch.function_rank import main; main()"
)
_STORY_LINES = 12
_WAIT_SECONDS = 0.5
_END_SECONDS = 10.0


class RankTracebackError(Exception):
    """The traceback of a rank, as the cause of what is raised here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def launch(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    np: int,
    accelerator: str | None = None,
    precision: str | int | None = None,
    strategy: str | None = None,
) -> Any:
    """Call a function on ranks of this node, and return what it returns on rank 0.

    What rank 0 prints is shown here as it comes, and so is what all of them say on stderr. An
    interrupt is one of the ranks; a second one ends them.

    Args:
        function: makes its world by `hpctrain.connect()` or `hpctrain.lightning.Trainer`. Of a
            notebook or script it travels by cloudpickle, from a module by its name.
        args: for it.
        kwargs: for it.
        np: how many ranks to start.
        accelerator: "cpu", "gpu", ..., where the function says nothing itself.
        precision: "32", "bf16-mixed", ..., the same.
        strategy: "ddp", "fsdp", ..., the same.

    Raises:
        LaunchError: if the ranks cannot be started, one of them ends without an error message, or
            this process is a rank itself.
        Exception: that the function has raised on a rank, whose traceback is its cause.
    """
    _refuse_within_a_world(np)
    if is_preparing():
        sys.stderr.write("hpctrain: prepared up to hpctrain.launch(): nothing is trained here\n")
        raise SystemExit(0)
    chosen = _chosen(accelerator, precision, strategy)
    call = pickled_call(function, tuple(args), dict(kwargs or {}))
    folder = new_private_folder("hpctrain-launch-")
    handover = Handover(folder)
    try:
        handover.write(CALL, pickle.dumps((list(sys.path), call)))
        code, said = _run(folder, np, chosen)
        return _outcome(handover, code, said)
    finally:
        handover.close()
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_within_a_world(np: int) -> None:
    """Refuse to start ranks from a rank, or from within a world of one process.

    Raises:
        LaunchError: if this process is one, or np is no number of ranks.
    """
    from hpctrain.launch.process_group import is_in_use

    if np < 1:
        raise LaunchError(f"np={np}: at least one process is needed")
    claim = this_process()
    if claim.launcher is not None and claim.world_size != 1:
        raise LaunchError(
            f"hpctrain.launch() starts ranks of its own, but {claim.launcher.label} has started "
            "this process as one already: call the function itself",
            everywhere=True,
        )
    if is_in_use():
        raise LaunchError(
            "hpctrain.launch() was called within hpctrain.connect() of this process: leave that "
            "first"
        )


def _chosen(
    accelerator: str | None, precision: str | int | None, strategy: str | None
) -> dict[str, str]:
    """Return what is chosen for the function, as variables.

    Raises:
        ConfigError: if there is nothing of that name.
    """
    chosen = {}
    for variable, value, check in (
        (ACCELERATOR, accelerator, device_of),
        (PRECISION, precision, precision_of),
        (STRATEGY, strategy, training_of),
    ):
        if value is not None:
            check(str(value))
            chosen[variable] = str(value)
    return chosen


def _command(folder: Path, np: int) -> tuple[list[str], dict[str, str]]:
    """Return the command of the ranks, and its environment.

    Raises:
        LaunchError: if there is nothing to start them with.
    """
    pid = os.getpid()
    words = ["-c", _SCRIPT, str(_SOURCE), str(folder), str(pid), str(start_time(pid))]
    if np == 1:
        return [sys.executable, *words], dict(os.environ)
    try:
        found = find_launch(np)
    except LaunchError:
        return command_here(np, words)
    return [*found.arguments, sys.executable, *words], dict(found.environment)


def _run(folder: Path, np: int, chosen: Mapping[str, str]) -> tuple[int, str]:
    """Run the ranks to their end, and return their exit code and the end of what they said."""
    command, environment = _command(folder, np)
    environment |= {"PYTHONUNBUFFERED": "1", **chosen}
    if environment.get("MPLBACKEND", "").startswith("module://"):
        del environment["MPLBACKEND"]  # of the notebook, which the ranks are not in
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        # What interrupts the notebook is handed on once, and to the ranks.
        start_new_session=True,
    )
    interrupts = 0
    shown = _Shown(process)
    try:
        while True:
            try:
                shown.to_the_end()
                process.wait()
                break
            except KeyboardInterrupt:
                interrupts += 1
                _interrupt(process, folder, for_good=interrupts > 1)
    finally:
        if process.poll() is None:
            _interrupt(process, folder, for_good=True)
        shown.close()
    if interrupts:
        raise KeyboardInterrupt
    return process.returncode, shown.said


class _Shown:
    """Shows what a process writes as it comes, in the thread that reads: a notebook's cell."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.said = ""
        self._selector = selectors.DefaultSelector()
        for stream, name in ((process.stdout, "stdout"), (process.stderr, "stderr")):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            self._selector.register(stream, selectors.EVENT_READ, (name, decoder))

    def to_the_end(self) -> None:
        """Return when both streams are closed."""
        while self._selector.get_map():
            for key, _ in self._selector.select(_WAIT_SECONDS):
                self._show(key.fileobj, *key.data)

    def close(self) -> None:
        """Close what is left."""
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _show(self, stream: Any, name: str, decoder: codecs.IncrementalDecoder) -> None:
        data = os.read(stream.fileno(), 65536)
        text = decoder.decode(data, final=not data)
        if not data:
            self._selector.unregister(stream)
            stream.close()
        out: IO[str] = getattr(sys, name)
        out.write(text)
        out.flush()
        if name == "stderr":
            self.said = (self.said + text)[-65536:]


def _interrupt(process: subprocess.Popen[bytes], folder: Path, *, for_good: bool) -> None:
    """Send the ranks a SIGINT, or end them."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        return
    ranks = [each for each in below if str(folder) in _words(each)] or [process]
    for each in ranks:
        try:
            each.send_signal(signal.SIGKILL if for_good else signal.SIGINT)
        except (psutil.Error, OSError):
            continue
    if for_good:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _words(process: psutil.Process) -> list[str]:
    try:
        words = process.cmdline()
    except psutil.Error:
        return []
    # mpirun and its proxies have the command of the ranks in theirs.
    return words if words[1:2] == ["-c"] else []


def _outcome(handover: Handover, code: int, said: str) -> Any:
    """Return what came of the ranks.

    Raises:
        LaunchError: if they ended without an error message of their own.
        Exception: that the function has raised on a rank.
    """
    failures = handover.failures()
    if failures:
        raise _as_exception(failures[0]) from RankTracebackError(
            f"rank {failures[0].rank}@{failures[0].host}:\n{failures[0].text}"
        )
    result = handover.read(RESULT)
    if code == 0 and result is not None:
        return pickle.loads(result)
    lines = [line for line in said.splitlines() if line.startswith("hpctrain: ")]
    report = "\n".join((lines or said.splitlines())[-_STORY_LINES:])
    raise LaunchError(f"the ranks have ended with exit code {code}:\n{report}")


def _as_exception(failed: Failed) -> BaseException:
    if failed.error is not None:
        error: BaseException = pickle.loads(failed.error)
        return error
    last = failed.text.strip().splitlines()[-1]
    return TrainingError(f"the function failed on rank {failed.rank}@{failed.host}: {last}")
