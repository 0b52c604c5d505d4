"""Progress of training and tools: few bytes, the right line at the right time, a bar if watched."""

from __future__ import annotations

import io
import math
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.observe import progress
from hpctrain.observe.progress import (
    TOOL_LINE_SECONDS,
    Process,
    Progress,
    ToolProgress,
    allowance,
    columns_watched,
    progress_text,
    seconds_until_allowed,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, lines: list[str], **options: object) -> Progress:
    return Progress(
        clock=clock, write=lines.append, **{"mode": "lines", "total_steps": 276, **options}
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"step": 1, "total_steps": 9, "epoch": 0}, "step 1/9  epoch 0"),
        (
            {
                "step": 120,
                "total_steps": 276,
                "epoch": 4,
                "total_epochs": 12,
                "loss": 0.12341,
                "samples_per_second": 4560.4,
                "seconds_left": 31.2,
            },
            "step 120/276  epoch 4/12  loss 0.1234  4,560 samples/s  0:00:31 left",
        ),
        (
            {"step": 1000, "total_steps": 20000, "epoch": 1999, "loss": math.nan},
            "step 1,000/20,000  epoch 1,999  loss nan",
        ),
        ({"step": 5, "total_steps": 9, "epoch": 0, "loss": 0.0}, "step 5/9  epoch 0  loss 0"),
    ],
)
def test_text(facts: dict[str, float], expected: str) -> None:
    assert progress_text(**facts) == expected  # type: ignore[arg-type]


def test_lines_come_soon_and_then_at_the_interval() -> None:
    clock, lines = Clock(), list[str]()
    reporter = make(clock, lines, total_epochs=12)
    told = []
    for step in range(1, 71):
        clock.now += 1.0
        reporter.update(step, epoch=step // 23)
        if step % 10 == 0:
            reporter.update(step, step // 23, loss=1 / step, samples_per_second=64.0)
        told += [step] * (len(lines) - len(told))
    assert told == [5, 35, 65]
    assert lines == [
        "step 5/276  epoch 0/12  0:04:31 left",
        "step 35/276  epoch 1/12  loss 0.03333  64.0 samples/s  0:04:01 left",
        "step 65/276  epoch 2/12  loss 0.01667  64.0 samples/s  0:03:31 left",
    ]
    reporter.close()
    reporter.close()
    reporter.update(71, 3)
    assert lines[3:] == ["step 70/276  epoch 3/12  loss 0.01429  64.0 samples/s  0:03:26 left"]


def test_nothing_is_told_twice_at_the_end() -> None:
    clock, lines = Clock(), list[str]()
    reporter = make(clock, lines, every_seconds=1.0)
    reporter.update(1, 0)
    clock.now += 1.0
    reporter.update(2, 0)
    reporter.close()
    assert lines == ["step 2/276  epoch 0  0:04:34 left"]


def test_a_job_without_a_step_tells_nothing() -> None:
    lines: list[str] = []
    make(Clock(), lines, start_step=276).close()
    assert lines == []


def test_time_left_counts_this_jobs_steps_only() -> None:
    clock, lines = Clock(), list[str]()
    reporter = make(clock, lines, start_step=200, every_seconds=1.0)
    clock.now += 50  # the first step compiles
    reporter.update(201, 8)
    clock.now += 2
    reporter.update(202, 8)
    assert lines == ["step 202/276  epoch 8  0:02:28 left"]


@pytest.mark.parametrize("every_seconds", [0.01, 5.0, 30.0, 600.0])
def test_a_day_of_lines_is_below_100_kb(every_seconds: float) -> None:
    clock, stamped = Clock(), list[tuple[float, int]]()

    def write(line: str) -> None:
        assert "\r" not in line
        assert "\x1b" not in line
        assert "\n" not in line
        stamped.append((clock.now, len(line) + 1 + len("2026-01-01 00:00:00  ")))

    reporter = Progress(
        10**9,
        total_epochs=10**5,
        mode="lines",
        every_seconds=every_seconds,
        clock=clock,
        write=write,
    )
    start, step, pace = clock.now, 0, 0.05
    while clock.now < start + 3 * progress.DAY_SECONDS:
        step += 1
        # As time goes by, in longer strides; an epoch is over, and noted, every 20 steps.
        pace = min(1.0, pace * 1.001)
        clock.now += pace
        reporter.update(10**8 + step, step // 20, loss=1.2345e-5, samples_per_second=123456.0)
        if step % 20 == 0:
            reporter.note(f"epoch {step // 20}: validation loss 0.1234  accuracy 0.9876")
    reporter.close()
    for begin in range(0, int(2 * progress.DAY_SECONDS), 3600):
        window = [
            num_bytes
            for when, num_bytes in stamped
            if begin <= when - start < begin + progress.DAY_SECONDS
        ]
        assert sum(window) <= 100_000
        # And the log does not fall silent: at the least a line every 20 minutes.
        assert len(window) > 72


def test_a_short_job_gets_the_lines_that_it_asked_for() -> None:
    clock, lines = Clock(), list[str]()
    reporter = make(clock, lines, every_seconds=30.0)
    for step in range(1, 1801):
        clock.now += 1.0
        reporter.update(step, 0, 0.1234, 4560.0)
    assert len(lines) == 60


def test_allowance_and_its_inverse() -> None:
    day = progress.DAY_SECONDS
    assert allowance(0) == progress.BURST_BYTES
    assert allowance(day) == progress.DAY_BYTES < 100_000
    for seconds in (0.0, 1.0, 60.0, day / 2, day, 1.5 * day, 30 * day):
        assert seconds_until_allowed(allowance(seconds)) == pytest.approx(seconds, abs=1e-6)
        assert allowance(seconds + day) - allowance(seconds) <= progress.DAY_BYTES
    assert seconds_until_allowed(10) == 0


def test_none_tells_nothing() -> None:
    clock, lines, stream = Clock(), list[str](), io.StringIO()
    reporter = make(clock, lines, mode="none", stream=stream)
    for step in range(1, 100):
        clock.now += 60
        reporter.update(step, 0, 0.1, 1.0)
    reporter.note("evaluated")
    reporter.close()
    assert lines == []
    assert stream.getvalue() == ""


def test_bar() -> None:
    clock, lines, stream = Clock(), list[str](), io.StringIO()
    reporter = make(clock, lines, mode="bar", stream=stream, total_steps=200, total_epochs=2)
    reporter.update(1, 0)
    for step in range(2, 51):
        clock.now += 0.01
        reporter.update(step, 0)
    reporter.update(50, 0, 0.5, 1234.5)
    drawn = stream.getvalue().split("\r")
    # Drawn at the start, at the first step, and 0.2 and 0.4 s after it.
    assert [state.split("| ")[-1].strip() for state in drawn[1:]] == [
        "",
        "step 1/200  epoch 0/2",
        "step 21/200  epoch 0/2  0:00:02 left",
        "step 41/200  epoch 0/2  0:00:02 left",
    ]
    reporter.close()
    final = stream.getvalue().split("\r")[-1]
    assert final.startswith(" 25%|")
    assert final.rstrip(" ").endswith(
        "| step 50/200  epoch 0/2  loss 0.5  1,234 samples/s  0:00:02 left\n"
    )
    assert max(len(state.rstrip("\n")) for state in drawn) <= 80
    assert lines == []


def test_auto_is_lines_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "terminal_columns", lambda: None)
    clock, lines, stream = Clock(), list[str](), io.StringIO()
    make(clock, lines, mode="auto", stream=stream).update(1, 0)
    assert stream.getvalue() == ""


def test_auto_is_a_bar_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "terminal_columns", lambda: 50)
    stream = io.StringIO()
    reporter = make(Clock(), [], mode="auto", stream=stream)
    reporter.update(1, 0, 0.1, 1e6)
    reporter.close()
    widths = [len(state.rstrip("\n")) for state in stream.getvalue().split("\r")]
    assert max(widths) == 50


@pytest.mark.parametrize("gone_at", ["update", "close"])
def test_a_terminal_that_is_gone_does_not_end_training(gone_at: str) -> None:
    class Terminal(io.StringIO):
        gone = False

        def write(self, text: str) -> int:
            if self.gone:
                raise BrokenPipeError(32, "Broken pipe")
            return super().write(text)

    stream = Terminal()
    reporter = make(Clock(), [], mode="bar", stream=stream)
    stream.gone = gone_at == "update"
    reporter.update(1, 0)
    stream.gone = True
    reporter.update(2, 0)
    reporter.close()
    stream.gone = False  # tqdm's bar is closed once more when it is collected


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


@pytest.mark.parametrize("seconds", [0.0, TOOL_LINE_SECONDS - 1])
def test_what_is_quick_tells_nothing(seconds: float) -> None:
    clock, stream = Clock(), io.StringIO()
    progress = ToolProgress("pack:", clock=clock, stream=stream)
    progress(0, 10)
    clock.now += seconds
    progress(10, 10)
    progress.close()
    assert stream.getvalue() == ""


def test_lines() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = ToolProgress("pack:", clock=clock, stream=stream)
    for done in range(0, 3001, 10):
        progress(done, 3000)
        clock.now += 0.5
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "pack: 600/3,000  20 %  0:02:00 left"
    assert len(lines) == 5


def test_a_bar() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = ToolProgress("verify:", clock=clock, stream=stream, columns=60)
    for done in range(5):
        progress(done, 4)
        clock.now += 1
    progress.close()
    assert "verify: 4/4" in stream.getvalue()
    assert stream.getvalue().endswith("\n")


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("columns", [None, 60])
def test_nobody_listens(columns: int | None) -> None:
    clock = Clock()
    progress = ToolProgress("pack:", clock=clock, stream=Gone(), columns=columns)
    for done in range(100):
        progress(done, 100)
        clock.now += 10
    progress.close()
