"""How far a tool is: lines now and then, a bar for people, and nothing where nobody listens."""

from __future__ import annotations

import io

import pytest

from hpctrain.observe.progress import TOOL_LINE_SECONDS, ToolProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


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
