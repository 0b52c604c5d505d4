"""Which folder a fit of a script has."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.lightning.folders import NAME, Fit, choose_version, newest_version


def slurm(restart: int, job: int = 7) -> dict[str, str]:
    return {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restart)}


def chain(attempt: int) -> dict[str, str]:
    return {"HPCTRAIN_TOKEN": "t", "HPCTRAIN_ATTEMPT": str(attempt), "SLURM_JOB_ID": str(attempt)}


def name(folder: Path, env: dict[str, str], number: int = 1) -> str:
    return choose_version(folder, Fit.of_this_process(number, env))


def test_a_script_that_is_started_again_begins_anew(tmp_path: Path) -> None:
    assert [name(tmp_path, {}) for _ in range(3)] == ["version_0", "version_1", "version_2"]
    (tmp_path / "version_9").mkdir()
    (tmp_path / "version_x").mkdir()
    assert name(tmp_path, {}) == "version_10"
    assert newest_version(tmp_path) == "version_10"


@pytest.mark.parametrize("of", [slurm, chain])
def test_a_job_that_is_started_again_goes_on(tmp_path: Path, of: object) -> None:
    assert callable(of)
    first = of(1)
    assert [name(tmp_path, first, number) for number in (1, 2)] == ["version_0", "version_1"]
    # Another script, or a person, in between.
    assert name(tmp_path, {}) == "version_2"
    assert [name(tmp_path, of(2), number) for number in (1, 2)] == ["version_0", "version_1"]
    assert [name(tmp_path, of(3), number) for number in (2, 1, 3)] == [
        *("version_1", "version_0", "version_3"),
    ]


def test_the_same_script_twice_in_one_job_is_two_runs(tmp_path: Path) -> None:
    assert [name(tmp_path, slurm(0)) for _ in range(2)] == ["version_0", "version_1"]
    # Each of them goes on, whichever of the two is first.
    assert [name(tmp_path, slurm(1)) for _ in range(2)] == ["version_0", "version_1"]
    assert name(tmp_path, slurm(0, job=8)) == "version_2"


def test_another_command_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--lr", "1"])
    assert name(tmp_path, slurm(0)) == "version_0"
    monkeypatch.setattr("sys.argv", ["train.py", "--lr", "2"])
    assert name(tmp_path, slurm(1)) == "version_1"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"job": 3}', '{"job": "slurm  7"}'])
def test_a_damaged_file_is_somebody_elses(tmp_path: Path, content: str) -> None:
    name(tmp_path, slurm(0))
    (tmp_path / "version_0" / NAME).write_text(content)
    assert name(tmp_path, slurm(1)) == "version_1"


def test_without_a_run_there_is_no_last_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="no fit has left"):
            newest_version(folder)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot make"):
        name(tmp_path / "file", {})
