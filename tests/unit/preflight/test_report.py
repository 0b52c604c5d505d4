"""What the preflight reports, in lines and as JSON."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from helpers.preflight_tables import gpu, rank, topology

from hpctrain.errors import DatasetError
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
