"""Bit for bit, whatever happened in between; and the same batches on any number of ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.limits import JOB_SECONDS, LONG_JOB_SECONDS
from resuming import AXES, BODIES, ONE_THREAD, pairwise, run_cases

pytestmark = pytest.mark.ranks(4)


@pytest.mark.parametrize("ranks", AXES["ranks"])
def test_stopped_anywhere_it_is_as_if_it_had_not(tmp_path: Path, ranks: str) -> None:
    """Precision, scheduler, stop and world size, each with each; the grid is in benchmarks/."""
    cases = [case for case in pairwise() if case["ranks"] == ranks]
    assert cases
    for case in run_cases(tmp_path, ranks, cases, timeout=LONG_JOB_SECONDS):
        assert case["difference"] is None, case


def elastic(folder: Path, ranks: int, last_step: int) -> tuple[list[Any], int]:
    result = subprocess.run(
        [
            *("mpirun", "-np", str(ranks), sys.executable, str(BODIES / "resume_cases.py")),
            *(str(folder), "elastic", str(last_step)),
        ],
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
        env=ONE_THREAD,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    batches = [json.loads(line[6:]) for line in lines if line.startswith("batch ")]
    (code,) = [int(line[6:]) for line in lines if line.startswith("ended ")]
    return batches, code


def test_from_four_ranks_to_two_to_three_to_one(tmp_path: Path) -> None:
    """The same samples in the same global batches, and the losses of a run on one rank."""
    batches: list[Any] = []
    for ranks, last_step in [(4, 4), (2, 9), (3, 13), (1, 100)]:
        found, code = elastic(tmp_path / "parts", ranks, last_step)
        assert code == (0 if ranks == 1 else 75)
        shares = {share for *_, all_shares in found for share in all_shares}
        assert ranks != 3 or len(shares) > 1  # 16 is not divisible by it
        batches += [batch[:3] for batch in found]
    whole, _ = elastic(tmp_path / "whole", 1, 100)
    assert batches == [batch[:3] for batch in whole]
    assert len(whole) == 20

    curves = [
        [
            record["loss"]
            for record in map(json.loads, path.read_text(encoding="utf-8").splitlines())
            if record["kind"] == "train"
        ]
        for path in (
            tmp_path / name / "runs" / "elastic" / "metrics.jsonl" for name in ("parts", "whole")
        )
    ]
    assert len(curves[1]) == 20
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
