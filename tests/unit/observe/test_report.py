"""Header and summary, letter by letter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hpctrain.observe.report import Best, HeaderFacts, SummaryFacts, header, summary

HEADER = HeaderFacts(
    run="digits",
    folder="runs/digits",
    world_size=2,
    num_nodes=1,
    launcher="mpirun",
    mpi="MPICH 5.0.2",
    backend="gloo",
    devices="cpu, 1 thread per rank",
    train_samples=1437,
    train_shards=4,
    validation_samples=360,
    global_batch_size=64,
    micro_batch_size=32,
    grad_accum_steps=1,
    model="convnet",
    parameters=23_946,
    trainable=23_946,
    parameter_bytes=95_784,
    precision="32-true",
    total_steps=276,
    total_epochs=12,
    resume=None,
)

SUMMARY = SummaryFacts(
    run="digits",
    ended="complete",
    step=276,
    total_steps=276,
    elapsed_seconds=31.2,
    skipped_steps=0,
    last={"loss": 0.03123, "accuracy": 0.98888},
    best=Best(metric="accuracy", value=0.99166, step=253),
    samples_per_second=4560.2,
    seconds={
        "data": 0.21,
        "compute": 20.2,
        "communication": 6.1,
        "checkpoint": 0.02,
        "evaluation": 3.0,
    },
    node_hours=0.0123,
    energy="not measured",
    checkpoint="runs/digits/checkpoints/step-00000276",
    metrics="runs/digits/metrics.jsonl",
    next_command=(
        "train on",
        "mpirun -np 2 python -m hpctrain configs/run.toml training.max_epochs=24",
    ),
)


def test_header() -> None:
    assert header(HEADER) == (
        "run digits\n"
        "  folder      runs/digits\n"
        "  world       2 ranks on 1 node, mpirun, MPICH 5.0.2, gloo\n"
        "  devices     cpu, 1 thread per rank\n"
        "  data        1,437 samples in 4 shards, 360 for validation\n"
        "  batch       64 global; per rank 1 pass of at most 32 samples\n"
        "  model       convnet, 23,946 parameters, all trainable, 95.8 kB\n"
        "  precision   32-true\n"
        "  length      276 steps, 12 epochs\n"
        "  start       from scratch"
    )


def test_header_of_one_process_that_resumes() -> None:
    facts = dataclasses.replace(
        HEADER,
        world_size=1,
        launcher=None,
        mpi=None,
        backend=None,
        devices="cuda, NVIDIA H100",
        train_samples=1,
        train_shards=1,
        validation_samples=None,
        micro_batch_size=1,
        grad_accum_steps=64,
        parameters=1_300_000_000,
        trainable=1_048_576,
        parameter_bytes=5_200_000_000,
        total_steps=1_000_000,
        total_epochs=None,
        resume="step 120, epoch 5: runs/digits/checkpoints/step-00000120",
        notes=("the last 29 samples of an epoch are dropped",),
    )
    assert header(facts) == (
        "run digits\n"
        "  folder      runs/digits\n"
        "  world       1 rank on 1 node, no launcher, no MPI\n"
        "  devices     cuda, NVIDIA H100\n"
        "  data        1 sample in 1 shard, no validation\n"
        "  batch       64 global; per rank 64 passes of at most 1 sample\n"
        "  model       convnet, 1,300,000,000 parameters, 1,048,576 trainable, 5.20 GB\n"
        "  precision   32-true\n"
        "  length      1,000,000 steps\n"
        "  start       resumes from step 120, epoch 5: runs/digits/checkpoints/step-00000120\n"
        "  note        the last 29 samples of an epoch are dropped"
    )


def test_summary() -> None:
    assert summary(SUMMARY) == (
        "run digits complete: step 276 of 276, 0:00:31 in this job\n"
        "  last        loss 0.03123, accuracy 0.9889\n"
        "  best        accuracy 0.9917 at step 253\n"
        "  speed       4,560 samples/s\n"
        "  time        data 0.21 s (1 %), compute 20.2 s (68 %), communication 6.10 s (21 %),\n"
        "              checkpoint 0.02 s (<1 %), evaluation 3.00 s (10 %)\n"
        "  used        0.01 node-hours, energy not measured\n"
        "  checkpoint  runs/digits/checkpoints/step-00000276\n"
        "  metrics     runs/digits/metrics.jsonl\n"
        "  train on    mpirun -np 2 python -m hpctrain configs/run.toml training.max_epochs=24"
    )


def test_summary_of_a_job_that_did_nothing_yet() -> None:
    facts = dataclasses.replace(
        SUMMARY,
        ended="stopped: SIGTERM",
        step=0,
        elapsed_seconds=0.0,
        last={},
        best=None,
        samples_per_second=None,
        seconds={"compute": 0.0, "data": 0.0},
        checkpoint=None,
        next_command=("resume", "sbatch job.sh"),
    )
    assert summary(facts) == (
        "run digits stopped: SIGTERM: step 0 of 276, 0:00:00 in this job\n"
        "  time        compute 0.00 s (0 %), data 0.00 s (0 %)\n"
        "  used        0.01 node-hours, energy not measured\n"
        "  checkpoint  none yet\n"
        "  metrics     runs/digits/metrics.jsonl\n"
        "  resume      sbatch job.sh"
    )


@pytest.mark.parametrize("num_metrics", [1, 7, 40])
def test_lists_are_wrapped_and_commands_stay_whole(num_metrics: int) -> None:
    command = "python -m hpctrain " + " ".join(f"model.key{i}=value" for i in range(20))
    last = {f"metric_{i}": float(i) for i in range(num_metrics)}
    changes: dict[str, Any] = {"last": last, "next_command": ("resume", command)}
    *lines, final = summary(dataclasses.replace(SUMMARY, **changes)).splitlines()
    assert final == f"  resume      {command}"
    assert max(map(len, lines)) <= 100
    parts = " ".join(
        line.strip() for line in lines[1 : lines.index("  best        accuracy 0.9917 at step 253")]
    )
    assert parts == "last        " + ", ".join(f"metric_{i} {i}" for i in range(num_metrics))


def test_steps_that_were_not_applied_are_in_the_summary() -> None:
    lines = summary(dataclasses.replace(SUMMARY, skipped_steps=3)).splitlines()
    assert lines[1] == "  not applied 3 steps of the run: their gradients were not finite"
