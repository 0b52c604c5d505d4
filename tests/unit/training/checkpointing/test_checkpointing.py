"""Which checkpoint a job goes on from, and that none is lost to a job that cannot read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.worlds import world_of_one

from hpctrain.checkpoint.format import UnreadableError
from hpctrain.checkpoint.manager import CheckpointManager, Retention
from hpctrain.checkpoint.save import Snapshot
from hpctrain.config import load
from hpctrain.errors import CheckpointError
from hpctrain.training.checkpointing.resume import find_checkpoint

CONFIG = str(Path(__file__).parents[4] / "configs" / "run.toml")
WORLD = world_of_one("none")


def save(run: Path, *steps: int, keep_last: int = 9) -> None:
    store = CheckpointManager(
        run, retention=Retention(keep_last=keep_last), confirm=lambda: None, warn=print
    )
    for step in steps:
        values: dict[str, Any] = {
            "place": {"step": step, "epoch": 0, "position": step, "samples_seen": step},
            "data": {},
            "world_size": 1,
            "device": "cpu",
            "threads": 1,
            "scaler": {},
            "generators": [{"numpy": ["MT19937", 1, 0, 0.0], "python": [3, None]}],
            "total_steps": 99,
            "lr": 0.1,
            "metrics": {},
            "best": None,
        }
        tensors = {"weight": torch.full((3,), float(step))}
        store.save(
            Snapshot(
                step=step,
                model=tensors,
                training={},
                values=values,
                config_toml="",
                metrics=None,
            )
        )
    store.finish()


def steps(run: Path, folder: str = "checkpoints") -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / folder).iterdir())


def damage(run: Path, step: int) -> None:
    path = run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def go_on(run: Path, resume: str = "auto") -> int | None:
    config = load(CONFIG, [f"checkpoint.resume={resume}"])
    resumed = find_checkpoint(config, WORLD, run)
    return None if resumed is None else resumed.place.step


def test_damaged_ones_are_passed_over_and_kept_aside(tmp_path: Path) -> None:
    """They stood among the others as newer ones: the next save deleted itself as a surplus."""
    save(tmp_path, 1, 2, 3)
    damage(tmp_path, 2)
    damage(tmp_path, 3)
    assert go_on(tmp_path) == 1
    assert steps(tmp_path) == [1]
    assert steps(tmp_path, "checkpoints-old-1") == [2, 3]
    assert (tmp_path / "latest").read_text() == "step-00000001\n"
    save(tmp_path, 2, keep_last=1)
    assert steps(tmp_path) == [2]


def test_what_is_newer_takes_no_place_from_what_is_saved(tmp_path: Path) -> None:
    save(tmp_path, 7)
    damage(tmp_path, 7)
    save(tmp_path, 2, 3, keep_last=1)
    assert steps(tmp_path) == [3, 7]


def test_where_none_is_whole_nothing_begins_anew(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-00000002" / "meta.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)none of the 2 checkpoints.*never.*no meta\.js"):
        go_on(tmp_path)
    assert steps(tmp_path) == [1, 2]
    assert go_on(tmp_path, "never") is None
    assert steps(tmp_path, "checkpoints-old-1") == [1, 2]
    assert go_on(tmp_path) is None


@pytest.mark.parametrize("name", ["meta.json", "model.safetensors", "training.json"])
def test_one_that_cannot_be_read_now_is_not_passed_over(tmp_path: Path, name: str) -> None:
    """A link to itself cannot be read by root either."""
    save(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "step-00000002" / name
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(UnreadableError, match=r"symbolic links\. It may be whole.*never"):
        go_on(tmp_path)
    assert steps(tmp_path) == [1, 2]


def test_one_of_a_newer_hpctrain_is_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "step-00000002" / "meta.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(CheckpointError, match="update hpctrain"):
        go_on(tmp_path)


def test_checkpoints_that_cannot_be_listed_are_not_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="checkpoints"):
        go_on(tmp_path)


def test_a_run_whose_checkpoints_are_gone_begins_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    assert go_on(tmp_path) is None
    assert "names a checkpoint, and there is none" in caplog.text
    assert go_on(tmp_path, "never") is None
    assert not (tmp_path / "latest").exists()
