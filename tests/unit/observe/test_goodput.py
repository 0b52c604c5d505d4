"""Of all seconds of a run, what came of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpctrain.observe import goodput as module
from hpctrain.observe.goodput import PARTS, Goodput, PhaseLog, end_of_outcome, goodput, read_phases
from hpctrain.watch.run_files import goodput_of, runs_now

HANG = "rank 1 on n0: no progress for 300 s (hang timeout)."


def line(kind: str, step: int, wall_time: float, **facts: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, "wall_time": wall_time, **facts}


def first_job() -> list[dict[str, Any]]:
    """Ten seconds to start, 80 of training up to step 100, of which 60 are arithmetic."""
    spent = {"compute": 50, "communication": 10, "data": 8, "evaluation": 10, "checkpoint": 2}
    return [
        line("job", 0, 4, began=0, job=1, before=None),
        line("training", 0, 10, nodes=2, ranks=4),
        line("phases", 50, 50, seconds={name: value / 2 for name, value in spent.items()}),
        line("phases", 100, 90, seconds=spent),
    ]


def second_job(step: int, before: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """From 200 s on; ten seconds to start, 20 of arithmetic, and one to end."""
    return [
        line("job", step, 204, began=200, job=2, before=before),
        line("training", step, 210, nodes=1, ranks=2),
        line("phases", 140, 230, seconds={"compute": 20}),
        line("end", 140, 231, code=0, reason="complete"),
    ]


def parts(found: Goodput | None) -> dict[str, float]:
    assert found is not None
    assert found.unattributed == pytest.approx(0)
    numbers = found.to_json()
    assert sum(numbers[part] for part in PARTS) == pytest.approx(found.total)
    return {part: numbers[part] for part in PARTS if numbers[part]}


def test_a_job_that_was_stopped_in_order_loses_nothing() -> None:
    lines = [*first_job(), line("end", 100, 95, code=75, reason="stopped"), *second_job(100)]
    found = goodput(lines)
    expected = {"trained": 80, "read": 8, "evaluated": 10, "saved": 2}
    assert parts(found) == {**expected, "started": 20, "ended": 6, "waited": 105}
    assert found is not None
    assert (found.total, found.jobs, found.node_seconds) == (231, 2, 2 * 95 + 31)
    assert found.line().startswith("35 % of 0:03:51 trained, waited 45 %, started 9 %")


def test_what_was_behind_the_step_that_the_next_job_began_at_was_in_vain() -> None:
    """Half of the second stretch, whatever it was spent on; and what followed the last line."""
    found = goodput([*first_job(), *second_job(75)], signs_of_life=lambda: [3.0, 97.0, 220.0])
    expected = {"trained": 20 + 45, "read": 6, "evaluated": 7.5, "saved": 1.5}
    assert parts(found) == {**expected, "recomputed": 27, "started": 20, "ended": 1, "waited": 103}


def test_a_third_job_that_goes_back_further_takes_more() -> None:
    third = [
        line("job", 25, 304, began=300, before=None),
        line("training", 25, 310, nodes=1, ranks=2),
        line("end", 25, 310, code=75, reason="stopped"),
    ]
    found = parts(goodput([*first_job(), *second_job(75), *third]))
    assert found["trained"] == 15
    assert found["recomputed"] == pytest.approx(60 + 20)


@pytest.mark.parametrize("is_last", [True, False], ids=["last", "followed"])
def test_a_job_that_stood_still_hung_until_its_watchdog_ended_it(is_last: bool) -> None:
    time = "1970-01-01T00:02:10+0000"
    if is_last:
        found = parts(goodput(first_job(), end=end_of_outcome(70, HANG, time)))
    else:
        before = {"code": 70, "reason": HANG, "time": time}
        found = parts(goodput([*first_job(), *second_job(100, before)]))
    assert found["hung"] == 40


def test_a_job_that_runs_has_told_nothing_of_its_last_seconds() -> None:
    found = goodput(first_job(), now=96.0)
    assert found is not None
    assert (found.total, found.unattributed) == (96, pytest.approx(6))


def test_lines_that_make_no_sense_do_no_harm() -> None:
    strange: list[dict[str, Any]] = [
        line("training", 0, 1),
        line("job", 0, "later"),  # type: ignore[arg-type]
        line("job", 0, 5, began="x", before={"code": "70"}),
        line("phases", 3, 9, seconds=[1]),
        line("phases", 3, 9, seconds={"compute": "x", "data": None}),
        line("training", 3, 9, nodes=-1),
        line("phases", 3, 9, seconds={"compute": float("inf")}),
        line("end", 3, 2, code=None, reason=None),
        line("other", 3, 2),
    ]
    found = goodput(strange)
    assert found is not None
    assert found.total == pytest.approx(4)
    assert goodput([]) is None


def test_a_log_of_phases_tells_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free_since", None)
    now = [1000.0]
    log = PhaseLog(tmp_path, lambda: now[0])
    log.begin(1, 0, 990.0, None)
    now[0] = 1010
    log.begin_training(0, nodes=3, ranks=6)
    for step in range(1, 4001):
        now[0] += 0.25
        log.note(step, lambda: {"compute": now[0] - 1010})
    log.note_now(4000, {"compute": 1000})
    log.end(4000, 75, "stopped")
    lines = list(read_phases(tmp_path))
    assert 200 < len(lines) < 600  # every second at first, every five in the end
    assert parts(goodput(lines)) == {"trained": 1000, "started": 20}
    # A program's next run begins where the one before has ended, not with the process.
    log = PhaseLog(tmp_path, lambda: now[0])
    now[0] += 7
    log.begin(2, 4000, 990.0, None)
    log.close()
    assert list(read_phases(tmp_path))[-1]["began"] == 2010


def test_what_cannot_be_written_is_told_once_and_no_reason_to_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / module.FILE).mkdir()
    log = PhaseLog(tmp_path)
    log.begin(1, 0, 0.0, None)
    log.begin_training(0, nodes=1, ranks=1)
    log.note(1, dict)
    log.end(1, 0, "complete")
    assert caplog.text.count("goodput of this job stays unknown") == 1
    assert goodput_of(tmp_path) is None


def test_a_job_runs_as_long_as_its_lease_is_renewed(tmp_path: Path) -> None:
    assert not runs_now(tmp_path)
    (tmp_path / "lease.json").write_text("{}", encoding="utf-8")
    beat = (tmp_path / "lease.json").stat().st_mtime
    assert runs_now(tmp_path, clock=lambda: beat + 89)
    assert not runs_now(tmp_path, clock=lambda: beat + 91)
    assert not runs_now(tmp_path, lives=False, clock=lambda: beat)
    (tmp_path / "exit.json").write_text('{"code": 0}', encoding="utf-8")
    assert not runs_now(tmp_path, clock=lambda: beat)
