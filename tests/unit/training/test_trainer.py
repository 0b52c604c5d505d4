"""Where the time goes."""

from __future__ import annotations

import pytest

from hpctrain.training.trainer import Phases


def test_the_phases_are_the_whole() -> None:
    now, waited = [100.0], [0.0]
    phases = Phases({"data": lambda: waited[0], "checkpoint": lambda: 0.5}, lambda: now[0])
    now[0] += 2
    with phases.measure("evaluation"):
        now[0] += 3
    waited[0] = 1.0
    now[0] += 4
    first = phases.lap()
    assert phases.totals() == {"compute": 4.5, "data": 1.0, "checkpoint": 0.5, "evaluation": 3.0}
    assert sum(phases.totals().values()) == phases.elapsed() == 9
    with phases.measure("checkpoint"):
        now[0] += 1
    second = phases.lap()
    assert phases.totals()["checkpoint"] == 1.5
    assert second == {"compute": 0.0, "data": 0.0, "checkpoint": 1.0, "evaluation": 0.0}
    assert first["compute"] + second["compute"] == pytest.approx(phases.totals()["compute"])
