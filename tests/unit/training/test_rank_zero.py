"""What a run folder tells of a job that has only begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.batch.exit_status import Outcome, State, read_status, write_outcome
from hpctrain.errors import ConfigError
from hpctrain.preflight.storage import trial_folder
from hpctrain.training.rank_zero import RunFolder


def test_the_folder_of_a_sweep_is_none_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds a sweep .* set another run\.name"):
        RunFolder(tmp_path).__enter__()
    with pytest.raises(ConfigError, match="holds a sweep"), trial_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
    with RunFolder(tmp_path / "000"):  # a point is a run
        pass


def test_a_job_that_dies_before_it_resumes_has_gained_nothing(tmp_path: Path) -> None:
    killed = Outcome(code=None, reason="running", step=100, first_step=100, tries=2)
    write_outcome(tmp_path, killed)
    (tmp_path / "latest").write_text("step-00000140\n", encoding="utf-8")
    with RunFolder(tmp_path):
        status = read_status(tmp_path, {})
    assert (status.step, status.gained, status.tries) == (140, 0, 3)
    assert status.state == State.NO_PROGRESS.value
