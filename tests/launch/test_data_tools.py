"""Datasets made by several ranks, also by ranks that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers.jobs import in_turn
from helpers.limits import JOB_SECONDS
from helpers.waiting import wait_for

pytestmark = pytest.mark.ranks(3)


def command(ranks: int, *arguments: str) -> list[str]:
    launcher = ["mpirun", "-np", str(ranks)] if ranks else []
    return [*launcher, sys.executable, *arguments]


def run(folder: Path, ranks: int, *arguments: str, code: int = 0) -> str:
    result = subprocess.run(
        command(ranks, *arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def shards_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("shard-*.h5")}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_one_dataset_of_many_writers_and_one_memory_of_a_node(tmp_path: Path) -> None:
    lines = [[f"{body}.py", str(tmp_path / body)] for body in ("writer", "memory")]
    for ended in in_turn(tmp_path, 3, *lines):
        assert ended.stdout == "passed 3\n", ended.output


def test_packing_survives_a_killed_rank(tmp_path: Path) -> None:
    """Three ranks, one of them killed; two go on; the bytes are those of one process alone."""
    np.save(tmp_path / "x.npy", np.arange(200_000).reshape(2000, 100))
    np.save(tmp_path / "label.npy", np.arange(2000) % 10)
    pack = ("-m", "hpctrain", "data", "pack", "x.npy", "label.npy", "--shard-rows", "4")
    pack = (*pack, "--split", "train=0.8,validation=0.2", "--seed", "7", "--filter", "gzip")
    alone = run(tmp_path, 0, *pack, "alone")
    packed = "alone: packed train 1,600 samples in 400 shards, validation 400 samples in 100 shards"
    assert packed in alone.splitlines()  # a slow machine is also told how far it is

    with subprocess.Popen(
        command(3, *pack, "out"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as job:
        wait_for(lambda: len(shards_of(tmp_path / "out")) >= 20 or job.poll() is not None)
        assert job.poll() is None
        ranks = [
            process
            for process in psutil.Process(job.pid).children(recursive=True)
            if "hpctrain" in process.cmdline() and "mpirun" not in process.name()
        ]
        os.kill(ranks[1].pid, signal.SIGKILL)
        job.communicate(timeout=JOB_SECONDS)
        psutil.wait_procs(ranks, timeout=JOB_SECONDS)
    assert job.returncode != 0
    kept = shards_of(tmp_path / "out")
    assert 20 <= len(kept) < 500
    for split in ("train", "validation"):
        output = run(tmp_path, 0, "-m", "hpctrain", "data", "info", f"out/{split}", code=65)
        assert "still being written" in output
    # Half a shard, as a rank leaves that is killed while it writes.
    (tmp_path / "out" / "train" / ".shard-000399.h5.1").write_bytes(b"half")

    output = run(tmp_path, 2, *pack, "out")
    assert f"({len(kept)} of them were there)" in output
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")
    assert kept.items() <= shards_of(tmp_path / "out").items()
    assert "packed already" in run(tmp_path, 3, *pack, "out")
    assert "there is a dataset" in run(tmp_path, 0, *pack, "out", "--shuffle", code=65)


def test_sources_of_other_tools_survive_a_killed_rank(tmp_path: Path) -> None:
    """Two ranks, one of them killed; three go on; the bytes are those of one process alone."""
    import pandas as pd
    import zarr
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    zarr.create_array(
        tmp_path / "x.zarr", data=np.arange(90_000).reshape(900, 100), chunks=(7, 100)
    )
    words = pd.DataFrame({"text": [f"{n} {n * n}" for n in range(40_000)], "n": range(40_000)})
    words.to_parquet(tmp_path / "words.parquet", row_group_size=1000)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet))
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    for number, (source, there) in enumerate(
        [
            (("x=x.zarr", "--shard-rows", "1"), "out-0/shard-*.h5"),
            (("words.parquet", "--tokenizer", "tokenizer.json"), ".out-1-tokens/*.npy"),
        ]
    ):
        pack = ("-m", "hpctrain", "data", "pack", *source, "--shuffle")
        run(tmp_path, 0, *pack, f"alone-{number}")
        kill_one_rank(tmp_path, there, *pack, f"out-{number}")
        run(tmp_path, 3, *pack, f"out-{number}")
        assert files_of(tmp_path / f"out-{number}") == files_of(tmp_path / f"alone-{number}")
    assert not list(tmp_path.glob(".out*"))


def kill_one_rank(folder: Path, there: str, *arguments: str) -> None:
    """Begin on two ranks, and kill one as soon as some files are there."""
    with subprocess.Popen(
        command(2, *arguments), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as job:
        wait_for(lambda: len(list(folder.glob(there))) >= 4 or job.poll() is not None)
        assert job.poll() is None
        ranks = [
            process
            for process in psutil.Process(job.pid).children(recursive=True)
            if "hpctrain" in process.cmdline() and "mpirun" not in process.name()
        ]
        os.kill(ranks[1].pid, signal.SIGKILL)
        job.communicate(timeout=JOB_SECONDS)
        psutil.wait_procs(ranks, timeout=JOB_SECONDS)
    assert job.returncode != 0


def test_mistakes_of_all_ranks_are_told_once(tmp_path: Path) -> None:
    np.save(tmp_path / "large.npy", np.arange(1000, 1009))
    large = ("pack", "large.npy", "large", "--shard-rows", "2", "--dtype", "large=int8")
    for arguments, code, words in (
        (large, 65, 'large.npy: field "large", row 0: 1000 does not fit int8'),
        (("pack", "nothing.npy", "out"), 65, "nothing.npy: no file has such a name"),
        (("pack", "out", "--filter", "zip"), 64, "zip: no such filter"),
        (("verify", "nothing/*.h5"), 65, "nothing/*.h5: no file has such a name"),
        (("pack", "--help"), 0, "folder of images"),
    ):
        output = run(tmp_path, 2, "-m", "hpctrain", "data", *arguments, code=code)
        assert " ".join(output.split()).count(words) == 1, output
