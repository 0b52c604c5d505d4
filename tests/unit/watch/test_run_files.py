"""What a page may read of a run folder, and that it reads nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.made_runs import append, made_run, record

from hpctrain.errors import ConfigError
from hpctrain.watch.run_files import RunFiles


def opened(folder: Path) -> RunFiles:
    return RunFiles(folder, lambda _: True)


def test_facts(tmp_path: Path) -> None:
    run = opened(made_run(tmp_path / "run"))
    facts = run.facts()
    assert (facts["state"], facts["step"], facts["max_steps"]) == ("running", 200, 1000)
    first, second = facts["jobs"]
    assert first["end"] - first["start"] == 60
    assert (first["ranks"], first["nodes"], first["step"]) == (8, 2, 100)
    assert second["end"] is None
    assert second["seen"] > second["start"]
    assert [each.name for each in run.growing()] == ["metrics.jsonl", "log.txt"]


def test_pieces_follow_each_other(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    run = opened(folder)
    content = (folder / "metrics.jsonl").read_bytes()
    assert run.piece("metrics.jsonl", 0, 100) + run.piece("metrics.jsonl", 100) == content
    append(folder, record(210))
    more = run.piece("metrics.jsonl", len(content))
    assert json.loads(more)["step"] == 210
    before = run.growing()[0]
    folder.joinpath("new").write_bytes(content[:200])
    folder.joinpath("new").replace(folder / "metrics.jsonl")
    assert run.growing()[0].identity != before.identity


@pytest.mark.parametrize(
    "name",
    [
        *("../secret", "/etc/passwd", "config.toml/../../secret", "machine/../../secret", ""),
        *("checkpoints/step-00000010/model.safetensors", "jobs/1.json", "metrics.jsonl\0x"),
        *("machine/.../x.jsonl", "machine//etc/passwd.jsonl", "LOG.TXT"),
    ],
)
def test_other_files_are_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    run = opened(made_run(tmp_path / "run"))
    with pytest.raises(FileNotFoundError):
        run.piece(name, 0)


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"kind": "train", "step": 1}\n')
    folder = made_run(tmp_path / "run")
    (folder / "log.txt").unlink()
    (folder / "log.txt").symlink_to(secret)
    (folder / "machine").symlink_to(tmp_path)
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    (folder / "jobs" / "3.json").symlink_to(secret)
    run = opened(folder)
    assert run.growing() == []
    for name in ("log.txt", "metrics.jsonl", "machine/secret.jsonl"):
        with pytest.raises(OSError, match=r"Not a directory|is a link|is not a regular file"):
            run.piece(name, 0)
    assert len(run.facts()["jobs"]) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"number": "x"}', '{"number": 1, "steps": 3}']
)
def test_what_is_damaged_is_left_out(tmp_path: Path, content: str) -> None:
    folder = made_run(tmp_path / "run")
    (folder / "jobs" / "2.json").write_text(content)
    (folder / "exit.json").write_text(content)
    (folder / "config.toml").write_text("[training\n")
    facts = opened(folder).facts()
    assert facts["state"] == "unknown"
    assert [job["number"] for job in facts["jobs"]] == [1]
    json.dumps(facts, allow_nan=False)


def test_there_has_to_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        opened(tmp_path / "nowhere")
