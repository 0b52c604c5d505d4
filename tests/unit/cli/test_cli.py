"""The command line: exit codes, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.cli import main
from hpctrain.version import __version__


def test_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    words = (
        "mpirun",
        "check CONFIG",
        "status RUN",
        "data pack digits",
        "75",
        "78",
        "--np",
        "--version",
    )
    for word in words:
        assert word in output


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hpctrain {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a config file or a command is needed"),
        (["run.toml", "--epochs=3"], "unrecognized arguments: --epochs=3"),
        (["check"], "the following arguments are required: CONFIG"),
        (["check", "run.toml", "--jsn"], "unrecognized arguments: --jsn"),
        (["status"], "the following arguments are required: run"),
        (["data", "unpack"], "invalid choice: 'unpack'"),
    ],
)
def test_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 64
    error = capsys.readouterr().err
    assert words in error
    assert "usage: python -m hpctrain" in error


def test_a_config_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing.toml"]) == 78
    assert "nothing.toml: no such file" in capsys.readouterr().err


def test_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 78
    content = {"code": 75, "reason": "stopped by SIGTERM", "step": 7, "tries": 1, "time": "now"}
    (tmp_path / "exit.json").write_text(json.dumps(content), encoding="utf-8")
    assert main(["status", str(tmp_path)]) == 0
    assert "submit again (stopped by SIGTERM)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check"], "the following arguments are required: CONFIG\n"),
        (["evaluate"], "the following arguments are required: CONFIG\n"),
        (["run.toml", "-np", "2"], "did you mean --np?\n"),
        (["run.toml", "--map-by", "core"], "options of mpirun and srun stand before python\n"),
        (["run.toml", "--bind-to=none"], "options of mpirun and srun stand before python\n"),
        (["run.toml", "--lr", "1"], "keys of the config are set without dashes"),
    ],
)
def test_a_usage_error_is_three_lines(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 64
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 3


def test_a_usage_error_is_told_once_under_a_launcher() -> None:
    result = subprocess.run(
        ["mpirun", "-np", "2", sys.executable, "-m", "hpctrain", "run.toml", "--bogus"],
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == 64
    assert result.stderr.count("unrecognized arguments: --bogus") == 1
