"""A checkpoint is whole or not there, and what comes back is what was saved, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.waiting import wait_for
from torch import Tensor

from hpctrain.checkpoint import manager
from hpctrain.checkpoint import save as saving
from hpctrain.checkpoint.load import load, load_newest
from hpctrain.checkpoint.manager import CheckpointManager, Retention
from hpctrain.checkpoint.save import Snapshot
from hpctrain.errors import CheckpointError, ExitCode


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(17, 5, generator=generator)
    return {
        "weight": weight,
        "tied": weight,
        "transposed": weight.t(),
        "scalar": torch.tensor(float(step), dtype=torch.float64),
        "half": weight.to(torch.bfloat16),
        "count": torch.tensor(step, dtype=torch.int64),
        "mask": weight > 0,
        "empty": torch.empty(0, 3),
    }


def snapshot(step: int, metrics: dict[str, float] | None = None) -> Snapshot:
    return Snapshot(
        step=step,
        model=tensors(step),
        training={"weight/exp_avg": tensors(step)["weight"] * 2},
        values={"place": {"step": step}, "exact": 0.1 + 0.2},
        config_toml="[run]\n",
        metrics=metrics,
    )


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def make_store(tmp_path: Path, told: list[str]) -> Callable[..., CheckpointManager]:
    def make(
        retention: Retention | None = None, confirm: Callable[[], None] = lambda: None
    ) -> CheckpointManager:
        return CheckpointManager(
            tmp_path,
            retention=retention or Retention(keep_last=100),
            confirm=confirm,
            warn=told.append,
        )

    return make


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_comes_back_is_what_was_saved(
    tmp_path: Path, make_store: Callable[..., CheckpointManager]
) -> None:
    store = make_store()
    store.save(snapshot(120))
    store.finish()
    for path in (tmp_path / "checkpoints" / "step-00000120", tmp_path):
        loaded = load(path)
        assert loaded.step == 120
        assert loaded.values == {"place": {"step": 120}, "exact": 0.1 + 0.2}
        for name, tensor in tensors(120).items():
            assert loaded.model[name].dtype == tensor.dtype
            assert torch.equal(loaded.model[name], tensor), name
        assert torch.equal(loaded.training["weight/exp_avg"], tensors(120)["weight"] * 2)
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "step-00000120\n"


def test_training_may_go_on_while_a_save_is_written(
    make_store: Callable[..., CheckpointManager], tmp_path: Path
) -> None:
    store, live = make_store(), snapshot(1)
    store.save(live)
    for tensor in live.model.values():
        tensor.zero_()
    store.finish()
    assert torch.equal(load(tmp_path).model["weight"], tensors(1)["weight"])


def test_what_is_lent_is_copied_until_somebody_wants_to_change_it(
    make_store: Callable[..., CheckpointManager], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save returns before, and what waits for it returns only after."""
    may_copy, waits = threading.Event(), []
    copy = saving._copy

    def slow(buffer: Tensor, tensor: Tensor) -> None:
        assert may_copy.wait(60)
        copy(buffer, tensor)

    monkeypatch.setattr(saving, "_copy", slow)
    store = make_store()
    lent = {f"optimizer/{name}": tensor for name, tensor in tensors(7).items() if name != "tied"}
    store.save(replace(snapshot(7), lent=lent, lend=waits.append))
    changer = threading.Thread(target=waits[0])
    changer.start()
    changer.join(0.05)
    assert changer.is_alive()
    may_copy.set()
    changer.join(60)
    assert not changer.is_alive()
    for tensor in lent.values():
        tensor.zero_()
    store.finish()
    assert store.stall_seconds > 0.05
    loaded = load(tmp_path).training
    assert torch.equal(loaded["weight/exp_avg"], tensors(7)["weight"] * 2)
    for name, tensor in tensors(7).items():
        if name != "tied":
            assert torch.equal(loaded[f"optimizer/{name}"], tensor), name


def test_a_copy_that_fails_is_told(
    make_store: Callable[..., CheckpointManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(saving, "_copy", fail)
    store = make_store()
    store.save(replace(snapshot(1), lent=tensors(1)))
    with pytest.raises(CheckpointError, match="cannot copy what is to be saved: the device is"):
        store.finish()


def test_buffers_are_kept_from_save_to_save(
    make_store: Callable[..., CheckpointManager], tmp_path: Path
) -> None:
    store = make_store()
    for step in (1, 2, 3):
        store.save(snapshot(step))
    store.finish()
    for step in (1, 2, 3):
        path = tmp_path / "checkpoints" / f"step-{step:08d}"
        assert torch.equal(load(path).model["weight"], tensors(step)["weight"])


def test_the_model_file_loads_anywhere(
    make_store: Callable[..., CheckpointManager], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    store = make_store()
    store.save(snapshot(5))
    store.finish()
    loaded = load_file(tmp_path / "checkpoints" / "step-00000005" / "model.safetensors")
    assert torch.equal(loaded["weight"], tensors(5)["weight"])
    assert "tied" not in loaded  # stored once, under its first name


def test_every_damaged_byte_is_noticed(
    make_store: Callable[..., CheckpointManager], tmp_path: Path, told: list[str]
) -> None:
    """Flipped, cut or missing: the checkpoint is refused and the one before it is taken."""
    store = make_store()
    for step in (1, 2):
        store.save(snapshot(step))
    store.finish()
    newest = tmp_path / "checkpoints" / "step-00000002"
    copy = tmp_path / "copy"
    shutil.copytree(newest, copy)
    draw = random.Random(0)
    files = sorted(path.name for path in copy.iterdir())
    for number in range(600):
        name = draw.choice(files)
        content = bytearray((copy / name).read_bytes())
        at = draw.randrange(len(content))
        damage = "flip" if number < 500 else draw.choice(["cut", "missing"])
        if damage == "flip":
            content[at] ^= 1 << draw.randrange(8)
            (newest / name).write_bytes(content)
        elif damage == "cut":
            (newest / name).write_bytes(content[:at])
        else:
            (newest / name).unlink()
        told.clear()
        loaded = load_newest(tmp_path / "checkpoints", told.append)
        assert loaded is not None
        assert loaded.step == 1
        assert len(told) == 1
        assert "step-00000002" in told[0]
        shutil.copy(copy / name, newest / name)


def test_a_metric_that_is_no_number_never_wins(
    make_store: Callable[..., CheckpointManager], tmp_path: Path
) -> None:
    store = make_store(Retention(keep_last=1, metric="loss"))
    for step, loss in [(1, 3.0), (2, float("nan")), (3, 5.0)]:
        store.save(snapshot(step, {"loss": loss}))
    store.finish()
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_newer_format_is_refused_in_words(
    make_store: Callable[..., CheckpointManager], tmp_path: Path
) -> None:
    store = make_store()
    store.save(snapshot(1))
    store.finish()
    meta = tmp_path / "checkpoints" / "step-00000001" / "meta.json"
    content = json.loads(meta.read_bytes()) | {"version": 99}
    meta.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"version 99.*update hpctrain"):
        load(meta.parent)


def test_a_full_disk_leaves_the_older_checkpoints(
    make_store: Callable[..., CheckpointManager],
    tmp_path: Path,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = make_store(Retention(keep_last=1))
    store.save(snapshot(1))
    store.finish()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "sync", full)
    monkeypatch.setattr(manager, "_PAUSE_SECONDS", 0.0)
    store.save(snapshot(2))
    with pytest.raises(CheckpointError, match="No space left") as raised:
        store.finish()
    assert raised.value.exit_code == ExitCode.CHECKPOINT_IO
    assert "trying again" in told[0]
    loaded = load_newest(tmp_path / "checkpoints", told.append)
    assert loaded is not None
    assert loaded.step == 1


def test_a_lost_lease_stops_the_writer(
    make_store: Callable[..., CheckpointManager], tmp_path: Path
) -> None:
    def lost() -> None:
        raise CheckpointError("another job has taken over")

    store = make_store(confirm=lost)
    store.save(snapshot(1))
    with pytest.raises(CheckpointError, match="taken over"):
        store.finish()
    assert load_newest(tmp_path / "checkpoints", print) is None


def test_a_folder_of_the_same_name_that_is_not_whole_is_replaced(
    make_store: Callable[..., CheckpointManager], tmp_path: Path
) -> None:
    torn = tmp_path / "checkpoints" / "step-00000001"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes(b"torn")
    store = make_store()
    store.save(snapshot(1))
    store.finish()
    assert load(torn).step == 1
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("what", ["nothing", "the new one"])
def test_killed_between_the_renames_of_a_step_saved_anew(
    make_store: Callable[..., CheckpointManager], tmp_path: Path, told: list[str], what: str
) -> None:
    """The old one was out of the way and the new one not yet there: the old one comes back."""
    store = make_store(Retention(keep_last=1))
    for _ in range(2):
        store.save(snapshot(1))
        store.finish()
    path = tmp_path / "checkpoints" / "step-00000001"
    if what == "the new one":
        shutil.copytree(path, path.with_name(f".{path.name}.tmp"))
    path.rename(path.with_name(f".{path.name}.17.replaced"))
    loaded = load_newest(tmp_path / "checkpoints", told.append)
    assert loaded is not None
    assert loaded.step == 1
    make_store()
    assert names(tmp_path) == ["step-00000001"]


def test_nothing_is_deleted_before_the_new_one_was_read_back(
    make_store: Callable[..., CheckpointManager],
    tmp_path: Path,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that says yes to everything and keeps something else."""
    store = make_store(Retention(keep_last=1))
    store.save(snapshot(1))
    store.finish()
    honest = os.fsync

    def lying(descriptor: int) -> None:
        honest(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == "model.safetensors":
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(os, "fsync", lying)
    monkeypatch.setattr(manager, "_PAUSE_SECONDS", 0.0)
    store.save(snapshot(2))
    with pytest.raises(CheckpointError, match=r"read back, .*model.safetensors is damaged"):
        store.finish()
    assert load_newest(tmp_path / "checkpoints", told.append).step == 1  # type: ignore[union-attr]


def test_retention_on_disk(make_store: Callable[..., CheckpointManager], tmp_path: Path) -> None:
    store = make_store(Retention(keep_last=2, metric="accuracy", mode="max"))
    for step, accuracy in [(1, 0.1), (2, 0.9), (3, None), (4, 0.3), (5, 0.2)]:
        store.save(snapshot(step, None if accuracy is None else {"accuracy": accuracy}))
    store.finish()
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]


@pytest.mark.parametrize(
    ("retention", "checkpoints", "surplus"),
    [
        (Retention(keep_last=2), [(1, None), (3, None), (2, None)], [1]),
        (Retention(keep_last=5), [(1, None)], []),
        (Retention(keep_last=1, metric="a", mode="max"), [(1, {"a": 2.0}), (2, {"a": 1.0})], []),
        (Retention(keep_last=1, metric="a", mode="min"), [(1, {"a": 2.0}), (2, {"a": 1.0})], [1]),
        (Retention(keep_last=1, metric="a"), [(1, None), (2, {"b": 1.0}), (3, None)], [1, 2]),
        # Of equal values the first is the best.
        (
            Retention(keep_last=1, metric="a"),
            [(1, {"a": 1.0}), (2, {"a": 1.0}), (3, {"a": 5.0})],
            [2],
        ),
    ],
)
def test_retention(
    retention: Retention,
    checkpoints: list[tuple[int, dict[str, float] | None]],
    surplus: list[int],
) -> None:
    assert retention.surplus(checkpoints) == surplus


WRITER = """
import os
import sys
from pathlib import Path
import torch
from hpctrain.checkpoint.save import Snapshot
from hpctrain.checkpoint.manager import Retention
from hpctrain.checkpoint.manager import CheckpointManager

# A line asks for a writer, whose process is told: a fork, since each would import torch anew.
for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("ended", flush=True)
if pid:
    raise SystemExit
torch.set_num_threads(1)
store = CheckpointManager(
    Path(sys.argv[1]), retention=Retention(keep_last=2), confirm=lambda: None, warn=print
)
for step in range(1, 100000):
    model = {f"layer{index}": torch.full((256, 256), float(step)) for index in range(8)}
    store.save(Snapshot(step=step, model=model, training={}, values={}, config_toml=""))
    store.finish()
"""


def test_killed_at_random_moments_nothing_is_torn(tmp_path: Path, told: list[str]) -> None:
    draw = random.Random(3)
    script = tmp_path / "writer.py"
    script.write_text(WRITER, encoding="utf-8")
    latest = tmp_path / "latest"
    seen = 0
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for _ in range(8):
            before = latest.stat().st_mtime_ns if latest.exists() else 0
            writers.stdin.write("another\n")
            writers.stdin.flush()
            pid = int(writers.stdout.readline())
            wait_for(lambda known=before: latest.exists() and latest.stat().st_mtime_ns != known)
            time.sleep(draw.random() * 0.2)
            os.kill(pid, signal.SIGKILL)
            assert writers.stdout.readline() == "ended\n"
            final = [name for name in names(tmp_path) if not name.startswith(".")]
            for name in final:
                loaded = load(tmp_path / "checkpoints" / name)
                expected = torch.full((256, 256), float(loaded.step))
                assert torch.equal(loaded.model["layer7"], expected)
            seen += len(final)
        writers.stdin.close()
    assert seen
