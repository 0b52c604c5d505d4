"""The names of checkpoint folders, and `latest`: one reading for saving, status and tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.batch.exit_status import newest_saved
from hpctrain.checkpoint.format import resolved
from hpctrain.errors import CheckpointError
from hpctrain.utils.run_folder import folder_name, read_latest, step_of


@pytest.mark.parametrize("step", [0, 7, 12_345_678, 123_456_789_012])
def test_a_step_is_found_in_the_name_of_its_folder(step: int) -> None:
    assert step_of(folder_name(step)) == step


@pytest.mark.parametrize("name", ["", "step-7", "step-0000007x", ".step-00000007.tmp", "STOP"])
def test_other_names_are_no_checkpoints(name: str) -> None:
    assert step_of(name) is None


def test_latest(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert read_latest(tmp_path) is None
    assert newest_saved(tmp_path) == (None, 0)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        resolved(tmp_path)
    (tmp_path / "latest").write_text("step-00000140\n", encoding="utf-8")
    assert newest_saved(tmp_path) == ("step-00000140", 140)
    assert resolved(tmp_path) == tmp_path / "checkpoints" / "step-00000140"
    (tmp_path / "latest").write_text("../../etc\n", encoding="utf-8")
    for read in (read_latest, newest_saved, resolved):
        with pytest.raises(CheckpointError, match=r"Name a checkpoint in .*checkpoints itself"):
            read(tmp_path)
