"""Copies of the shards on a node's disk: the plan, the folder, the thread, and who reads what."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.waiting import wait_for

from hpctrain.data import Writer, open_dataset
from hpctrain.data.dataset import Dataset
from hpctrain.data.reading.shards import ShardReader
from hpctrain.data.staging.copies import LEFT, Copier, StageFolder, copy_whole, sweep
from hpctrain.data.staging.plan import (
    Copy,
    Disk,
    candidates,
    choose,
    count_fitting,
    key_of,
    look_at,
    plan_copies,
    share_of,
)
from hpctrain.errors import DatasetError

ROWS = 40


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Five shards of eight rows."""
    folder = tmp_path / "shared"
    values = np.arange(ROWS, dtype=np.int64)
    with Writer(folder, shard_rows=8) as writer:
        writer.extend({"x": values})
    opened = open_dataset(str(folder))
    assert len(opened.shards) == 5
    return opened


@pytest.fixture
def copies(dataset: Dataset) -> tuple[Copy, ...]:
    return plan_copies([dataset])


@pytest.fixture
def disk(tmp_path: Path) -> str:
    (tmp_path / "disk").mkdir()
    return str(tmp_path / "disk")


def read(access: ShardReader) -> list[int]:
    out = np.empty((ROWS, 8), np.uint8)
    every = np.arange(ROWS)
    access.read_runs("x", every, np.ones_like(every), out, every)
    return out.view(np.int64)[:, 0].tolist()


def copier(folder: StageFolder, copies: tuple[Copy, ...], **told: list[object]) -> Copier:
    return Copier(
        folder,
        all_copies=copies,
        own_copies=copies,
        done=told.get("done", []).append,
        report=told.get("problems", []).append,
    )


def test_a_virtual_dataset_stays_beside_its_sources(dataset: Dataset, tmp_path: Path) -> None:
    source = Path(dataset.shards[0].path)
    layout = h5py.VirtualLayout((8,), "i8")
    layout[:] = h5py.VirtualSource(os.path.relpath(source, tmp_path), "x", (8,))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    assert plan_copies([open_dataset(str(tmp_path / "virtual.h5"))]) == ()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("nodes", [1, 2, 7])
def test_the_ranks_of_every_node_copy_each_shard_once(
    copies: tuple[Copy, ...], ranks: int, nodes: int
) -> None:
    firsts = set()
    for node in range(nodes):
        shares = [
            share_of(copies, local_rank=r, local_world_size=ranks, node_rank=node, nodes=nodes)
            for r in range(ranks)
        ]
        assert sorted(copy.name for share in shares for copy in share) == sorted(
            copy.name for copy in copies
        )
        firsts.add(shares[0][0].name)
    assert len(firsts) == min(nodes, len(copies))


def test_a_disk_takes_as_many_as_it_has_room_for(copies: tuple[Copy, ...]) -> None:
    size = copies[0].size
    for free, count in ((5 * size, 5), (5 * size - 1, 4), (size - 1, 0)):
        assert count_fitting(copies, free, disk_bytes=0) == count
    # A part of the whole disk is left to others.
    assert count_fitting(copies, 5 * size, disk_bytes=20 * size) == 4


def test_folders_are_shared_by_checksums_and_by_nothing_less(copies: tuple[Copy, ...]) -> None:
    assert key_of(copies, "a") == key_of(copies[::-1], "b")
    unsure = (dataclasses.replace(copies[0], checksum=None), *copies[1:])
    assert key_of(unsure, "a") != key_of(unsure, "b")


def test_where_is_tried_and_what_is_taken(disk_path: Path, tmp_path: Path) -> None:
    disk = str(disk_path)
    environ = {"TMPDIR": "/t", "SLURM_TMPDIR": "/s", "USER": "me"}
    tried = candidates(None, environ)
    assert tried[:2] == [("/s", "$SLURM_TMPDIR"), ("/t", "$TMPDIR")]
    assert ("/mnt/bb/me", "") in tried
    assert candidates(disk, environ) == [(disk, "data.stage_directory")]
    looked = look_at(disk, "")
    assert isinstance(looked, Disk)
    assert "no such directory" in str(look_at(str(tmp_path / "none"), ""))
    assert "in memory" in str(look_at("/dev/shm", ""))
    assert isinstance(look_at("/dev/shm", "data.stage_directory"), Disk)
    small, large = Disk("small", "", 10, 100), Disk("large", "", 50, 100)
    assert choose(["no", small, large], 10) == small
    assert choose(["no", small, large], 20) == large
    assert choose(["no", small, large], 99) == large
    assert choose(["no", "nor this"], 1) == "no; nor this"


def test_rows_are_read_from_each_copy_as_it_becomes_whole(
    dataset: Dataset, copies: tuple[Copy, ...], disk: str
) -> None:
    folder = StageFolder(disk, "key")
    folder.join()
    done: list[object] = []
    staged = copier(folder, copies, done=done)
    wait_for(lambda: done)
    # The files here are not the shared ones: who reads them is told by what is in them.
    there = [staged.locate(shard.path) for shard in dataset.shards]
    assert there == [str(folder.path / copy.name) for copy in copies]
    Path(dataset.shards[0].path).unlink()
    access = ShardReader(dataset, staged.locate)
    assert read(access) == list(range(ROWS))
    assert access.files_opened == 5
    staged.close()
    assert not list(Path(disk).iterdir())
    assert staged.locate(dataset.shards[1].path) == dataset.shards[1].path
    access.close()
    with pytest.raises(DatasetError, match="No such file"):
        read(access)


def test_a_reader_changes_over_in_the_midst(dataset: Dataset, copies: tuple[Copy, ...]) -> None:
    places: dict[str, str] = {}
    access = ShardReader(dataset, lambda path: places.get(path, path))
    assert read(access) == list(range(ROWS))
    other = Path(dataset.shards[2].path).with_suffix(".copy")
    other.write_bytes(Path(dataset.shards[2].path).read_bytes())
    places[dataset.shards[2].path] = str(other)
    assert read(access) == list(range(ROWS))
    assert access.files_opened == 6
    # Removed under a reader that has yet to open it: the shared file is there still.
    places[dataset.shards[1].path] = "/nowhere"
    assert read(access) == list(range(ROWS))
    access.close()


def test_a_shard_that_is_not_what_its_index_says_stays_where_it_is(
    dataset: Dataset, copies: tuple[Copy, ...], disk: str
) -> None:
    path = Path(dataset.shards[1].path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    folder = StageFolder(disk, "key")
    folder.join()
    problems: list[object] = []
    staged = copier(folder, copies, problems=problems)
    wait_for(lambda: problems and staged.locate(copies[-1].source) != copies[-1].source)
    assert staged.locate(str(path)) == str(path)
    assert "data verify" in str(problems[0])
    assert not list(folder.path.glob(".*"))
    staged.close()


def test_a_stop_ends_a_copy_and_leaves_nothing(copies: tuple[Copy, ...], disk: str) -> None:
    folder = StageFolder(disk, "key")
    folder.join()
    assert not copy_whole(copies[0], folder, lambda: True)
    assert not list(folder.path.iterdir())
    folder.leave()


HOLD = """
import sys, time
from hpctrain.data.staging.copies import StageFolder
folder = StageFolder(sys.argv[1], sys.argv[2])
folder.join()
print("joined", flush=True)
time.sleep(3600)
"""


def test_what_a_killed_job_has_left_is_used_if_whole_and_removed_if_not(
    copies: tuple[Copy, ...], disk: str
) -> None:
    held = []
    for key in ("key", "other"):
        command = [sys.executable, "-c", HOLD, disk, key]
        held.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert held[-1].stdout is not None
        assert held[-1].stdout.readline() == "joined\n"
    folder = StageFolder(disk, "key")
    folder.join()
    for copy in copies[:2]:
        assert copy_whole(copy, folder, lambda: False)
    folder.leave()
    damaged = folder.path / copies[1].name
    damaged.write_bytes(bytes(copies[1].size))
    (folder.path / f".{copies[2].name}.host-1-1-abcd.tmp").touch()
    # Of live jobs nothing is touched.
    sweep(disk)
    folder.join()
    assert folder.names() == {copy.name for copy in copies[:2]}
    folder.leave()
    assert folder.path.is_dir()
    for process in held:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    sweep(disk, keep="key")
    root = Path(disk, f"hpctrain-{os.getuid()}")
    assert {path.name for path in root.iterdir()} == {"key", "key.lock"}
    inode = (folder.path / copies[0].name).stat().st_ino
    folder.join()
    assert folder.names() == set()
    assert {path.name for path in folder.path.iterdir()} == {
        f"{LEFT}{copy.name}" for copy in copies[:2]
    }
    done: list[object] = []
    staged = copier(folder, copies, done=done)
    wait_for(lambda: done)
    assert (folder.path / copies[0].name).stat().st_ino == inode
    assert damaged.read_bytes() == Path(copies[1].source).read_bytes()
    staged.close()
    assert not list(Path(disk).iterdir())


def test_a_directory_of_somebody_else_is_refused(disk: str, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    Path(disk, f"hpctrain-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match="not this user's own"):
        StageFolder(disk, "key").join()
