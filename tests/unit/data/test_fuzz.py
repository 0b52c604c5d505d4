"""Damaged files as training reads them; `benchmarks/fuzz.py` does the same with a thousand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from helpers.limits import JOB_SECONDS

ROOT = Path(__file__).parents[3]


def test_damaged_shards_are_named_or_whole() -> None:
    ended = subprocess.run(
        [sys.executable, "benchmarks/fuzz.py", "--shards", "60", "--jobs", "2", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counts = json.loads(ended.stdout)
    assert sum(sum(found.values()) for found in counts.values()) == 3 * 60
    for row, found in counts.items():
        assert found.get("unexplained", 0) == 0, (row, found, ended.stderr)
        if "verified" in row:
            assert set(found) <= {"equal", "named"}, (row, found)
            assert found["named"] > 10, (row, found)
    # Without checksums flipped values are values: else there would be nothing to find.
    assert counts["contiguous, by its index"]["other values"] > 0


def test_damaged_files_of_other_makers_are_named_or_read() -> None:
    """One of each layout; `benchmarks/fuzz_layouts.py` alone takes a thousand."""
    ended = subprocess.run(
        [sys.executable, "benchmarks/fuzz_layouts.py", "--files", "25", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counts = json.loads(ended.stdout)
    assert len(counts) == 25
    assert all(sum(found.values()) == 1 for found in counts.values())
    assert {each for found in counts.values() for each in found} >= {"named"}
