"""exit.json, and what job scripts are told of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpctrain.batch.exit_status import (
    Outcome,
    State,
    judge,
    read_outcome,
    read_status,
    to_json,
    to_text,
    write_outcome,
)
from hpctrain.checkpoint.lease import Lease, holder_lives
from hpctrain.cli import main
from hpctrain.errors import CheckpointError, ConfigError, ExitCode


def outcome(code: int | None, **changes: Any) -> Outcome:
    values = {"reason": "x", "step": 120, "tries": 2, "first_step": 100, "job": "slurm 7.0"}
    return Outcome(code=code, **(values | changes))


@pytest.mark.parametrize(
    ("code", "changes", "state", "exit_code"),
    [
        (ExitCode.DONE, {}, State.COMPLETE, 0),
        (ExitCode.DONE, {"gained": 0, "held": True, "max_tries": 1}, State.COMPLETE, 0),
        (ExitCode.STOPPED, {}, State.RESUBMIT, 75),
        (None, {}, State.RESUBMIT, 75),
        (ExitCode.STOPPED, {"held": True}, State.HELD, 1),
        (ExitCode.STOPPED, {"gained": 0}, State.NO_PROGRESS, 1),
        (None, {"gained": 0}, State.NO_PROGRESS, 1),
        (ExitCode.STOPPED, {"max_tries": 3}, State.RESUBMIT, 75),
        (ExitCode.STOPPED, {"max_tries": 2}, State.TOO_MANY_TRIES, 1),
        (ExitCode.BUG, {}, State.FAILED, 70),
        (ExitCode.DATA, {"gained": 0}, State.FAILED, 65),
        (9, {}, State.FAILED, 9),
        # Another job's last word is none of this one.
        (ExitCode.DONE, {"job": "slurm 8.0"}, State.NOT_REACHED, 69),
        (ExitCode.STOPPED, {"job": "slurm 7.1"}, State.NOT_REACHED, 69),
        (ExitCode.STOPPED, {"job": "slurm 7.0"}, State.RESUBMIT, 75),
    ],
)
def test_what_a_run_needs(
    code: int | None, changes: dict[str, Any], state: State, exit_code: int
) -> None:
    asked = {"gained": 20, "held": False, "job": None, "max_tries": None} | changes
    found, number, words = judge(outcome(code), **asked)
    assert (found, number) == (state, exit_code)
    assert words


def test_a_killed_job_has_saved_more_than_it_could_say(tmp_path: Path) -> None:
    write_outcome(tmp_path, outcome(None, step=100))
    assert read_status(tmp_path, {}).exit_code == 1
    (tmp_path / "latest").write_text("step-00000140\n", encoding="utf-8")
    status = read_status(tmp_path, {})
    assert (status.exit_code, status.step, status.gained) == (75, 140, 40)
    text = to_text(tmp_path, status)
    assert "running, or was killed: submit again" in text
    assert "step-00000140" in text
    assert "140, 40 of them gained" in text


def test_the_status_for_programs(tmp_path: Path) -> None:
    write_outcome(tmp_path, outcome(ExitCode.STOPPED))
    status = read_status(tmp_path, {"SLURM_JOB_ID": "7"}, max_tries=9)
    content = json.loads(to_json(status))
    assert content["state"] == "submit again"
    assert content["exit_code"] == 75
    assert content["job"] == "slurm 7.0"
    assert (content["step"], content["gained"], content["tries"]) == (120, 20, 2)
    (tmp_path / "STOP").touch()
    assert read_status(tmp_path, {}).state == "held"
    assert read_status(tmp_path, {"SLURM_JOB_ID": "8"}).exit_code == 69


def test_an_outcome_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_outcome(tmp_path, outcome(75, save_seconds=1.5))
    found = read_outcome(tmp_path)
    assert found is not None
    assert (found.code, found.step, found.tries, found.save_seconds) == (75, 120, 2, 1.5)
    # As version 0.1.0 wrote it first.
    short = {"code": 75, "reason": "x", "step": 3, "tries": 1, "time": "now"}
    (tmp_path / "exit.json").write_text(json.dumps(short), encoding="utf-8")
    assert read_outcome(tmp_path) == Outcome(**short)


def test_status_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_status(tmp_path / "nothing", {})
    with pytest.raises(ConfigError, match="holds no run"):
        read_status(tmp_path, {})


@pytest.mark.parametrize("content", ["", "{", '{"code": 1}', "[]", '{"surplus": 1}'])
def test_a_damaged_outcome_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "exit.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"exit\.json cannot be read"):
        read_outcome(tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        write_outcome(tmp_path / "missing", outcome(0))


def test_a_process_of_this_host_is_known_to_live_or_not(tmp_path: Path) -> None:
    write_outcome(tmp_path, outcome(None))
    assert holder_lives(tmp_path) is None
    with Lease(tmp_path, {}):
        assert holder_lives(tmp_path) is True
        status = read_status(tmp_path, {}, lives=True)
        assert (status.state, status.exit_code, status.explanation) == ("running", 1, "running")
        lease = json.loads((tmp_path / "lease.json").read_text())
        for change, lives in (({"started": "1"}, False), ({"host": "elsewhere"}, None)):
            (tmp_path / "lease.json").write_text(json.dumps(lease | change))
            assert holder_lives(tmp_path) is lives
    dead = read_status(tmp_path, {}, lives=False)
    assert (dead.exit_code, dead.explanation) == (75, "was killed: submit again")


def test_what_is_known_is_said_once_and_with_the_newest_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_outcome(tmp_path, outcome(0, reason="complete"))
    lines = [
        {"kind": "train", "step": 10, "epoch": 0, "loss": 2.0, "seconds": {"data": 1.0}},
        {"kind": "evaluation", "split": "validation", "step": 10, "epoch": 0, "accuracy": 0.5},
        {"kind": "train", "step": 20, "epoch": 1, "loss": None, "nonfinite": {"loss": "nan"}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["status", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "state       complete\n" in told
    assert "  train       step 20, epoch 1, loss nan\n" in told
    assert "  validation  step 10, epoch 0, accuracy 0.5\n" in told
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["validation"]["accuracy"] == 0.5
