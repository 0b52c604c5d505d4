"""Who watches: a table of ancestors, and this machine's own."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.observe.progress import Process, columns_watched

SHELL = (Process(20, "bash"), Process(10, "sshd"), Process(1, "systemd"))


@pytest.mark.parametrize(
    ("own", "names", "launcher_columns", "expected"),
    [
        # Alone: one's own stderr tells.
        (80, [], None, 80),
        (None, [], None, None),
        # MPICH and Intel MPI: pipes, whatever the launcher has.
        (None, ["hydra_pmi_proxy", "mpirun"], 120, 120),
        (None, ["hydra_pmi_proxy", "mpiexec.hydra", "mpirun"], 120, 120),
        (None, ["hydra_pmi_proxy", "mpirun"], None, None),
        # Open MPI: whatever it gives its ranks.
        (80, ["prterun"], None, None),
        (80, ["mpirun"], 120, 120),
        (None, ["orterun"], 120, 120),
        # On another node the launcher is out of sight.
        (None, ["prted"], None, None),
        (None, ["hydra_pmi_proxy"], None, None),
        # A wrapper script between launcher and rank.
        (None, ["wrap.sh", "bash", "hydra_pmi_proxy", "mpiexec"], 100, 100),
        # srun: its agent is no launcher; `srun --pty` gives a terminal that is one.
        (None, ["slurmstepd"], 100, None),
        (90, ["slurmstepd"], None, 90),
    ],
)
def test_the_launcher_decides(
    own: int | None, names: list[str], launcher_columns: int | None, expected: int | None
) -> None:
    ancestors = [Process(100 + i, name) for i, name in enumerate(names)]
    launchers = {
        process.pid for process in ancestors if process.name.startswith(("mpi", "prte", "orte"))
    }

    def columns_of(pid: int) -> int | None:
        assert pid == min(launchers), "only the nearest launcher is asked"
        return launcher_columns

    assert columns_watched(own, [*ancestors, *SHELL], columns_of) == expected


def test_nothing_above_the_launcher_is_read() -> None:
    def ancestors() -> Iterator[Process]:
        yield Process(5, "mpirun")
        raise AssertionError("read on")

    assert columns_watched(None, ancestors(), {5: 77}.get) == 77


ASK = "from hpctrain.observe.progress import terminal_columns; print(terminal_columns())"


def ask(command: list[str], stderr: int, term: str = "xterm") -> str:
    return subprocess.run(
        [*command, sys.executable, "-c", ASK],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "TERM": term},
        text=True,
        check=True,
        timeout=JOB_SECONDS,
    ).stdout.strip()


@pytest.fixture
def terminal() -> Iterator[int]:
    ours, theirs = pty.openpty()
    yield theirs
    os.close(ours)
    os.close(theirs)


@pytest.fixture
def launcher(tmp_path: Path) -> list[str]:
    """Stand in for MPICH's: a process named mpirun whose child has a pipe for its stderr."""
    script = tmp_path / "mpirun"
    script.write_text('#!/bin/bash\n"$@" 2> >(cat >&2)\n', encoding="utf-8")
    script.chmod(0o755)
    return [str(script)]


def test_own_terminal(terminal: int) -> None:
    assert ask([], terminal) == "80"
    assert ask([], subprocess.DEVNULL) == "None"
    assert ask([], subprocess.PIPE) == "None"


def test_dumb_terminals_get_no_bar(terminal: int) -> None:
    assert ask([], terminal, term="dumb") == "None"


def test_terminal_of_the_launcher(terminal: int, launcher: list[str]) -> None:
    assert ask(launcher, terminal) == "80"
    assert ask(launcher, subprocess.DEVNULL) == "None"
    assert ask(launcher, subprocess.PIPE) == "None"
