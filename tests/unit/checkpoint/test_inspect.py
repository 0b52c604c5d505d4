"""Checkpoints from the command line: listed, verified, compared, exported, without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hpctrain.checkpoint.export import export
from hpctrain.checkpoint.inspect import compared, difference, listed, verified
from hpctrain.checkpoint.load import load
from hpctrain.checkpoint.manager import CheckpointManager, Retention
from hpctrain.checkpoint.safetensors_files import raw_tensors, write_raw
from hpctrain.checkpoint.save import Snapshot
from hpctrain.cli import main
from hpctrain.errors import CheckpointError, ExitCode
from hpctrain.training.checkpointing.initialize import read_weights

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
]


def net(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator)
    changed = torch.randn(5, generator=generator)
    changed[2] += step
    return {"weight": weight, "tied": weight, "changed": changed, "half": weight.bfloat16() * step}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store = CheckpointManager(
        tmp_path / "run", retention=Retention(keep_last=9), confirm=lambda: None, warn=print
    )
    for step in (1, 2, 3):
        average = {"average/changed": torch.full((5,), float(step))} if step > 1 else {}
        store.save(
            Snapshot(
                step=step,
                model=net(step),
                training={"optimizer/weight/exp_avg": net(step)["weight"]} | average,
                values={},
                config_toml=f"[optimizer]\nlr = {step}\n[run]\nname = 'same'\n",
                metrics={"loss": 1.0 / step},
            )
        )
        store.finish()
    return tmp_path / "run"


def damage(run: Path) -> None:
    path = run / "checkpoints" / "step-00000002" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_list_has_a_line_for_each(run: Path) -> None:
    (run / "checkpoints" / "step-00000002" / "meta.json").unlink()
    head, *lines = listed(run).splitlines()
    assert "3 checkpoints" in head
    assert [line.split()[0] for line in lines] == [f"step-0000000{step}" for step in (1, 2, 3)]
    assert "loss 1" in lines[0]
    assert "not whole" in lines[1]
    assert lines[2].endswith("latest")


def test_what_is_whole_is_verified_and_what_is_not_is_named(run: Path) -> None:
    assert verified(run).count("  whole") == 3
    damage(run)
    with pytest.raises(CheckpointError, match=r"1 of 3 .*\n.*step-00000002/model.* is damaged"):
        verified(run)
    assert "whole" in verified(run / "checkpoints" / "step-00000003")
    with pytest.raises(CheckpointError, match="is damaged"):
        verified(run / "checkpoints" / "step-00000002")


def test_a_comparison_names_keys_and_tensors(run: Path) -> None:
    told = compared(run, None)
    assert "step-00000002" in told.splitlines()[0]
    assert "config  optimizer.lr: 2 and 3" in told
    assert "run.name" not in told
    assert "model  changed: 1 of 5 elements differ, by at most 1" in told
    assert "model  half: 12 of 12 elements differ" in told
    assert "training  average/changed: 5 of 5 elements differ, by at most 1, 0.5 of its" in told
    assert "weight:" not in told
    first, second = (run / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    assert "average/changed: only in step-00000002" in compared(first, second)
    assert compared(run, first).splitlines()[0].endswith("step-00000001:")
    assert "equal bit for bit" in compared(first, first)


@pytest.mark.parametrize("average", [False, True])
def test_an_export_loads_anywhere(run: Path, tmp_path: Path, average: bool) -> None:
    target = tmp_path / "weights.safetensors"
    assert "of step 3" in export(run, target, average=average)
    found = load_file(target)
    expected = net(3)
    if average:
        expected["changed"] = torch.full((5,), 3.0)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_weights_to_evaluate_with_are_those_that_leave(tmp_path: Path) -> None:
    """Where the optimizer trains with others: exported, said so, and begun from."""
    run = tmp_path / "run"
    second = {"evaluation/weight": net(1)["weight"] + 1}
    store = CheckpointManager(
        run, retention=Retention(keep_last=9), confirm=lambda: None, warn=lambda _: None
    )
    for step, training in ((1, {}), (2, second)):
        store.save(Snapshot(step=step, model=net(1), training=training, values={}, config_toml=""))
        store.finish()
    first, last = sorted((run / "checkpoints").iterdir())
    target = tmp_path / "weights.safetensors"
    assert "training weights of step 1" in export(first, target)
    assert "evaluation weights of step 2" in export(run, target)
    with safe_open(target, framework="pt") as file:
        assert file.metadata()["weights"] == "evaluation"
    for found in (load_file(target), read_weights(last)):
        for name, tensor in net(1).items():
            right = second["evaluation/weight"] if name in ("weight", "tied") else tensor
            assert torch.equal(found[name], right), name
    assert "evaluation weights too" in listed(run).splitlines()[2]
    assert torch.equal(load(last).model["weight"], net(1)["weight"])  # what a run goes on from


def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    with pytest.raises(CheckpointError, match="has no averages"):
        export(run / "checkpoints" / "step-00000001", target, average=True)
    with pytest.raises(CheckpointError, match="cannot write"):
        export(run, tmp_path / "nowhere" / "file")
    damage(run)
    with pytest.raises(CheckpointError, match="is damaged"):
        export(run / "checkpoints" / "step-00000002", target)
    assert not target.exists()


def bits(tensor: Tensor) -> list[int]:
    return tensor.flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_go_through_bytes_unchanged(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "matrix": (torch.randn(3, 4, generator=generator) * 5).to(dtype),
        "scalar": torch.tensor(1.0).to(dtype),
        "empty": torch.empty(0, 2, dtype=dtype),
    }
    save_file(tensors, tmp_path / "a")
    raw = raw_tensors((tmp_path / "a").read_bytes(), "a")
    values = raw["matrix"].values()
    if dtype == torch.float8_e4m3fn:
        assert values is None
    else:
        assert values is not None
        assert values.astype(float).tolist() == tensors["matrix"].double().tolist()
    write_raw(tmp_path / "b", raw, {"format": "pt"})
    for name, tensor in load_file(tmp_path / "b").items():
        assert tensor.dtype == dtype
        assert tensor.shape == tensors[name].shape
        assert bits(tensor) == bits(tensors[name])


def test_zeros_of_both_signs_and_numbers_that_are_none_differ(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([-0.0, 1.0])}, tmp_path / "zeros")
    raw = raw_tensors((tmp_path / "zeros").read_bytes(), "zeros")
    found = difference(raw["a"], raw["b"])
    assert found is not None
    assert (found.differing, found.largest) == (1, 0.0)
    assert difference(raw["a"], raw["a"]) is None


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["ls", "RUN"], 0, "3 checkpoints"),
        (["verify", "RUN"], 0, "whole"),
        (["diff", "RUN"], 0, "elements differ"),
        (["export", "RUN", "FILE"], 0, "of step 3"),
        (["export", "RUN"], ExitCode.USAGE, "needs a FILE"),
        (["ls", "RUN", "FILE"], ExitCode.USAGE, "takes one RUN"),
        (["ls", "RUN", "--average"], ExitCode.USAGE, "belong to"),
        (["lss", "RUN"], ExitCode.USAGE, "lss"),
        (["ls", "FILE"], ExitCode.CHECKPOINT_IO, "is it the folder of a run?"),
    ],
)
def test_the_commands(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    told: str,
) -> None:
    places = {"RUN": str(run), "FILE": str(tmp_path / "file")}
    assert main(["ckpt", *(places.get(word, word) for word in words)]) == code
    captured = capsys.readouterr()
    assert told in captured.out + captured.err


def test_none_of_it_needs_torch(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from hpctrain.cli import main\n"
        f"for word in ('ls', 'verify', 'diff'): assert main(['ckpt', word, {str(run)!r}]) == 0\n"
        f"assert main(['ckpt', 'export', {str(run)!r}, {str(tmp_path / 'x')!r}]) == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_so_many_steps_stay_for_ever() -> None:
    retention = Retention(keep_last=1, keep_every=10)
    checkpoints: list[tuple[int, Any]] = [(step, None) for step in (5, 10, 15, 20, 25)]
    assert retention.surplus(checkpoints) == [5, 15]


def test_space_is_looked_for_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    store = CheckpointManager(
        tmp_path, retention=Retention(keep_last=3), confirm=lambda: None, warn=told.append
    )
    store.require_space(1000)
    assert not told
    usage = shutil.disk_usage(tmp_path)._replace(free=2500)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    store.require_space(1000)
    assert "keep_last = 3" in told[0]
    with pytest.raises(CheckpointError, match=r"free some space, or set run\.directory"):
        store.require_space(3000)
