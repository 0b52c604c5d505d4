"""The first minute: init, config, versions, help, and completion in the shell."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NoReturn

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.cli import main
from hpctrain.cli.dispatch import COMMANDS, ON_ALL_RANKS
from hpctrain.cli.usage import EXAMPLES, USAGES, Parser, options_of
from hpctrain.config import load, to_toml

ROOT = Path(__file__).parents[3]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for part in ("train", "validation"):
        (tmp_path / "data" / "digits" / part).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_written_to_start_from(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    told = capsys.readouterr().out
    assert "python -m hpctrain run.toml --np 2" in told
    config = load("run.toml")
    assert config.model.use == "model:Net"
    assert "optimizer.betas" not in to_toml(config)
    assert subprocess.run(["bash", "-n", "job.sh"], check=False).returncode == 0
    assert (here / "job.sh").stat().st_mode & 0o100
    assert "-m hpctrain ${HPCTRAIN_CHECK:+check} run.toml" in (here / "job.sh").read_text()
    before = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    for name in before:
        shutil.rmtree(here / "new", ignore_errors=True)
        (here / "new").mkdir()
        (here / "new" / name).write_text("mine")
        assert main(["init", "new"]) == 64
        assert f"new/{name} is there already" in capsys.readouterr().err
        assert [path.name for path in (here / "new").iterdir()] == [name]
    assert {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()} == before


def test_the_resolved_config_loads_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    capsys.readouterr()
    asked = ["optimizer.lr=5e-3", "model.width=16", 'job.env={A = "x # y"}']
    assert main(["config", "run.toml", *asked]) == 0
    text = capsys.readouterr().out
    (here / "again.toml").write_text(text, encoding="utf-8")
    config = load("run.toml", asked)
    assert load("again.toml") == config
    lines = (here / "run.toml").read_text(encoding="utf-8").splitlines()
    number = lines.index(next(line for line in lines if line.startswith('use = "model:Net')))
    for line in (
        f'use = "model:Net"  # line {number + 1}',
        "lr = 0.005  # override",
        "width = 16  # override",
        "split_seed = 0  # default",
        'A = "x # y"  # override',
    ):
        assert f"\n{line}\n" in text


@pytest.mark.parametrize("command", [command for command in USAGES if command])
def test_every_command_has_a_help_with_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: python -m hpctrain {command}")
    assert "examples:" in told
    for line in EXAMPLES[command]:
        assert f"  python -m hpctrain {line}\n" in told


def test_the_commands_are_those_of_the_help() -> None:
    assert {*COMMANDS, *ON_ALL_RANKS} == USAGES.keys() - {""} == EXAMPLES.keys()


class Parsed(Exception):  # noqa: N818
    """What a command would parse, and with what."""


@pytest.mark.parametrize(
    "command", [command for command in USAGES if command not in ("", "data", "run", "prepare")]
)
def test_every_option_is_in_the_help_of_its_command(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(parser: Parser, *_: object) -> NoReturn:
        raise Parsed(parser)

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    with pytest.raises(Parsed) as stopped:
        main([command, "x"])
    known = {option for option in stopped.value.args[0]._option_string_actions if option != "-h"}
    if command in ("evaluate", "test", "predict"):
        known -= {*options_of("")}  # as those of a run
    assert known - {"--code"} <= {*options_of(command)}


def test_help_and_runs_import_nothing_heavy(tmp_path: Path) -> None:
    program = """
import sys
from hpctrain.cli import main
lines = "--help,job --help,completion fish,nope".split(",")
for line in (*map(str.split, lines), ["runs", sys.argv[1]]):
    main(line)
heavy = {"torch", "mpi4py", "jinja2"} & set(sys.modules)
assert not heavy, heavy
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, check=True, timeout=JOB_SECONDS, stdout=subprocess.DEVNULL)


def test_versions_of_all() -> None:
    """Of MPI without initialising it, which login nodes of some machines do not survive."""
    program = """
import sys
from hpctrain.cli import main
assert main(["--version", "--all"]) == 0
from mpi4py import MPI
assert not MPI.Is_initialized()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    told = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert {"hpctrain", "python", "torch", "numpy", "h5py", "HDF5", "mpi4py", "MPI"} <= told.keys()
    assert re.match(r"(MPICH|Open MPI|Intel) ?\S* ", told["MPI"] + " ")


COMPLETE = """
source completion.bash
cd "$1"
COMP_WORDS=("${@:2}") COMP_CWORD=$(($# - 2))
_hpctrain
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["hpctrain", "sta"], ["status"]),
        (["hpctrain", "job", "run.toml", "--max-n"], ["--max-node-hours"]),
        (["hpctrain", "ckpt", "ver"], ["verify"]),
        (["hpctrain", "run.t"], ["run.toml"]),
        (["hpctrain", "run.toml", "--n"], ["--node-rank", "--np", "--num-nodes"]),
        (["hpctrain", "config", "run.t"], ["run.toml"]),
    ],
)
def test_completion_in_bash(
    tmp_path: Path, words: list[str], found: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion.bash").write_text(capsys.readouterr().out, encoding="utf-8")
    (tmp_path / "run.toml").touch()
    result = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", str(tmp_path), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == found
    assert result.stderr == ""


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_in_other_shells(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "max-node-hours" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--versoin", "did you mean --version?"),
        ("job run.toml --sweap a.b=1", "did you mean --sweep?"),
        ("ckpt lss", "did you mean 'ls'?"),
        ("data inf", "did you mean 'info'?"),
        ("completion csh", "did you mean 'zsh'?"),
        ("inti", "did you mean 'init'?"),
        ("configs", "did you mean 'config'?"),
        ("runs --sotr loss", "did you mean --sort?"),
        ("watch x --serve --prot 3", "did you mean --port?"),
    ],
)
def test_what_was_meant(
    words: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 64
    lines = capsys.readouterr().err.splitlines()
    assert told in lines[0]
    assert lines[1].startswith("usage: python -m hpctrain")
    assert len(lines) == 3


def test_the_wheel_has_what_init_copies_from(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    for name in ("configs/run.toml", "configs/lm.toml", "jobs/slurm.sh", "jobs/sites/lumi.sh"):
        assert (tmp_path / "site" / "hpctrain" / "examples" / name).read_bytes() == (
            ROOT / name
        ).read_bytes()
    command = [sys.executable, "-m", "hpctrain", "init", "mine"]
    subprocess.run(
        command, cwd=tmp_path, check=True, timeout=JOB_SECONDS, env={"PYTHONPATH": "site"}
    )
    assert 'name = "mine"' in (tmp_path / "mine" / "run.toml").read_text(encoding="utf-8")
