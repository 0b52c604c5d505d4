"""In what a job differs from the one that saved its checkpoint."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.limits import JOB_SECONDS
from helpers.worlds import world_of_one

from hpctrain.checkpoint.format import META, checksum_of_meta
from hpctrain.launch.process_group import World
from hpctrain.observe import job_record
from hpctrain.observe.job_record import JobRecord
from hpctrain.training.checkpointing.resume import Resumed
from hpctrain.training.record import changed_since, made_by

SAVED = Path(__file__).parents[2] / "data" / "0.1.0" / "ddp" / "checkpoints" / "step-00000007"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a record on a busy machine, too."""
    monkeypatch.setattr(job_record, "_PATIENCE_SECONDS", JOB_SECONDS)


@pytest.fixture
def world() -> World:
    return world_of_one("none")


def resumed(folder: Path, **changes: Any) -> Resumed:
    """Return a checkpoint of step 1,200, with these changes to its meta.json."""
    path = folder / "step-00001200"
    shutil.copytree(SAVED, path, dirs_exist_ok=True)
    meta = json.loads((SAVED / META).read_bytes())
    del meta["xxh3_64"]
    meta |= changes
    meta["xxh3_64"] = checksum_of_meta(meta)
    (path / META).write_text(json.dumps(meta), encoding="utf-8")
    place = {"step": 1200, "epoch": 0, "position": 0, "samples_seen": 0}
    return Resumed(path=str(path), model={}, training={}, values={"place": place}, config_toml="")


def test_versions_that_are_not_as_they_were(tmp_path: Path, world: World) -> None:
    now = torch.__version__
    record = JobRecord(tmp_path)
    # As 0.1.0 noted them, and as they are noted now.
    of_old = resumed(tmp_path, versions={"torch": "2.11.0", "safetensors": "0.0"})
    assert changed_since(of_old, record, world) == [f"torch 2.11.0 when saved, {now} now"]
    note = made_by(record, world)
    assert changed_since(resumed(tmp_path, made_by=note), record, world) == []
    note["versions"] = {**note["versions"], "HDF5": "1.10.0", "MPI": "gone by now"}
    found = changed_since(resumed(tmp_path, made_by=note), record, world)
    assert [line.partition(" when")[0] for line in found] == ["HDF5 1.10.0"]


def test_modules_that_are_not_as_they_were(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("my_models.py").write_text("width = 1\n", encoding="utf-8")
    importlib.import_module("my_models")
    try:
        then, now = JobRecord(tmp_path), JobRecord(tmp_path)
        then.note_modules()
        assert then.modules() is not None
        Path("my_models.py").write_text("width = 2\n", encoding="utf-8")
        now.note_modules()
        saved = resumed(tmp_path, made_by=made_by(then, world))
        assert changed_since(saved, then, world) == []
        assert changed_since(saved, now, world) == ["code: my_models.py changed since step 1,200"]
    finally:
        del sys.modules["my_models"]


def test_a_checkpoint_that_is_gone_is_compared_with_nothing(tmp_path: Path, world: World) -> None:
    saved = resumed(tmp_path)
    shutil.rmtree(saved.path)
    assert changed_since(saved, JobRecord(tmp_path), world) == []
