"""Data that nobody may write to, and files that somebody else has locked."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpctrain.data import Storage, Writer, open_dataset
from hpctrain.data.reading.rows import read_rows

ROWS = 40
STORAGES = [Storage(), Storage(chunk_bytes=2**10), Storage("gzip", 1), Storage("lzf")]


@pytest.fixture(params=STORAGES, ids=["contiguous", "chunked", "gzip", "lzf"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with Writer(tmp_path / "data", storage=request.param, shard_bytes=2000) as writer:
        writer.extend({"x": np.arange(ROWS * 50, dtype=np.int32).reshape(ROWS, 50)})
    return tmp_path / "data"


@pytest.fixture
def read_only(folder: Path) -> Iterator[Path]:
    if os.geteuid() == 0:
        mount = ["mount", "--bind", "-o", "ro", str(folder), str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("root may not mount here")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
    else:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)


def read_all(folder: Path) -> None:
    values = read_rows(open_dataset(str(folder)), np.arange(ROWS))["x"]
    assert (values.ravel() == np.arange(ROWS * 50)).all()


@pytest.mark.parametrize("locking", ["TRUE", "FALSE", None])
def test_where_nothing_can_be_written(
    read_only: Path, locking: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match=r"Read-only|denied"):
        (read_only / "new").touch()
    if locking is None:
        monkeypatch.delenv("HDF5_USE_FILE_LOCKING", raising=False)
    else:
        monkeypatch.setenv("HDF5_USE_FILE_LOCKING", locking)
    read_all(read_only)


def test_locks_of_others_are_not_waited_for(folder: Path) -> None:
    """A writer that died on another node may have left them behind, or the file system has none."""
    shards = sorted(folder.glob("*.h5"))
    descriptors = [os.open(shard, os.O_RDWR) for shard in shards]
    try:
        for descriptor in descriptors:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        read_all(folder)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_without_an_index_too(read_only: Path) -> None:
    dataset = open_dataset(str(read_only / "*.h5"))
    assert dataset.samples == ROWS
