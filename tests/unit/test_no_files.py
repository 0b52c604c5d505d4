"""Where a file is meant, a pipe, a device, a socket or a folder is refused, and not waited for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.numpy
import torch

from hpctrain.batch.environments import in_snapshot
from hpctrain.batch.exit_status import read_status
from hpctrain.checkpoint import inspect
from hpctrain.checkpoint.lease import Lease
from hpctrain.cli import main
from hpctrain.config import load
from hpctrain.config.importing import MARKER, use_snapshot
from hpctrain.convert.sources.opening import Reading, open_source
from hpctrain.convert.survey import survey
from hpctrain.data import Writer, open_dataset
from hpctrain.data.reading.rows import read_rows
from hpctrain.errors import HpctrainError
from hpctrain.observe.log import LOG_FILE
from hpctrain.observe.log import start as start_log
from hpctrain.observe.records import cut_back, newest_records
from hpctrain.preflight.data import try_lock
from hpctrain.training.checkpointing.initialize import read_weights
from hpctrain.utils.files import AppendedFile

LIMIT_SECONDS = 120
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """End what waits for somebody to write to a pipe, in C as well."""

    def end(*_: object) -> None:
        raise TimeoutError(f"still waiting after {LIMIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LIMIT_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        server.bind(path.name)
        os.chdir(here)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name(f"{path.name}-pipe"))
    path.symlink_to(f"{path.name}-pipe")


KINDS = (make_pipe, make_socket, make_device, make_link_to_pipe, Path.mkdir)


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__)
def spoil(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    """Put something else in the place of a file."""

    def spoil(path: Path) -> None:
        path.unlink(missing_ok=True)
        request.param(path)

    return spoil


Spoil = Callable[[Path], None]


def refuses(read: Callable[[], Any], *, or_skips: bool = False) -> None:
    """Check that something is told in a line, or that nothing comes of what is no file."""
    try:
        read()
    except TimeoutError:
        raise
    except (HpctrainError, OSError) as error:
        told = str(error)
    else:
        told = "skipped" if or_skips else ""
    assert told


def test_configs(spoil: Spoil, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    spoil(path)
    refuses(lambda: load(str(path), []))
    assert main([str(path)]) == 78


def test_data(spoil: Spoil, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with Writer(folder) as out:
        out.extend({"x": np.arange(4)})
    dataset = open_dataset(str(folder))
    shard = Path(dataset.shards[0].path)
    content = shard.read_bytes()
    spoil(shard)
    refuses(lambda: read_rows(dataset, np.arange(4), retries=0))
    refuses(lambda: open_dataset(str(folder)))
    refuses(lambda: open_dataset(str(folder), axis=1))
    refuses(lambda: open_dataset(f"{folder}/*.h5"))
    refuses(lambda: open_source([str(shard)], Reading()))
    if not shard.is_dir():
        refuses(lambda: try_lock(str(shard)))
    shutil.rmtree(shard) if shard.is_dir() else shard.unlink()
    shard.write_bytes(content)
    spoil(folder / "index.json")
    refuses(lambda: open_dataset(str(folder)))
    spoil(tmp_path / "all.json")
    refuses(lambda: open_dataset(str(tmp_path / "all.json")))


def test_sources_of_virtual_data(spoil: Spoil, tmp_path: Path) -> None:
    layout = h5py.VirtualLayout((4,), "i8")
    layout[:] = h5py.VirtualSource("source.h5", "x", (4,))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
        file.create_dataset("y", (4,), "i4", external=[("raw.bin", 0, 16)])
    spoil(tmp_path / "source.h5")
    refuses(lambda: open_dataset(str(tmp_path / "a.h5"), ["x"]))
    spoil(tmp_path / "raw.bin")
    refuses(lambda: open_dataset(str(tmp_path / "a.h5"), ["y"]))


def test_links_of_hdf5(spoil: Spoil, tmp_path: Path) -> None:
    """HDF5 opens what they lead to, and holds its lock while it waits."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["plain"] = np.arange(4)
        file["out"] = h5py.ExternalLink("b.h5", "/x")
        file["soft"] = h5py.SoftLink("/group/on/x")
        file["group/on"] = h5py.ExternalLink("c.h5", "/")
        file["loop"] = h5py.SoftLink("/loop")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["x"] = h5py.ExternalLink("b.h5", "/x")
    spoil(tmp_path / "b.h5")
    for name in ("out", "soft", "group/on/x", "loop", "/soft"):
        refuses(lambda name=name: open_dataset(str(tmp_path / "a.h5"), [name]))
    assert open_dataset(str(tmp_path / "a.h5"), ["plain"]).samples == 4
    assert len(survey(str(tmp_path / "a.h5")).items) == 5
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["plain"]
    refuses(lambda: open_dataset(str(tmp_path / "a.h5")))


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a-idx3-ubyte", "a-idx1-ubyte.gz", "a.txt"])
def test_what_is_packed(spoil: Spoil, tmp_path: Path, name: str) -> None:
    spoil(tmp_path / name)
    refuses(lambda: open_source([f"x={tmp_path / name}"], Reading(tokens=4)))


@pytest.mark.parametrize("name", ["exit.json", "latest"])
def test_run_folders(spoil: Spoil, tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    spoil(tmp_path / name)
    refuses(lambda: read_status(tmp_path, {}))
    refuses(lambda: inspect.verified(tmp_path))


def test_leases(spoil: Spoil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpctrain.checkpoint.lease.time.sleep", lambda _: None)
    spoil(tmp_path / "lease.json")

    def take() -> None:
        with Lease(tmp_path, {}):
            pass

    refuses(take, or_skips=True)


def test_logs_and_metrics(spoil: Spoil, tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    spoil(path)
    refuses(lambda: newest_records(path), or_skips=True)
    refuses(lambda: cut_back(path, 3))
    refuses(lambda: AppendedFile(path))
    refuses(lambda: start_log(tmp_path, is_reporter=True).__enter__())


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_weights(spoil: Spoil, tmp_path: Path, name: str) -> None:
    spoil(tmp_path / name)
    refuses(lambda: read_weights(tmp_path / name))


def test_snapshots(spoil: Spoil, tmp_path: Path) -> None:
    spoil(tmp_path / MARKER)
    refuses(lambda: use_snapshot(tmp_path))
    with pytest.raises((OSError, ValueError)):
        in_snapshot(tmp_path / "run.toml", tmp_path)


def test_a_script_is_not_written_to_what_is_no_file(
    spoil: Spoil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("train", "validation"):
        (tmp_path / "data" / "digits" / part).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path / "job.sh")
    asked = ["--scheduler", "slurm", "--nodes", "2", "--time", "1:00:00", "--output", "job.sh"]
    assert main(["job", str(ROOT / "configs" / "run.toml"), *asked]) == 64


PLANTED: dict[str, bytes] = {
    "a length beyond the file": (2**62).to_bytes(8, "little") + b"{}",
    "a length of all": (2**64 - 1).to_bytes(8, "little") + b"{}",
    "deep": (200_000).to_bytes(8, "little") + b"[" * 200_000,
}


def tensor(dtype: str, shape: list[int], offsets: list[int], **texts: str) -> bytes:
    about = {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    header = json.dumps({**about, "__metadata__": texts} if texts else about).encode()
    return len(header).to_bytes(8, "little") + header + bytes(16)


PLANTED |= {
    "past the end": tensor("F32", [400], [0, 1600]),
    "backwards": tensor("F32", [4], [16, 0]),
    "more than it holds": tensor("F32", [2**31, 2**31], [0, 16]),
    "an overflow": tensor("F64", [2**62, 4], [0, 16]),
    "negative": tensor("F32", [-4], [0, 16]),
    "no such dtype": tensor("F33", [4], [0, 16]),
    "pairs that are none": tensor("F32", [4], [0, 16], complex='["x"]'),
    "pairs of what is not there": tensor("F64", [2], [0, 16], complex="7"),
    "deep pairs": tensor("F64", [2], [0, 16], complex="[" * 100_000),
}


@pytest.mark.parametrize("name", PLANTED)
def test_headers_of_safetensors_bound_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(PLANTED[name])
    refuses(lambda: read_weights(path))
    refuses(lambda: inspect.compared(path, path))


def test_weights_that_torch_cannot_make_sense_of(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"x": torch.arange(4.0)}, path)
    assert read_weights(path)["x"].tolist() == [0, 1, 2, 3]
    good, rng = path.read_bytes(), np.random.default_rng(1)
    for _ in range(200):
        content = np.frombuffer(good, np.uint8).copy()
        content[rng.integers(0, len(content), 6)] = rng.integers(0, 256, 6)
        path.write_bytes(content.tobytes()[: rng.integers(1, len(good) + 1)])
        refuses(lambda: read_weights(path), or_skips=True)
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({"x": np.arange(4.0)}, path)
    assert read_weights(path)["x"].tolist() == [0, 1, 2, 3]
