"""Runs in a terminal, in a pipe, in 60 columns, without colours; whatever stands in their files."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import time
from pathlib import Path

import pytest
from helpers.made_runs import append, append_machines, made_run, record

from hpctrain.cli import main
from hpctrain.errors import ExitCode
from hpctrain.watch.report import gathered
from hpctrain.watch.run_files import RunFiles
from hpctrain.watch.terminal import Style, show

CODES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


class Terminal(io.TextIOWrapper):
    """What a terminal would be sent."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding)

    def isatty(self) -> bool:
        return True

    def sent(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


def opened(folder: Path) -> RunFiles:
    return RunFiles(folder, lambda _: True)


def frames(text: str) -> list[list[str]]:
    """The screens that were drawn, without codes."""
    return [CODES.sub("", frame).splitlines() for frame in text.split("\x1b[H")[1:]]


def test_into_a_pipe_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_run(tmp_path / "run\x1b[31m")
    append(run, record(210, **{"a\x1b[2J name": 1.5}))
    append_machines(run, 3, 2)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["watch", str(run)]) == ExitCode.DONE
    told = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", told)
    lines = told.splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0].startswith(r"run\x1b[31m  ")
    assert "step 210 of 1,000" in told
    assert r"train a\x1b[2J name" in told
    (loss,) = (line for line in lines if line.startswith("train loss"))
    assert loss.split()[2] == "1.864"
    assert loss.endswith("▁")
    assert "validation accuracy" in told
    assert [line.split()[0] for line in lines if line.startswith("nid")] == [
        *("nid000", "nid001", "nid002")
    ]
    assert r"slow: rank 11 on nid\x1b002" in told
    assert r"host nid\x1b[31m001" in lines
    # A terminal that can move no cursor is one as well.
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    show([opened(run)], terminal)
    assert "\x1b" not in terminal.sent()


@pytest.mark.parametrize("value", ["\x1b[2J", -1.5, [], {}, True, 10**400])
def test_records_of_other_types(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: object
) -> None:
    run = made_run(tmp_path / "run")
    path = run / "jobs" / "2.json"
    record = json.loads(path.read_text())
    keys = ("world_size", "job", "launcher", "reason", "exit_code", "start", "end")
    path.write_text(json.dumps(record | dict.fromkeys(keys, value)))
    assert main(["watch", str(run)]) == ExitCode.DONE
    told = capsys.readouterr().out
    assert "job 2" in told
    assert "\x1b" not in told


@pytest.mark.parametrize("size", [(60, 24), (200, 60), (40, 10)])
def test_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    for name, value in zip(("COLUMNS", "LINES"), size, strict=True):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    run = made_run(tmp_path / "run")
    append_machines(run, 64, 2)

    def goes_on(_: float) -> None:
        append(run, record(600, loss=77.125))

    terminal = Terminal()
    show([opened(run)], terminal, sleep=goes_on, frames=2)
    text = terminal.sent()
    assert text.startswith("\x1b[?1049h\x1b[?25l")
    assert text.endswith("\x1b[?25h\x1b[?1049l")
    assert "\x1b[1m" in text
    one, other = frames(text)
    for frame in (one, other):
        assert len(frame) <= size[1] - 1
        assert max(map(len, frame)) <= size[0]
    assert "77.12" not in "".join(one)
    assert "77.12" in "".join(other)
    assert "step 600 of 1,000" in "".join(other)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal("ascii")
    show([opened(run)], plain, sleep=goes_on, frames=1)
    assert not re.search(r"\x1b\[[\d;]*m", plain.sent())


def test_ctrl_c_leaves_the_terminal_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    terminal = Terminal()
    show([opened(made_run(tmp_path / "run"))], terminal, sleep=interrupted)
    assert terminal.sent().endswith("\x1b[?25h\x1b[?1049l")


def test_figures_of_many_hosts_are_read_once(tmp_path: Path) -> None:
    """Their ends, and again only once they have grown: 256 hosts would cost a core otherwise."""
    run = made_run(tmp_path / "run")
    append_machines(run, 64, 200)
    at = [bytes_read()]

    def look(seconds: float) -> None:
        at.append(bytes_read())

    terminal = Terminal()
    show([opened(run)], terminal, sleep=look, frames=3)
    first, second, third = (after - before for before, after in itertools.pairwise(at))
    assert 2**20 < first < 2**21 + 2**19
    assert max(second, third) < 2**19
    assert frames(terminal.sent())[2] == frames(terminal.sent())[0]


def bytes_read() -> int:
    """All that this process has read, by the kernel's count."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_metrics_that_a_resume_has_cut_back_do_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    run = made_run(tmp_path / "run")

    def cut(_: float) -> None:
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        new = [*lines[:5], json.dumps(record(60, loss=0.0625)).encode() + b"\n", b'{"torn']
        (run / "new").write_bytes(b"".join(new))
        (run / "new").replace(run / "metrics.jsonl")
        (run / "exit.json").write_text('{"code": null, "reason": "x", "step": 50, "tries": 3}')

    terminal = Terminal()
    show([opened(run)], terminal, sleep=cut, frames=2)
    assert "step 60 of 1,000" in "".join(frames(terminal.sent())[1])


def test_a_curve_in_a_line() -> None:
    style = Style(colours=False, blocks=True)
    assert style.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert style.sparkline([5, 5], 10) == "▁▁"
    assert style.sparkline(list(range(1000)), 4) == "▁▃▆█"
    assert style.sparkline([-1e308, 0, 1e308, 1e308], 3) == "▁▅█"
    assert style.sparkline([], 4) == style.sparkline([1.0], 0) == ""
    assert Style(colours=False, blocks=False).sparkline([0, 1], 2) == "_#"
    assert style.bar(0.5, 4) == "██░░"
    assert style.bar(7.0, 4) == "████"


def test_whether_it_runs_is_seen_by_its_heartbeat_from_another_node(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    elsewhere = RunFiles(run, lambda _: None)
    (run / "lease.json").write_text("{}")
    assert elsewhere.facts()["state"] == "running"
    os.utime(run / "lease.json", (time.time() - 3600,) * 2)
    facts = elsewhere.facts()
    assert facts["state"] != "running"
    assert "was killed" in facts["explanation"]
    assert gathered([elsewhere])["runs"][0]["facts"]["state"] == facts["state"]


def test_what_is_of_the_page_is_refused_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(made_run(tmp_path / "run")), "--port", "80"]) != ExitCode.DONE
    assert "give --serve too" in capsys.readouterr().err
