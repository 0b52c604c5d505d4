"""Command lines of `run SCRIPT`, and `fabric run`'s options on those of configs."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.launching import ROOT

from hpctrain.cli import main
from hpctrain.cli.processes import Wanted, check_world, read_wanted
from hpctrain.cli.scripts import parse_run
from hpctrain.config import load
from hpctrain.errors import LaunchError, UsageError
from hpctrain.launch.placement import Node, place
from hpctrain.launch.start_ranks import Nodes, nodes_of


@pytest.mark.parametrize(
    ("words", "program", "given"),
    [
        ("train.py", "train.py", {}),
        ("--np 2 train.py --lr 3", "train.py --lr 3", {"--np": "2"}),
        ("train.py --np=2 --lr 3", "train.py --lr 3", {"--np": "2"}),
        ("train.py --num_nodes 2 x", "train.py x", {"--num-nodes": "2"}),
        ("train.py --np 2 -- --np 5 -- y", "train.py --np 5 -- y", {"--np": "2"}),
        ("--np 2 -- train.py --np 5", "train.py --np 5", {"--np": "2"}),
        ("-m package.train --np 2 -m x", "-m package.train -m x", {"--np": "2"}),
        ("--precision=16 -- -m mod --strategy s", "-m mod --strategy s", {"--precision": "16"}),
        ("train.py --learning_rate 3", "train.py --learning_rate 3", {}),
    ],
)
def test_what_is_ours_and_what_is_the_scripts(
    words: str, program: str, given: dict[str, str]
) -> None:
    found, options = parse_run(words.split())
    assert (" ".join(found.words), options) == (program, given)


ENV = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500", "NODE_RANK": "1", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("env", "given", "nodes"),
    [
        ({}, {}, None),
        (ENV, {}, Nodes(count=4, rank=1, address="n1", port=29500)),
        (ENV, {"rank": 0, "port": 1}, Nodes(count=4, rank=0, address="n1", port=1)),
        ({**ENV, "WORLD_SIZE": "1", "NODE_RANK": "0"}, {}, None),
        ({**ENV, "RANK": "5"}, {}, None),  # a rank, whose WORLD_SIZE counts ranks
        ({"NODE_RANK": "0"}, {"count": 2, "address": "a"}, Nodes(count=2, rank=0, address="a")),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"},
            {},
            Nodes(count=2, rank=1, address="a"),
        ),
    ],
)
def test_nodes_without_a_launcher(
    env: dict[str, str], given: dict[str, int | str], nodes: Nodes | None
) -> None:
    assert nodes_of(env, **given) == nodes  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("env", "given", "words"),
    [
        ({"NODE_RANK": "1"}, {}, "--num-nodes N is needed"),
        ({}, {"count": 2}, "--node-rank R is needed"),
        ({}, {"count": 2, "rank": 0}, "--main-address A is needed"),
        ({}, {"count": 2, "rank": 2, "address": "a"}, "node ranks are 0 to 1"),
        ({**ENV, "WORLD_SIZE": "many"}, {}, "WORLD_SIZE='many' is not a whole number"),
        ({**ENV, "MASTER_PORT": "70000"}, {}, "port 70000"),
    ],
)
def test_nodes_that_cannot_meet(env: dict[str, str], given: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        nodes_of(env, **given)  # type: ignore[arg-type]


def test_fabrics_options_are_keys_of_a_config() -> None:
    wanted = read_wanted({"--precision": "bf16", "--strategy": "deepspeed_stage_2"}, "")
    config = load(str(ROOT / "configs" / "run.toml"), wanted.overrides)
    assert config.training.precision == "bf16-mixed"
    assert (config.training.strategy, config.training.reshard_after_forward) == ("fsdp", False)
    wanted = read_wanted({"--accelerator": "gpu"}, "")
    assert load(str(ROOT / "configs" / "run.toml"), wanted.overrides).launch.device == "cuda"
    assert wanted.choices == {"HPCTRAIN_ACCELERATOR": "gpu"}


def test_a_launchers_ranks_are_compared_with_what_was_asked_for() -> None:
    topology = place(0, [Node("a", "n1")] * 2 + [Node("b", "n2")] * 2, launcher="srun", mpi=None)
    check_world(Wanted(np=4, devices="auto"), topology)
    check_world(Wanted(devices="2"), topology)
    check_world(Wanted(devices="0,1"), topology)
    with pytest.raises(LaunchError, match="srun has started 4 ranks; --np 2 asks for 2: start 2"):
        check_world(Wanted(np=2), topology)
    with pytest.raises(LaunchError, match="srun has started 2 ranks on n1; --devices 4 asks for 4"):
        check_world(Wanted(devices="4"), topology)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("run", "a script is needed"),
        ("run --npp 2 train.py", "did you mean --np?"),
        ("run train.py --np", "--np needs a value"),
        ("run --np two train.py", "--np: invalid int value: 'two'"),
        ("run --np 0 train.py", "at least one process is needed"),
        ("run --precision 17 train.py", "there is no precision '17'"),
        ("run --precision 16-true train.py", "the nearest are bf16-true, 16-mixed"),
        ("run --strategy fdsp train.py", 'did you mean "fsdp"?'),
        ("run --accelerator tpu train.py", "there are no TPUs"),
        ("run --devices many train.py", "a number, a list such as 0,1, or auto"),
        ("run --np 2 --devices 3 train.py", "disagree"),
        ("run --strategy single_device --np 2 train.py", "ddp is of several"),
        ("run run.toml a.b=1", "python -m hpctrain run.toml a.b=1"),
        ("train.py --np 2 --lr 3", "python -m hpctrain run train.py --np 2 --lr 3"),
        ("check train.py", "python -m hpctrain run train.py"),
        ("statsu runs/x", "did you mean 'status'?"),
        ("run.toml --epochs=3", "SECTION.KEY=VALUE"),
        ("run.toml --device 3", "did you mean --devices?"),
        ("run.toml --precision 8", "there is no precision '8'"),
        ("check run.toml --np 0", "at least one process is needed"),
        ("status", "the following arguments are required: run"),
        ("data unpack", "invalid choice: 'unpack'"),
    ],
)
def test_a_wrong_command_line_is_three_lines(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 64
    lines = capsys.readouterr().err.splitlines()
    assert told in lines[0]
    assert lines[1].startswith("usage: python -m hpctrain")
    assert len(lines) == 3


def test_a_script_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    assert main(["run", "--np", "2", "trian.py"]) == 64
    assert "trian.py: no such file; did you mean train.py?" in capsys.readouterr().err
    assert main(["run", "-m", "no.such.module"]) == 64
    assert "there is no such module to run" in capsys.readouterr().err
