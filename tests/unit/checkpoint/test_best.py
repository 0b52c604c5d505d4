"""One place decides which checkpoint is the best, and everybody names the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hpctrain.checkpoint import inspect
from hpctrain.checkpoint.best import Best, Preference
from hpctrain.checkpoint.export import choose, export
from hpctrain.checkpoint.format import checksum_of_meta
from hpctrain.checkpoint.manager import CheckpointManager, Retention
from hpctrain.checkpoint.safetensors_files import raw_tensors
from hpctrain.checkpoint.save import Snapshot
from hpctrain.cli import main
from hpctrain.errors import CheckpointError
from hpctrain.training.optim.schedules import Plateau

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("mode", "values", "step"),
    [
        ("max", [0.5, 0.9, 0.9, 0.7], 2),
        ("min", [0.5, 0.1, 0.1, 0.7], 2),
        ("max", [NAN, 0.1, INF, 0.1], 2),
        ("min", [-INF, 0.1, NAN, -0.0], 4),
        ("min", [0.0, -0.0], 1),
        ("max", [None, -3.0], 2),
        ("max", [NAN, None], None),
    ],
)
def test_the_first_of_equals_is_the_best(mode: Any, values: list[Any], step: int | None) -> None:
    evaluated = [
        (number, None if value is None else {"a": value}) for number, value in enumerate(values, 1)
    ]
    for order in (evaluated, evaluated[::-1]):
        best = Preference("a", mode).best_of(order)
        assert (None if best is None else best.step) == step
    kept = set(range(1, len(values) + 1)) - set(
        Retention(keep_last=1, metric="a", mode=mode).surplus(evaluated)
    )
    assert kept == {len(values)} | ({step} if step else set())


def save(run: Path, values: list[float], count: int = 1) -> CheckpointManager:
    store = CheckpointManager(
        run,
        retention=Retention(keep_last=1, metric="accuracy", mode="max", keep_best_count=count),
        confirm=lambda: None,
        warn=print,
    )
    for step, value in enumerate(values, 1):
        store.save(
            Snapshot(
                step=step,
                model={"weight": torch.tensor([float(step)])},
                training={},
                values={},
                config_toml="",
                metrics={"accuracy": value, "loss": 1 - value},
            )
        )
        store.finish()
    return store


def test_all_name_the_same_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of equals the summary named the first, which retention had deleted for the last."""
    store = save(tmp_path, [0.5, 0.9, 0.9, 0.9, 0.8])
    assert store.best() == Best("accuracy", 0.9, 2)
    names = sorted(path.name for path in store.folder.iterdir())
    assert names == ["step-00000002", "step-00000005"]
    lines = inspect.listed(tmp_path).splitlines()
    assert [line.split()[0] for line in lines if " best" in line] == ["step-00000002"]
    assert [line.split()[0] for line in lines if " latest" in line] == ["step-00000005"]
    target = tmp_path / "best.safetensors"
    assert main(["ckpt", "export", str(tmp_path), str(target), "--best"]) == 0
    assert "of step 2" in capsys.readouterr().out
    (weight,) = raw_tensors(target.read_bytes(), target).values()
    assert weight.values() == [2.0]


def test_several_of_the_best_are_kept(tmp_path: Path) -> None:
    store = save(tmp_path, [0.5, 0.9, NAN, 0.7, 0.9, 0.7, 0.1], count=3)
    assert store.best() == Best("accuracy", 0.9, 2)
    lines = {line.split()[0]: line for line in inspect.listed(tmp_path).splitlines()[1:]}
    marked = {name: line.split("loss")[1].split()[1:] for name, line in lines.items()}
    assert marked == {
        "step-00000002": ["best"],
        "step-00000004": ["best", "3"],
        "step-00000005": ["best", "2"],
        "step-00000007": ["latest"],
    }
    assert choose(tmp_path, best=True)[0].name == "step-00000002"
    meta = json.loads((tmp_path / "checkpoints/step-00000007/meta.json").read_text())
    assert meta["keep_best"] == {"metric": "accuracy", "mode": "max", "count": "3"}


def test_without_a_best_there_is_none_to_export(tmp_path: Path) -> None:
    save(tmp_path, [0.5])
    newest = tmp_path / "checkpoints" / "step-00000001"
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        export(newest, tmp_path / "x", best=True)
    meta = json.loads((newest / "meta.json").read_text())
    del meta["keep_best"], meta["xxh3_64"]
    meta["xxh3_64"] = checksum_of_meta(meta)
    (newest / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        export(tmp_path, tmp_path / "x", best=True)
    assert " best" not in inspect.listed(tmp_path)


def test_a_plateau_counts_by_the_same_comparison() -> None:
    for mode, values in (("min", [1.0, 1.0, 0.5, 0.5]), ("max", [1.0, 1.0, 2.0, 2.0])):
        plateau = Plateau(metric="a", patience=0, factor=0.5, threshold=0)
        plateau.watch({"a": mode})  # type: ignore[dict-item]
        factors = []
        for value in values:
            plateau.observe({"a": value})
            factors.append(plateau(0, 0))
        assert factors == [1, 0.5, 0.5, 0.25]


def test_a_plateau_of_the_other_direction_starts_anew() -> None:
    falling, rising = Plateau(metric="a", patience=0), Plateau(metric="a", patience=0)
    falling.watch({"a": "min"})
    rising.watch({"a": "max"})
    falling.observe({"a": 5.0})
    rising.load_state_dict(falling.state_dict())
    rising.observe({"a": -9.0})
    rising.observe({"a": -8.0})
    assert rising(0, 0) == 1
