"""Checkpoints of real jobs: on a disk that fills up, by the clock, and as a beginning."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.jobs import here, in_turn, train, train_in_turn
from helpers.runs import metrics, outcome

pytestmark = pytest.mark.ranks(2)

EPOCH_STEPS = 23  # 1,438 digits in batches of 64


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
    assert here(site, "ckpt", "verify", "runs/digits").count("  whole") == len(saved)

    (small_disk / "filling").write_bytes(b"x" * 4096)
    with (small_disk / "filling").open("ab") as file:
        try:
            while True:
                os.write(file.fileno(), b"x" * 4096)
        except OSError:
            pass
    output = here(site, "run.toml", code=74)  # not even one more fits: told before the first step
    assert "Traceback" not in output
    assert steps(run) == saved

    (small_disk / "filling").unlink()
    for step in saved[1:-1]:
        subprocess.run(["rm", "-r", run / "checkpoints" / f"step-{step:08d}"], check=True)
    output = here(site, "run.toml", "training.max_epochs=1", "checkpoint.keep_last=1")
    assert f"resumes from step {saved[-1]}" in output


def test_saves_by_the_clock_and_a_warm_start(site: Path) -> None:
    clock = ["checkpoint.every_minutes=0.0001", "checkpoint.keep_last=99"]
    warm = ["run.name=warm", "checkpoint.initialize_from=weights.safetensors"]
    ended = in_turn(
        site,
        2,
        ["run.toml", "training.max_epochs=2", *clock],
        ["ckpt", "ls", "runs/digits"],
        ["ckpt", "export", "runs/digits", "weights.safetensors"],
        ["run.toml", *warm, "training.max_epochs=1"],
        ["run.toml", *warm, "training.max_epochs=2", "optimizer.lr=1e-3"],
    )
    assert [each.code for each in ended] == [0] * 5, [each.output for each in ended]
    _, listed, _, first, second = (each.output for each in ended)
    run = site / "runs" / "digits"
    between = [step for step in steps(run) if step % EPOCH_STEPS]
    assert between  # at steps that all ranks agreed on
    assert "latest" in listed

    assert "initialized from weights.safetensors: 14 of 14 tensors" in first
    record = metrics(site / "runs" / "warm", "train")[0]
    assert record["step"] == 10
    assert record["loss"] < metrics(run, "train")[0]["loss"] / 2

    assert "optimizer.lr: 0.002 when saved, 0.001 now" in second
    assert "initialized" not in second
    other = [*warm, "training.max_epochs=3", "optimizer.use=sgd"]
    output = here(site, "run.toml", *other, code=78)
    assert 'optimizer.use = "sgd", but the checkpoint to go on from has "adamw"' in output
    misfit = ["run.name=misfit", warm[1], "model.widths=[16]"]
    output = here(site, "run.toml", *misfit, code=78)
    assert "of another shape" in output
    assert output.count("hpctrain: error") == 1


def test_what_remembers_goes_on_to_the_bit(site: Path) -> None:
    """A plateau, a moving average and groups of parameters: as if there had been no second job."""
    common = [
        *("logging.every_steps=1", "scheduler.use=plateau", "scheduler.warmup_steps=0"),
        *("scheduler.patience=0", "scheduler.threshold=0.5", "training.ema_decay=0.9"),
        'optimizer.groups=[{pattern = "features.*", lr_factor = 0.5}]',
    ]
    jobs = (("whole", 4), ("parts", 2), ("parts", 4))
    train_in_turn(
        site,
        2,
        *([f"run.name={name}", f"training.max_epochs={epochs}", *common] for name, epochs in jobs),
    )
    whole = metrics(site / "runs" / "whole")
    assert metrics(site / "runs" / "parts") == whole
    rates = {record["lr"] for record in whole if record["kind"] == "train"}
    assert len(rates) > 1  # it has fallen


def test_other_data_go_on_only_where_that_is_allowed(site: Path) -> None:
    here(site, "run.toml", "training.max_epochs=1")
    other = ["training.max_epochs=2", "data.train=data/digits/validation", "data.drop_last=true"]
    output = here(site, "run.toml", *other, code=65)
    assert "checkpoint.allow_data_change" in output
    here(site, "run.toml", *other, "checkpoint.allow_data_change=true")
    assert outcome(site / "runs" / "digits")["step"] > EPOCH_STEPS


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
    refused = ["run.name=refused", "training.sync_batchnorm=true"]
    trained, ended = in_turn(site, 2, ["run.toml", *ways], ["run.toml", *refused])
    assert trained.code == 0, trained.output
    first, last = metrics(site / "runs" / "digits", "evaluation")
    assert last["loss"] < first["loss"]
    assert ended.code == 78, ended.output
    assert "training.sync_batchnorm = true: torch synchronises" in ended.output
    assert ended.output.count("hpctrain: error") == 1
