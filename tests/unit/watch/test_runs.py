"""Tables of runs: of a folder, and of two side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.made_runs import append, made_run, record

from hpctrain.cli import main
from hpctrain.errors import ExitCode


def test_a_folder_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path / "a")
    made_run(tmp_path / "study" / "b\x1b[31m")
    (made_run(tmp_path / "damaged") / "exit.json").write_text("{")
    (tmp_path / "no run").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    assert main(["runs", str(tmp_path)]) == ExitCode.DONE
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "step", "last", "best", "age", "job", "host", "size"]
    assert {line.split()[0] for line in lines} == {"a", r"study/b\x1b[31m", "damaged"}
    (one,) = (line for line in lines if line.startswith("a "))
    assert "accuracy 0.5" in one
    assert r"nid\x1b001 +1" in one
    (bad,) = (line for line in lines if line.startswith("damaged"))
    assert "damaged: " in bad
    assert main(["runs", str(tmp_path), "--json"]) == ExitCode.DONE
    rows = json.loads(capsys.readouterr().out)
    assert {row["run"]: row["nodes"] for row in rows}["a"] == 2
    assert all(row["size"] > 0 for row in rows)


def test_there_has_to_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path / "nowhere")]) == ExitCode.CONFIG
    assert "name the folder of your runs" in capsys.readouterr().err
    assert main(["compare", str(made_run(tmp_path / "a")), str(tmp_path)]) == ExitCode.CONFIG
    assert "holds no run" in capsys.readouterr().err


def test_two_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = made_run(tmp_path / "one"), made_run(tmp_path / "other", steps=100)
    append(other, record(110, loss=0.125))
    (other / "config.toml").write_text("[training]\nmax_steps = 1000\n[optimizer]\nlr = 2.0\n")
    about = json.loads((other / "jobs" / "2.json").read_text())
    (other / "jobs" / "2.json").write_text(json.dumps(about | {"versions": {"torch": "2.13"}}))
    assert main(["compare", str(one), str(other)]) == ExitCode.DONE
    told = capsys.readouterr().out
    assert "\x1b" not in told
    rows = {line.split()[0]: line.split() for line in told.splitlines() if line}
    assert rows["optimizer.lr"] == ["optimizer.lr", "-", "2.0"]
    assert rows["versions.torch"] == ["versions.torch", "-", "2.13"]
    assert "training.max_steps" not in told
    curve = told.partition("train loss at step")[2].splitlines()
    assert curve[0].split() == ["one", "other"]
    assert curve[7].split()[0] == "117"
    assert curve[7].split()[2] == "0.125"
    assert curve[-1].split()[2] == "-"


def test_nothing_of_this_imports_torch(tmp_path: Path) -> None:
    run = str(made_run(tmp_path / "a"))
    program = (
        "import sys; from hpctrain.cli import main\n"
        "for command in (['runs', sys.argv[1]], ['compare', sys.argv[2], sys.argv[2]],\n"
        "                ['watch', sys.argv[2]],\n"
        "                ['report', sys.argv[2], '--output', sys.argv[1] + '/r.html']):\n"
        "    assert main(command) == 0\n"
        "assert not {'torch', 'mpi4py'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), run]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
