"""Checkpoints of real jobs: on a disk that fills up, by the clock, and as a beginning."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_main_job import EPOCH_STEPS, digits, hpctrain, metrics, site, train

pytestmark = pytest.mark.ranks(2)

__all__ = ["digits", "site"]


@pytest.fixture
def small_disk(site: Path) -> Iterator[Path]:
    """A file system of 4 MB for the runs of a site."""
    folder = site / "runs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def test_a_full_disk_ends_the_job_with_every_older_checkpoint_whole(
    site: Path, small_disk: Path
) -> None:
    run = small_disk / "digits"
    keep_all = ["checkpoint.every_steps=2", "checkpoint.keep_last=100"]
    output = train(site, 2, *keep_all, code=74)
    assert "MB are free" in output  # told before the run
    assert "trying again" in output
    assert "What was saved before is untouched" in output
    assert "Traceback" not in output
    assert output.count("hpctrain: error") == 1
    saved = steps(run)
    assert saved
    assert not list((run / "checkpoints").glob(".*"))  # nothing half takes the space
    assert hpctrain(site, 0, "ckpt", "verify", "runs/digits").stdout.count("  whole") == len(saved)

    (small_disk / "filling").write_bytes(b"x" * 4096)
    with (small_disk / "filling").open("ab") as file:
        try:
            while True:
                os.write(file.fileno(), b"x" * 4096)
        except OSError:
            pass
    output = train(site, 2, code=74)  # not even one more fits: told before the first step
    assert "Traceback" not in output
    assert steps(run) == saved

    (small_disk / "filling").unlink()
    for step in saved[1:-1]:
        subprocess.run(["rm", "-r", run / "checkpoints" / f"step-{step:08d}"], check=True)
    output = train(site, 2, "training.max_epochs=1", "checkpoint.keep_last=1")
    assert f"resumes from step {saved[-1]}" in output


def test_saves_by_the_clock_and_a_warm_start(site: Path) -> None:
    train(
        site,
        2,
        "training.max_epochs=2",
        "checkpoint.every_minutes=0.0001",
        "checkpoint.keep_last=99",
    )
    run = site / "runs" / "digits"
    between = [step for step in steps(run) if step % EPOCH_STEPS]
    assert between  # at steps that all ranks agreed on
    assert "latest" in hpctrain(site, 0, "ckpt", "ls", "runs/digits").stdout
    hpctrain(site, 0, "ckpt", "export", "runs/digits", "weights.safetensors")

    warm = ["run.name=warm", "checkpoint.initialize_from=weights.safetensors"]
    output = train(site, 2, *warm, "training.max_epochs=1")
    assert "initialized from weights.safetensors: 14 of 14 tensors" in output
    first = metrics(site / "runs" / "warm", "train")[0]
    assert first["step"] == 10
    assert first["loss"] < metrics(run, "train")[0]["loss"] / 2

    output = train(site, 2, *warm, "training.max_epochs=2", "optimizer.lr=1e-3")
    assert "optimizer.lr: 0.002 when saved, 0.001 now" in output
    assert "initialized" not in output
    output = train(site, 0, *warm, "training.max_epochs=3", "optimizer.use=sgd", code=78)
    assert 'optimizer.use = "sgd", but the checkpoint to go on from has "adamw"' in output
    output = train(site, 0, "run.name=misfit", warm[1], "model.widths=[16]", code=78)
    assert "of another shape" in output
    assert output.count("hpctrain: error") == 1


def test_what_remembers_goes_on_to_the_bit(site: Path) -> None:
    """A plateau, a moving average and groups of parameters: as if there had been no second job."""
    common = [
        *("logging.every_steps=1", "scheduler.use=plateau", "scheduler.warmup_steps=0"),
        *("scheduler.patience=0", "scheduler.threshold=0.5", "training.ema_decay=0.9"),
        'optimizer.groups=[{pattern = "features.*", lr_factor = 0.5}]',
    ]
    train(site, 2, "run.name=whole", "training.max_epochs=4", *common)
    train(site, 2, "run.name=parts", "training.max_epochs=2", *common)
    train(site, 2, "run.name=parts", "training.max_epochs=4", *common)
    whole = metrics(site / "runs" / "whole")
    assert metrics(site / "runs" / "parts") == whole
    rates = {record["lr"] for record in whole if record["kind"] == "train"}
    assert len(rates) > 1  # it has fallen


def test_other_data_go_on_only_where_that_is_allowed(site: Path) -> None:
    train(site, 0, "training.max_epochs=1")
    other = ["training.max_epochs=2", "data.train=data/digits/validation", "data.drop_last=true"]
    output = train(site, 0, *other, code=65)
    assert "checkpoint.allow_data_change" in output
    train(site, 0, *other, "checkpoint.allow_data_change=true")
    outcome = json.loads((site / "runs/digits/exit.json").read_text(encoding="utf-8"))
    assert outcome["step"] > EPOCH_STEPS


def test_how_a_model_computes_is_the_configs(site: Path) -> None:
    """The other ways to compute, together; and what only the world shows not to work."""
    ways = [
        'training.activation_checkpointing=["features.*"]',
        "training.channels_last=true",
        "training.compress_gradients=fp16",
        "training.bucket_mb=0.01",
        "optimizer.decay_norms_and_biases=false",
        "training.max_epochs=2",
    ]
    train(site, 2, *ways)
    first, last = metrics(site / "runs" / "digits", "evaluation")
    assert last["loss"] < first["loss"]
    output = train(site, 2, "run.name=refused", "training.sync_batchnorm=true", code=78)
    assert "training.sync_batchnorm = true: torch synchronises" in output
    assert output.count("hpctrain: error") == 1
