"""Cases of runs that are stopped and go on, and what becomes of them under a real mpirun."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers.launching import BODIES

sys.path.append(str(BODIES))

from resume_cases import (
    DATA,
    MODELS,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULERS,
    STOPS,
    STRATEGIES,
)

AXES = {
    "precision": PRECISIONS,
    "strategy": STRATEGIES,
    "scheduler": tuple(SCHEDULERS),
    "model": tuple(MODELS),
    "optimizer": tuple(OPTIMIZERS),
    "data": DATA,
    "stop": STOPS,
    "ranks": ("1", "2", "3", "4"),
}
Case = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]

_USUAL = {axis: AXES[axis][0] for axis in ("scheduler", "model", "optimizer", "data")}
_CANDIDATES = 30
_LUCKY = 2
"""Of the first 12 seeds that of the fewest ranks in all."""

# A model this small only waits for its threads, and more so where other tests run as well.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def every_case() -> list[Case]:
    """Return all there can be; cases of one undisturbed run stand together."""
    return [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def grid() -> list[Case]:
    """Return those in which at most one of four axes has not its usual value."""
    return [
        case
        for case in every_case()
        if sum(case[axis] != usual for axis, usual in _USUAL.items()) <= 1
    ]


@functools.cache
def pairwise() -> list[Case]:
    """Return few cases in which every two values of two axes meet, and few of them on many ranks.

    Each is the best of several that are made value by value, in any order of the axes (Cohen et
    al., "The AETG System", 1997).
    """
    draw = random.Random(_LUCKY)
    missing = {
        pair
        for axes in itertools.combinations(AXES, 2)
        for pair in itertools.product(*([(axis, value) for value in AXES[axis]] for axis in axes))
    }
    chosen = []
    while missing:
        candidates = [_candidate(draw, missing) for _ in range(_CANDIDATES)]
        case = max(candidates, key=lambda case: (len(_pairs(case) & missing), -int(case["ranks"])))
        missing -= _pairs(case)
        chosen.append(case)
    return chosen


def _candidate(draw: random.Random, missing: set[Pair]) -> Case:
    """Return a case of many pairs that are missing: each value has most with those before it."""
    found: dict[str, str] = {}
    for axis in draw.sample(list(AXES), len(AXES)):

        def worth(value: str) -> tuple[int, int]:
            item = axis, value  # noqa: B023 - called here
            if not found:
                pairs = sum(item in pair for pair in missing)
            else:
                both = ((item, other) for other in found.items())
                pairs = sum((one, two) in missing or (two, one) in missing for one, two in both)
            return pairs, -int(value) if axis == "ranks" else 0  # noqa: B023

        found[axis] = max(draw.sample(AXES[axis], len(AXES[axis])), key=worth)
    return {axis: found[axis] for axis in AXES}


def _pairs(case: Case) -> set[Pair]:
    return set(itertools.combinations(case.items(), 2))


def case_lines(cases: Sequence[Case]) -> list[str]:
    """Return cases as arguments of tests/mpi/resume_cases.py; the ranks are those that run it."""
    return [
        json.dumps({key: value for key, value in case.items() if key != "ranks"}) for case in cases
    ]


def found_cases(output: str) -> list[dict[str, str | None]]:
    """Return the cases of its output, each with "difference": None, or what differs."""
    lines = [line for line in output.splitlines() if line.startswith("case ")]
    return [json.loads(line.removeprefix("case ")) for line in lines]


def run_cases(
    folder: Path, ranks: str, cases: Sequence[Case], timeout: float
) -> list[dict[str, str | None]]:
    """Run cases of one number of ranks, and return what becomes of them."""
    body = [sys.executable, str(BODIES / "resume_cases.py"), str(folder), *case_lines(cases)]
    result = subprocess.run(
        ["mpirun", "-np", ranks, *body],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | ONE_THREAD,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = found_cases(result.stdout)
    assert len(found) == len(cases), result.stdout + result.stderr
    return found
