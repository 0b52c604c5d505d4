"""The run folder and the time left: what a trial leaves, and how they are judged."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hpctrain.config import load
from hpctrain.errors import CheckpointError
from hpctrain.preflight.storage import (
    FolderFacts,
    checkpoint_files,
    judge_cost,
    judge_folder,
    judge_shared,
    judge_space,
    judge_walltime,
    nearest_folder,
    trial_folder,
    try_folder,
)
from hpctrain.utils.batch_job import Budget
from hpctrain.utils.files import filesystem_of

ROOT = Path(__file__).parents[3]
MB, GB = 10**6, 10**9


def folder(
    filesystem: str = "lustre", seconds: float = 1.0, files: int | None = None
) -> FolderFacts:
    return FolderFacts(
        place="/scratch/runs",
        filesystem=filesystem,
        written_bytes=64 * MB,
        write_seconds=seconds,
        rename_seconds=0.001,
        free_bytes=GB,
        free_files=files,
    )


@pytest.mark.parametrize(
    ("facts", "checkpoint_bytes", "status", "words"),
    [
        (folder(), None, "pass", "64.0 MB/s"),
        (folder(), 640 * MB, "pass", "about 10.0 s"),
        (folder(), MB, "pass", "less than a second"),
        (folder(), 100 * GB, "warn", "(0:26:02)"),
        (folder("tmpfs"), MB, "warn", "may not outlive the job"),
    ],
)
def test_folder(facts: FolderFacts, checkpoint_bytes: int | None, status: str, words: str) -> None:
    finding = judge_folder(facts, checkpoint_bytes)
    assert (finding.status, words in finding.fact) == (status, True), finding


@pytest.mark.parametrize(
    ("seen", "status"),
    [({"a": True}, "skip"), ({"a": True, "b": True}, "pass"), ({"a": True, "b": False}, "warn")],
)
def test_shared(seen: dict[str, bool], status: str) -> None:
    assert judge_shared(seen, "/tmp/runs").status == status


@pytest.mark.parametrize(
    ("checkpoint_bytes", "status"),
    [(None, "skip"), (100 * MB, "pass"), (250 * MB, "pass"), (260 * MB, "warn"), (2 * GB, "fail")],
)
def test_space(checkpoint_bytes: int | None, status: str) -> None:
    assert judge_space(folder(), checkpoint_bytes, 6, kept=3).status == status


@pytest.mark.parametrize(
    ("free", "each", "status"), [(1000, 6, "pass"), (23, 6, "warn"), (5, 6, "fail")]
)
def test_files_are_counted_as_well_as_bytes(free: int, each: int, status: str) -> None:
    finding = judge_space(folder(files=free), MB, each, kept=3)
    assert finding.status == status
    assert f"room for {free:,} files; 4 checkpoints" in finding.fact
    assert finding.fact.endswith(f"and {4 * each} files")


@pytest.mark.parametrize(
    ("strategy", "ranks", "most", "files"),
    [
        ("ddp", 512, 0, 6),
        ("fsdp", 1, 0, 6),
        ("fsdp", 512, 0, 1028),
        ("fsdp", 512, 64, 62),
        ("fsdp", 512, 5, 6),
    ],
)
def test_files_of_a_checkpoint(strategy: str, ranks: int, most: int, files: int) -> None:
    asked = [f"training.strategy={strategy}", f"checkpoint.files={most}"]
    assert checkpoint_files(load(str(ROOT / "configs" / "run.toml"), asked), ranks) == files


@pytest.mark.parametrize(
    ("seconds", "most", "status", "words"),
    [
        (7200.0, 0.0, "pass", "on 8 nodes: about 16.0 node-hours"),
        (7200.0, 40.0, "pass", "; its jobs may take 40 together"),
        (36000.0, 40.0, "warn", "the run will stop before its end"),
        (None, 40.0, "skip", "unknown; its jobs may take 40 together"),
    ],
)
def test_cost(seconds: float | None, most: float, status: str, words: str) -> None:
    finding = judge_cost(8, seconds, Budget(max_node_hours=most))
    assert (finding.status, words in finding.fact) == (status, True), finding


@pytest.mark.parametrize(
    ("seconds", "problem", "needed", "status", "words"),
    [
        (math.inf, None, None, "pass", "no limit is known"),
        (math.inf, "qstat is not installed here", 100.0, "warn", "not installed"),
        (7200, None, 100.0, "pass", "2:00:00 left; all steps take about 0:01:40"),
        (7200, None, 8000.0, "pass", "has to be submitted again"),
        (100, None, None, "warn", "0:01:40 left"),
        (-1, None, None, "fail", "0:00:00 left"),
    ],
)
def test_walltime(
    seconds: float, problem: str | None, needed: float | None, status: str, words: str
) -> None:
    finding = judge_walltime(seconds, problem, needed)
    assert (finding.status, words in finding.fact) == (status, True), finding


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


def test_the_nearest_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path
    for name in ("file", "file/digits"):
        with pytest.raises(CheckpointError, match="file is not a directory"):
            nearest_folder(tmp_path / name)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="dangling is not a directory"):
        nearest_folder(tmp_path / "dangling")
