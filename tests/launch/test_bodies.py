"""What ranks do together, in worlds of four, two, three and one, of which each is started once.

Steps on real process groups, with parameters on all ranks and spread over them; runs that go on bit
for bit, whatever happened in between; and runs that go from one world to the next.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import in_turn
from helpers.limits import LONG_JOB_SECONDS
from helpers.resuming import AXES, ONE_THREAD, case_lines, found_cases, pairwise
from helpers.runs import losses

# The first test waits for all four worlds.
pytestmark = [pytest.mark.ranks(4), pytest.mark.timeout(4 * LONG_JOB_SECONDS)]

WORLDS = (4, 2, 3, 1)
"""In the order in which they go on with runs of the one before."""

ELASTIC = {4: (4, 75), 2: (9, 75), 3: (13, 75), 1: (100, 0)}
"""At which step each world is asked to stop, and the exit code: there are 20 steps."""

CHECKS = {1: ["step"], 2: [], 3: ["step", "calls", "sharded", "exact"], 4: ["step", "sharded"]}
"""What each world is tried with; two ranks find less than three."""

PASSED = {("step", 1): 16, ("step", 3): 23, ("step", 4): 13, ("sharded", 3): 10, ("sharded", 4): 10}
PASSED |= {("calls", 3): 6}
"""How many checks there are to pass."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bodies")


@pytest.fixture(scope="module")
def said(site: Path) -> dict[tuple[str, int], str]:
    """What each body has printed in each world."""
    outputs = {}
    for ranks in WORLDS:
        lines = {
            **{check: [f"{check}.py"] for check in CHECKS[ranks] if check != "exact"},
            "go-on": ["sharded_saves.py", str(site / "spread"), "go-on"],
            "grid": ["resume_cases.py", str(site / "grid"), *case_lines(cases_of(ranks))],
            "elastic": ["resume_cases.py", str(site / "parts"), "elastic", str(ELASTIC[ranks][0])],
        }
        if "exact" in CHECKS[ranks]:
            lines["exact"] = ["sharded_saves.py", str(site / "exact"), "exact"]
        if ranks == 3:
            lines["modules"] = ["modules.py", str(site / "modules")]
        if ranks == 1:
            lines["whole"] = ["resume_cases.py", str(site / "whole"), "elastic", "100"]
        ended = in_turn(site, ranks, *lines.values(), env=ONE_THREAD)
        outputs |= {(name, ranks): each.stdout for name, each in zip(lines, ended, strict=True)}
    return outputs


def cases_of(ranks: int) -> list[dict[str, str]]:
    return [case for case in pairwise() if case["ranks"] == str(ranks)]


@pytest.mark.parametrize(("body", "ranks"), PASSED)
def test_all_checks_of_a_body_pass(said: dict[tuple[str, int], str], body: str, ranks: int) -> None:
    """A step is that of the whole global batch; whatever a task does with a model."""
    assert said[body, ranks] == f"passed {PASSED[body, ranks]}\n"


def test_modules_are_what_tasks_by_hand_are(said: dict[tuple[str, int], str]) -> None:
    """Under ddp and fsdp, where ranks come to be without a sample, and weights are uneven."""
    assert said["modules", 3] == "passed 7\n"


def test_a_spread_run_resumed_is_exact_and_damage_is_noticed(
    said: dict[tuple[str, int], str],
) -> None:
    assert said["exact", 3] == "passed exact\n"


def test_a_spread_run_goes_on_in_any_other_world(said: dict[tuple[str, int], str]) -> None:
    for ranks in WORLDS:
        assert said["go-on", ranks] == "passed go-on\n"


@pytest.mark.parametrize("ranks", AXES["ranks"])
def test_stopped_anywhere_it_is_as_if_it_had_not(
    said: dict[tuple[str, int], str], ranks: str
) -> None:
    """Precision, scheduler, stop and world size, each with each; the grid is in benchmarks/."""
    cases = found_cases(said["grid", int(ranks)])
    assert len(cases) == len(cases_of(int(ranks))) > 0
    for case in cases:
        assert case["difference"] is None, case


def elastic(output: str) -> tuple[list[Any], int]:
    """Return the batches of a job, and its exit code."""
    lines = output.splitlines()
    batches = [json.loads(line[6:]) for line in lines if line.startswith("batch ")]
    (code,) = [int(line[6:]) for line in lines if line.startswith("ended ")]
    return batches, code


def test_from_four_ranks_to_two_to_three_to_one(
    site: Path, said: dict[tuple[str, int], str]
) -> None:
    """The same samples in the same global batches, and the losses of a run on one rank."""
    batches: list[Any] = []
    for ranks in WORLDS:
        found, code = elastic(said["elastic", ranks])
        assert code == ELASTIC[ranks][1]
        shares = {share for *_, all_shares in found for share in all_shares}
        assert ranks != 3 or len(shares) > 1  # 16 is not divisible by it
        batches += [batch[:3] for batch in found]
    whole, _ = elastic(said["whole", 1])
    assert batches == [batch[:3] for batch in whole]
    assert len(whole) == 20

    curves = [losses(site / name / "runs" / "elastic") for name in ("parts", "whole")]
    assert len(curves[1]) == 20
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
