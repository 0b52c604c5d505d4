"""What a run folder tells of a job that has only begun."""

from __future__ import annotations

from pathlib import Path

from hpctrain.batch.exit_status import Outcome, State, read_status, write_outcome
from hpctrain.training.rank_zero import RunFolder


def test_a_job_that_dies_before_it_resumes_has_gained_nothing(tmp_path: Path) -> None:
    killed = Outcome(code=None, reason="running", step=100, first_step=100, tries=2)
    write_outcome(tmp_path, killed)
    (tmp_path / "latest").write_text("step-00000140\n", encoding="utf-8")
    with RunFolder(tmp_path):
        status = read_status(tmp_path, {})
    assert (status.step, status.gained, status.tries) == (140, 0, 3)
    assert status.state == State.NO_PROGRESS.value
