"""Tables of runs: of a folder, and of two side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
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


HOSTILE = {
    "nothing": b"",
    "zeros": bytes(4096),
    "cut": b'{"kind": "train", "st',
    "deep": b"[" * 100_000,
    "a list": b"[1]\n",
    "other types": b'{"kind": "train", "step": 3, "loss": "x", "seconds": 7, "wall_time": [], '
    b'"split": 5, "steps": 3, "command": 4, "start": 5, "nodes": "b", "before": 7, "began": {}}\n',
    "numbers without end": b'{"kind": "machine", "step": 3, "seconds": 1e999, '
    b'"cpu": {"busy": 1e400}, "ranks": {"rank": [1, "a"], "step": [1e999, null], '
    b'"others": [0]}, "wall_time": NaN}\n'
    b'{"kind": "train", "step": ' + b"9" * 400 + b', "loss": 1e999, "number": 1e999}\n',
    "large numbers": b'{"kind": "train", "step": 9223372036854775807, "loss": 1e308, "number": 1, '
    b'"wall_time": 1e300, "seconds": {"data": -1e308}, "job": 1, "began": -1e300}\n',
    "a clock that goes back": b'{"kind": "train", "step": 9, "loss": 1.0, "wall_time": 9}\n'
    b'{"kind": "train", "step": -3, "loss": 2.0, "wall_time": -5}\n{"kind": "job", "step": 0, '
    b'"job": 2, "began": 1e9, "before": null, "wall_time": 5.0}\n',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_whatever_files_hold_no_command_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """Every file of a run alike: it is looked at, or refused with the file's name."""
    run, other = made_run(tmp_path / "run"), made_run(tmp_path / "other")
    (run / "machine").mkdir()
    files = ("exit.json", "metrics.jsonl", "log.txt", "config.toml", "phases.jsonl", "lease.json")
    for name in (*files, "jobs/1.json", "jobs/2.json", "machine/n0.jsonl", "latest"):
        (run / name).write_bytes(content)
    for command in (
        ["runs", str(tmp_path)],
        ["compare", str(run), str(other)],
        ["watch", str(run)],
        ["report", str(run), str(other), "--output", str(tmp_path / "report.html")],
        ["status", str(run)],
        ["bundle", str(run), "--output", str(tmp_path / "run.tar.gz")],
    ):
        code = main(command)
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        assert code == ExitCode.DONE or str(run) in told.err, (command, told.err)


COMMANDS = (
    *("compare {0} {1}", "watch {0}", "report {0} --output {2}", "status {0}"),
    *("bundle {0} --output {2}", "ckpt ls {0}", "ckpt verify {0}", "ckpt export {0} {2}"),
)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_the_closed_folders_of_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each is named with its owner, or left out of a table, and the others are shown."""
    runs = tmp_path / "runs"
    modes = {"closed": 0o700, "listed": 0o744, "entered": 0o711, "inside": 0o755, "open": 0o755}
    for name in modes:
        (made_run(runs / name) / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "new").mkdir(mode=0o777)
    (tmp_path / "new").chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
        if folder.name.startswith("pytest-of"):
            break

    def call(command: str, run: Path, index: str) -> ExitCode | int:
        new = tmp_path / "new" / f"{run.name}-{index}"
        words = [str(word) for word in command.format(run, runs / "open", new).split()]
        code = main(words)
        assert code in (ExitCode.DONE, ExitCode.CONFIG, ExitCode.CHECKPOINT_IO), (words, code)
        return code

    for i, command in enumerate(COMMANDS):
        call(command, runs / "open", f"root-{i}")  # imported while this is still root
    main(["runs", str(runs / "nowhere")])
    capfd.readouterr()
    for name, mode in modes.items():
        (runs / name).chmod(mode)
    for path in (runs / "inside").rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(4321)
            os.setuid(4321)
            assert main(["runs", str(runs)]) == ExitCode.DONE
            for name in modes:
                for i, command in enumerate(COMMANDS):
                    code = call(command, runs / name, str(i))
                    shows = code == ExitCode.DONE
                    assert not (shows and name in ("closed", "listed", "inside")), (command, name)
            code = 0
        except BaseException:  # noqa: BLE001 - the parent sees a code only
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    ended = os.waitpid(child, 0)[1]
    out, err = capfd.readouterr()
    assert ended == 0, err
    assert {line.split()[0] for line in out.splitlines()[1:4]} == {"open", "entered", "inside"}
    assert "inside  closed: " in out
    told = [line for line in err.splitlines() if str(runs / "closed") in line]
    assert len(told) == len(COMMANDS)
    assert [line for line in told if f"{runs / 'closed'} belongs to " not in line] == []
    assert out.count("train loss") >= 2, "one that can be entered is shown, though not listed"


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
