"""Jobs as users start them: alone, under MPICH's mpirun, and those that are interrupted."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from helpers.launching import BODIES
from helpers.limits import JOB_SECONDS, LONG_JOB_SECONDS
from helpers.runs import metrics
from helpers.turns import ENDED, as_if_started, outputs_of
from hpctrain.cli import main


def command(ranks: int, *arguments: str) -> list[str]:
    """Return what starts a command line of hpctrain; 0 ranks are one process without a launcher."""
    launcher = ["mpirun", "-np", str(ranks)] if ranks else []
    return [*launcher, sys.executable, "-m", "hpctrain", *arguments]


def hpctrain(
    site: Path, ranks: int, *arguments: str, code: int = 0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end, which has to be that one."""
    result = subprocess.run(
        command(ranks, *arguments),
        cwd=site,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == code, f"{result.stdout}\n{result.stderr}"
    return result


def train(site: Path, ranks: int, *overrides: str, code: int = 0) -> str:
    """Run a job of the site's run.toml, and return all that it says."""
    result = hpctrain(site, ranks, "run.toml", *overrides, code=code)
    return result.stdout + result.stderr


def here(site: Path, *arguments: str, code: int = 0) -> str:
    """Run a command line in this process, which spares the start of one; return what it says.

    For jobs and tools of one process whose start and end are not what is tested.
    """
    told = io.StringIO()
    with as_if_started(site), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        ended = main(arguments)
    with warnings.catch_warnings():
        # A job that fails leaves its log and metrics open to the end of its process.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    assert ended == code, told.getvalue()
    return told.getvalue()


@dataclass(frozen=True, slots=True)
class Ended:
    """How one of several jobs has ended, and what all of its ranks have said."""

    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def in_turn(
    site: Path,
    ranks: int,
    *lines: Sequence[str],
    env: dict[str, str] | None = None,
) -> list[Ended]:
    """Run command lines one after the other on ranks that are started once.

    For jobs and bodies of tests/mpi that end on all ranks together, and whose start is not what is
    tested. Each is what it is by itself from there on: its modules, process group, watchdog and log
    are made anew.
    """
    launcher = ["mpirun", "-np", str(ranks)] if ranks else []
    result = subprocess.run(
        [*launcher, sys.executable, str(BODIES / "in_turn.py"), *map(json.dumps, lines)],
        cwd=site,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=LONG_JOB_SECONDS,
        check=False,
    )
    said = [_take_outputs(site, number) for number in range(len(lines))]
    codes = [line[len(ENDED) :] for line in result.stdout.splitlines() if line.startswith(ENDED)]
    told = "\n".join([result.stdout, result.stderr, *itertools.chain(*said)])
    assert (result.returncode, len(codes)) == (0, len(lines)), told
    return [Ended(int(code), *streams) for code, streams in zip(codes, said, strict=True)]


def _take_outputs(site: Path, number: int) -> list[str]:
    """Return what a job has printed on stdout and stderr, and remove the files of it."""
    said = []
    for path in outputs_of(site, number):
        said.append(path.read_text(encoding="utf-8") if path.exists() else "")
        path.unlink(missing_ok=True)
    return said


def train_in_turn(site: Path, ranks: int, *jobs: Sequence[str]) -> list[str]:
    """Run jobs of the site's run.toml that all train to their end; return what they say."""
    ended = in_turn(site, ranks, *(["run.toml", *overrides] for overrides in jobs))
    for each in ended:
        assert each.code == 0, each.output
    return [each.output for each in ended]


def undisturbed_metrics(site: Path, *overrides: str) -> list[dict[str, Any]]:
    """Return what a run leaves that nobody has ended, on two ranks of one thread."""
    hpctrain(site, 2, "run.toml", *overrides, env={"OMP_NUM_THREADS": "1"})
    return metrics(site / "runs" / "digits")


class Job:
    """A job that is interrupted while it runs: ranks under mpirun, or one process alone."""

    def __init__(self, site: Path, ranks: int, *overrides: str) -> None:
        self.process = subprocess.Popen(
            command(ranks, "run.toml", *overrides),
            cwd=site,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def rank(self, number: int) -> psutil.Process | None:
        """Return the process of a rank, None where it is not there (yet)."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if child.environ().get("PMI_RANK") == str(number):
                    return child
            except psutil.Error:
                continue
        return None

    def signal_rank(self, number: int, which: int) -> None:
        process = self.rank(number)
        assert process is not None
        process.send_signal(which)

    def wait(self) -> tuple[int, str]:
        """Return the exit code, once there is one, and all that the job has said."""
        try:
            output, _ = self.process.communicate(timeout=JOB_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, output

    def kill(self) -> None:
        """End all of it, if it is not over."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@contextmanager
def interruptible(site: Path) -> Iterator[Callable[..., Job]]:
    """Give what starts jobs of a site; those that still run are killed at the end."""
    with ExitStack() as stack:

        def start(ranks: int, *overrides: str) -> Job:
            job = Job(site, ranks, *overrides)
            stack.callback(job.kill)
            return job

        yield start
