"""Processes as the kernel shows them."""

from __future__ import annotations

import os
from pathlib import Path

from hpctrain.utils import proc


def test_a_name_may_hold_brackets_blanks_and_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    stat = "7 (a) S 1) (b\n c) R 5 7 7 0 -1 4194304"
    (tmp_path / "7" / "stat").write_text(stat, encoding="utf-8")
    assert proc.name_of(7, tmp_path) == "a) S 1) (b\n c"
    assert proc.stat_fields(7, tmp_path)[proc.STATE] == "R"
    assert proc.parent_of(7, tmp_path) == 5
    assert list(proc.ancestors(7, tmp_path)) == [5]


def test_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    assert proc.stat_fields(8, tmp_path) == []
    assert proc.name_of(8, tmp_path) == ""
    assert proc.parent_of(8, tmp_path) == 0
    assert list(proc.ancestors(8, tmp_path)) == []
    assert proc.start_time(2**22 + 1) is None


def test_this_process() -> None:
    assert next(proc.ancestors()) == os.getppid()
    assert proc.start_time(os.getpid()) == proc.start_time(os.getpid()) is not None
