"""What the preflight says, how it gathers failures, and what its probes leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from helpers.preflight_tables import gpu, rank, topology

from hpctrain.data.dataset import Dataset, Field, Layout, Shard
from hpctrain.errors import CheckpointError, DatasetError
from hpctrain.launch.single import SingleCommunicator
from hpctrain.preflight.checks import Answer, CheckError, ask
from hpctrain.preflight.data import unseen_shards
from hpctrain.preflight.report import (
    COLUMNS,
    Finding,
    Status,
    exit_code,
    finding_text,
    overall,
    ranges,
    start_failed_json,
    to_json,
    verdict,
    world_table,
)
from hpctrain.preflight.storage import nearest_folder, trial_folder, try_folder
from hpctrain.utils.files import filesystem_of


def finding(status: Status, **changed: Any) -> Finding:
    return Finding(name="memory", status=status, **{"fact": "a fact", **changed})


@pytest.mark.parametrize(
    ("statuses", "whole", "code", "words"),
    [
        (["pass", "skip"], "pass", 0, "ready: 1 passed, 1 skipped"),
        (["pass", "warn", "pass"], "warn", 0, "ready: 1 to look at, 2 passed"),
        (["warn", "fail", "skip"], "fail", 69, "not ready: 1 failed, 1 to look at, 1 skipped"),
    ],
)
def test_verdict(statuses: list[Status], whole: str, code: int, words: str) -> None:
    findings = [finding(status) for status in statuses]
    assert (overall(findings), exit_code(findings)) == (whole, code)
    assert verdict(findings) == words


@pytest.mark.parametrize("status", get_args(Status))
def test_a_finding_fits_the_page(status: Status) -> None:
    text = finding_text(
        finding(status, fact="many words " * 40 + "\nanother line", fix="do this and that " * 20)
    )
    lines = text.splitlines()
    assert lines[0].startswith(f"{status}  memory   ")
    assert max(map(len, lines)) <= COLUMNS
    assert sum(line.strip().startswith("fix: ") for line in lines) == 1
    assert any(line.strip() == "another line" for line in lines)
    assert "\x1b" not in text


def test_a_path_stays_whole() -> None:
    path = "/scratch/" + "long-name/" * 20
    assert path in finding_text(finding("fail", fact=f"{path}: no such file"))


def test_the_table() -> None:
    table = world_table([rank(0), rank(1, cores=(0, 1, 4), numa_nodes=(0, 1))])
    assert table.splitlines() == [
        "rank  host  local  device  cores  NUMA  interface",
        "0     n0    0      cpu     0-7    0     lo",
        "1     n0    1      cpu     0-1,4  0-1   lo",
    ]
    with_gpus = world_table([gpu(0, device_uuid="GPU-0123456789abcdef")])
    assert "01234567  0-7" in with_gpus
    many = world_table([rank(i, host="a-very-long-host-name.of.a.site.example") for i in range(99)])
    assert many.splitlines()[-1] == "and 67 more ranks; --json has all of them"
    assert max(map(len, many.splitlines())) <= COLUMNS


def test_json() -> None:
    findings = [finding("warn", fix="do", values={"bytes": 7})]
    report = json.loads(to_json("run.toml", topology(), "gloo", [rank(0), rank(1)], findings))
    assert (report["status"], report["exit_code"]) == ("warn", 0)
    assert report["world"]["world_size"] == 4
    assert [each["rank"] for each in report["ranks"]] == [0, 1]
    assert report["findings"] == [
        {"name": "memory", "status": "warn", "fact": "a fact", "fix": "do", "values": {"bytes": 7}}
    ]
    failed = json.loads(start_failed_json("run.toml", DatasetError("gone")))
    assert (failed["exit_code"], failed["findings"][0]["fact"]) == (65, "gone")


def test_small_words() -> None:
    assert ranges([]) == ""
    assert ranges([64, 0, 1, 2]) == "0-2,64"


def test_a_failure_on_any_rank_is_a_finding() -> None:
    here = topology(world_size=1)
    assert ask(here, SingleCommunicator(), lambda: 7) == [7]

    def broken() -> None:
        raise ValueError("the model is unwell")

    with pytest.raises(CheckError) as raised:
        ask(here, SingleCommunicator(), broken)
    assert str(raised.value) == "ValueError: the model is unwell"
    answers = [Answer(0, "a", 1), Answer(1, "b", None, "unwell"), Answer(2, "b", None, "unwell")]
    some = CheckError(answers, 3).finding("step", "rest")
    assert some.fact == "rank 1 on b (and 1 more of 3): unwell"
    assert (some.status, some.values["ranks"]) == ("fail", [1, 2])
    assert str(CheckError(answers[1:], 2)) == "unwell"  # all of them: no rank is to be named


def test_the_folder_probe_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "digits"
    with trial_folder(run) as trial:
        assert trial.parent == tmp_path
        facts = try_folder(trial)
    assert facts.written_bytes > 0
    assert facts.place == str(tmp_path)
    assert facts.filesystem == filesystem_of(tmp_path) != "unknown"
    with pytest.raises(ZeroDivisionError), trial_folder(run):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_shards_that_a_node_does_not_see(tmp_path: Path) -> None:
    shards = []
    for number, (there, listed_size) in enumerate([(4, 4), (4, 5), (None, 4)]):
        path = tmp_path / f"{number}.h5"
        if there is not None:
            path.write_bytes(bytes(there))
        shards.append(Shard(str(path), 1, listed_size, None, {"x": Layout(0)}))
    dataset = Dataset("data", {"x": Field((), np.dtype("int32"))}, tuple(shards))
    assert unseen_shards(dataset) == [
        f"{tmp_path}/1.h5: 4 bytes here, 5 on rank 0",
        f"{tmp_path}/2.h5: No such file or directory",
    ]


def test_the_nearest_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path
    for name in ("file", "file/digits"):
        with pytest.raises(CheckpointError, match="file is not a directory"):
            nearest_folder(tmp_path / name)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="dangling is not a directory"):
        nearest_folder(tmp_path / "dangling")
