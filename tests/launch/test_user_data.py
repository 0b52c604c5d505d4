"""docs/own-code.md, "Datasets", run as it stands; and the same samples packed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import here, in_turn
from helpers.launching import ROOT

pytestmark = pytest.mark.ranks(3)

PAGE = (ROOT / "docs" / "own-code.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## Datasets") :].split("\n## ")[0]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", SECTION, re.DOTALL)


def ended(site: Path, name: str) -> tuple[list[dict[str, Any]], bytes]:
    """Return the metrics of a run, and its weights."""
    folder = site / "runs" / name
    clocked = {"seconds", "samples_per_second", "wall_time"}
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [{k: v for k, v in json.loads(line).items() if k not in clocked} for line in lines]
    newest = max((folder / "checkpoints").glob("step-*"))
    return metrics, (newest / "model.safetensors").read_bytes()


def test_a_dataset_trains_as_the_same_samples_packed(tmp_path: Path) -> None:
    """To the bit, though it was stopped in the midst of an epoch and has gone on."""
    (program,), (config,) = blocks("python"), blocks("toml")
    start, packs = blocks("console")
    (tmp_path / "my_data.py").write_text(program, encoding="utf-8")
    (tmp_path / "own.toml").write_text(config, encoding="utf-8")
    assert shlex.split(start)[3:] == ["python", "-m", "hpctrain", "own.toml"]
    for line in packs.splitlines():
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "hpctrain"]
        here(tmp_path, *words[3:])

    common = ["own.toml", "logging.every_steps=1"]
    further = 'data.evaluations.again="my_data:make_validation"'
    packed = ["run.name=packed", 'data.cache="memory"', 'data.train="data/own/train"']
    packed += ['data.validation="data/own/validation"']
    packed += ['data.evaluations.again="data/own/validation"']
    jobs = in_turn(
        tmp_path,
        3,
        [*common, "training.max_steps=9"],
        [*common, further],
        [*common, *packed],
    )
    assert [job.code for job in jobs] == [0, 0, 0], [job.output for job in jobs]
    told = jobs[0].output
    assert "my_data:make_train: Subset of 1,438 samples, read by 1 worker process a rank" in told
    assert "my_data:make_validation: Subset of 359 samples, read by the rank itself" in told
    metrics, weights = ended(tmp_path, "own")
    expected, packed_weights = ended(tmp_path, "packed")
    assert [each for each in metrics if each["kind"] == "train"] == expected[:-2]
    assert metrics[-2:] == expected[-2:]
    assert [each["split"] for each in metrics[-2:]] == ["validation", "again"]
    assert metrics[-1]["loss"] == metrics[-2]["loss"]
    assert weights == packed_weights
