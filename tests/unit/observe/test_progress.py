"""The progress of a run, on a clock that the test moves."""

from __future__ import annotations

import io
import math

import pytest

from hpctrain.observe import progress
from hpctrain.observe.progress import Progress, allowance, progress_text, seconds_until_allowed


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
