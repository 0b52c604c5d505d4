"""Leave the runs of this release for later ones to go on from: `python tests/data/make_release.py`.

Written to `tests/data/<version>/`, once a release, by the code of that release and never again:

    data/          indexed shards and their stats.json, numbered files, a catalogue, packed values
    <case>.toml    a config as somebody writes it, without a key that has a default
    <case>/        what a job of it left that ended in the middle of an epoch
    <case>.jsonl   the metrics of the same run in one job

Every run is one of two ranks. `tests/launch/test_releases.py` goes on from them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tomli_w

from hpctrain.data import Writer
from hpctrain.version import __version__

HERE = Path(__file__).parent
STOPPED, LAST = 7, 14
"""Steps, in the second of three epochs and in the third."""

CLOCKED = ("seconds", "samples_per_second", "wall_time")

_SHARDS = {"train": "data/shards", "validation": "data/shards"}
_TABLE = {"use": "regression", "inputs": ["x"], "target": "y"}
_IN_SHARDS = {"features": 6, "outputs": 3}

CASES: dict[str, dict[str, Any]] = {
    "ddp": {
        "model": {"use": "release_parts:Noisy"},
        "task": {"use": "classification", "inputs": ["x"], "target": "label"},
        "data": {**_SHARDS, "normalize": {"x": "channel_stats"}},
        "scheduler": {"use": "inverse_square_root", "timescale": 4, "warmup_steps": 3},
        "training": {"ema_decay": 0.9, "clip_norm": 1.0},
    },
    "fsdp": {
        "model": {"use": "release_parts:Flat", **_IN_SHARDS},
        "task": _TABLE,
        "data": {**_SHARDS, "normalize": {"x": "stats"}},
        "training": {"strategy": "fsdp", "ema_decay": 0.9, "clip_norm": 1.0},
    },
    # Files whose order by name is not that of their numbers; samples reach from one into the next.
    "files": {
        "model": {"use": "release_parts:Flat", "features": 12, "outputs": 3},
        "task": {"use": "regression", "inputs": ["window"], "target": "y"},
        "data": {
            "train": "data/steps/step_*.h5",
            "fields": {"window": {"path": "x", "steps": 2}},
            "samples": {"across_files": True},
        },
        "optimizer": {"use": "sgd", "lr": 1e-2, "momentum": 0.9},
    },
    # The same by a catalogue.
    "catalogue": {
        "model": {"use": "release_parts:Flat", "features": 6, "outputs": 3},
        "task": _TABLE,
        "data": {"train": "data/steps.json"},
        "training": {"precision": "64-true"},
    },
    # Numbers as netCDF-4 packs them, taken as they are stored, and statistics of those.
    "packed": {
        "model": {"use": "release_parts:Flat", "features": 32, "outputs": 4},
        "task": {"use": "regression", "inputs": ["state"], "target": "next"},
        "data": {
            "train": "data/packed/*.nc",
            "fields": {
                "state": {"path": "t2m", "steps": 2},
                "next": {"path": "mean", "lead": 3},
            },
            "samples": {"validation_fraction": 0.2},
            "normalize": {"state": "stats", "next": "channel_stats"},
        },
    },
    # Tensors that 0.1.0 made float32, whatever they were.
    "float64": {"model": {"use": "release_parts:Scheduled", **_IN_SHARDS}, "task": _TABLE},
    "complex": {"model": {"use": "release_parts:Rotated", **_IN_SHARDS}, "task": _TABLE},
    # An optimizer of whose groups 0.1.0 saved nothing.
    "groups": {
        "model": {"use": "release_parts:Flat", **_IN_SHARDS},
        "task": _TABLE,
        "optimizer": {"use": "release_parts:Adapting", "lr": 1.0},
    },
}


def config_of(name: str) -> dict[str, Any]:
    """Return the config of a case, with what all have in common."""
    common: dict[str, dict[str, Any]] = {
        "run": {"name": name, "directory": "."},
        "data": {**_SHARDS, "global_batch_size": 10, "lanes": 8},
        "optimizer": {"use": "adamw", "lr": 1e-2},
        "training": {"max_steps": LAST},
        "checkpoint": {"every_epochs": 0},
        "logging": {"every_steps": 1, "progress": "none"},
    }
    own = CASES[name]
    config = {section: {**keys, **own.get(section, {})} for section, keys in common.items()}
    if "train" in own.get("data", {}) and "validation" not in own["data"]:
        del config["data"]["validation"]
    if "optimizer" in own:
        config["optimizer"] = own["optimizer"]
    return {**{key: own[key] for key in own if key not in config}, **config}


def write_data(folder: Path) -> None:
    """Write the datasets of all cases."""
    draw = np.random.default_rng(0)

    def fields(rows: int) -> dict[str, np.ndarray]:
        x = draw.normal(2.0, 3.0, size=(rows, 6)).astype(np.float32)
        y = np.tanh(x @ draw.normal(size=(6, 3))).astype(np.float32)
        return {"x": x, "y": y, "label": (x.sum(1) > 12).astype(np.int64)}

    with Writer(folder / "shards", shard_rows=20) as writer:
        writer.extend(fields(56))
    (folder / "steps").mkdir()
    for number in range(1, 12):
        with h5py.File(folder / "steps" / f"step_{number}.h5", "w") as file:
            found = fields(5)
            file["x"], file["y"] = found["x"], found["y"]
    (folder / "packed").mkdir()
    for number, year in enumerate((2000, 2001, 2002)):
        with h5py.File(folder / "packed" / f"{year}.nc", "w") as file:
            walk = 280 + draw.normal(size=(24, 4, 4)).cumsum(0).astype(np.float32)
            scale, offset = 0.01 * (1 + number), 280.0 + number  # each file's own
            stored = np.round((walk - offset) / scale).astype(np.int16)
            stored[3, 0] = -32767
            file["t2m"] = stored
            file["mean"] = walk.mean(2)
            for key, value in {"scale_factor": scale, "add_offset": offset}.items():
                file["t2m"].attrs[key] = value
            file["t2m"].attrs["_FillValue"] = np.array([-32767], np.int16)


def hpctrain(folder: Path, *arguments: str, ranks: int = 2) -> None:
    """Run a command to its end."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    start = ["mpirun", "-np", str(ranks)] if ranks > 1 else []
    command = [*start, sys.executable, "-m", "hpctrain", *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def without_clock(records: str) -> str:
    """Return metrics without what depends on the machine."""
    kept: list[Mapping[str, Any]] = [
        {key: value for key, value in json.loads(line).items() if key not in CLOCKED}
        for line in records.splitlines()
    ]
    return "".join(json.dumps(record) + "\n" for record in kept)


def main() -> None:
    """Make the folder of this version."""
    folder = HERE / __version__
    folder.mkdir()
    write_data(folder / "data")
    hpctrain(folder, "data", "index", "data/steps/step_*.h5", "--out", "data/steps.json", ranks=1)
    hpctrain(folder, "data", "stats", "data/shards", ranks=1)
    hpctrain(folder, "data", "stats", "data/packed", ranks=1)
    for name in CASES:
        (folder / f"{name}.toml").write_text(tomli_w.dumps(config_of(name)), encoding="utf-8")
        hpctrain(folder, f"{name}.toml")
        metrics = (folder / name / "metrics.jsonl").read_text(encoding="utf-8")
        (folder / f"{name}.jsonl").write_text(without_clock(metrics), encoding="utf-8")
        shutil.rmtree(folder / name)
        hpctrain(folder, f"{name}.toml", f"training.max_steps={STOPPED}")
        shutil.rmtree(folder / name / "tensorboard", ignore_errors=True)  # names the host


if __name__ == "__main__":
    main()
