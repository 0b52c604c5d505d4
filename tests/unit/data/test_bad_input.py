"""Bad input, all kinds of it: exit code 65, and file, field and row by name."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.loaders import train_loader

from hpctrain.config.schema_data import DataSection
from hpctrain.convert.verify import verify
from hpctrain.data import Writer
from hpctrain.data.files.discovery import verify_share
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.order.order import Order
from hpctrain.data.reading import retry
from hpctrain.data.reading.rows import open_rows
from hpctrain.errors import DatasetError, ExitCode

ROWS = 40
VALUES = {
    "image": np.arange(ROWS * 6, dtype=np.float32).reshape(ROWS, 2, 3),
    "label": np.arange(ROWS, dtype=np.int64),
}
SHARD = "shard-000001.h5"  # rows 10 to 19


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up the privileges of root, whom no permission stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Shards of ten rows, where another user could read them too."""
    parent = Path(tempfile.mkdtemp())
    parent.chmod(0o755)
    with Writer(parent / "data", shard_rows=10) as writer:
        writer.extend(VALUES)
    yield parent / "data"
    shutil.rmtree(parent)


def train(folder: Path, **changes: object) -> None:
    """Open and read all, as an epoch of one rank does."""
    section = DataSection(train=str(folder), global_batch_size=8, read_retries=0, verify="start")
    fields = list(changes.pop("fields", ["image", "label"]))  # type: ignore[call-overload]
    dataset, _ = open_datasets(section, fields)
    if not changes.pop("trusting", False):
        verify_share([dataset], 0, 1)
    loader = train_loader(
        dataset,
        Order.for_dataset(dataset, seed=0, global_batch_size=8, lanes=2),
        fields=fields,
        global_batch_size=int(str(changes.pop("global_batch_size", 8))),
        buffer_mb=10.0,
        read_retries=0,
    )
    try:
        for _ in loader.epoch(0):
            pass
    finally:
        loader.close()


def rewritten(folder: Path, **arrays: np.ndarray) -> None:
    """Replace one shard by plain HDF5, and let the index go."""
    with h5py.File(folder / SHARD, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    (folder / "index.json").unlink(missing_ok=True)


def cut(folder: Path, *, size: int) -> None:
    os.truncate(folder / SHARD, size)


def flip(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[-9] ^= 4
    (folder / SHARD).write_bytes(content)


def same_size(folder: Path) -> None:
    """Cut the values off and pad with what is no HDF5: only the index knows better."""
    size = (folder / SHARD).stat().st_size
    (folder / SHARD).write_bytes(b"x" * size)


def without_index(folder: Path, change: Callable[[Path], object]) -> None:
    change(folder)
    (folder / "index.json").unlink()


def grow(folder: Path) -> None:
    with h5py.File(folder / SHARD, "r+") as file:
        file["more"] = np.zeros(3000)


def no_filter(folder: Path) -> None:
    """Chunks that claim a filter which nobody has: registered to no one."""
    with h5py.File(folder / SHARD, "w") as file:
        file["label"] = VALUES["label"][:10]
        create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        create.set_chunk((5, 2, 3))
        create.set_filter(32_768 - 7, h5py.h5z.FLAG_OPTIONAL, (1,))
        space = h5py.h5s.create_simple((10, 2, 3))
        h5py.h5d.create(file.id, b"image", h5py.h5t.IEEE_F32LE, space, create)
    (folder / "index.json").unlink()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def forbid(folder: Path) -> None:
    os.chmod(folder / SHARD, 0)  # noqa: PTH101 - as the shell does


PLAIN = {name: values[:10] for name, values in VALUES.items()}
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: cut(f, size=2000), rf"{SHARD}: 2000 bytes, where .*truncated"),
    "truncated, no index": (
        lambda f: without_index(f, lambda f: cut(f, size=1000)),
        rf"{SHARD}: HDF5 cannot read this file: .*truncated",
    ),
    "a byte flipped": (flip, rf"{SHARD}: its checksum is not that of the index"),
    "other bytes": (same_size, rf"{SHARD}: its checksum is not that of the index"),
    "no HDF5, no index": (
        lambda f: without_index(f, same_size),
        rf"{SHARD}: HDF5 cannot read this file",
    ),
    "missing shard": (lambda f: (f / SHARD).unlink(), rf"{SHARD}: this shard is missing"),
    "extra shard": (
        lambda f: shutil.copy(f / SHARD, f / "copy.h5"),
        r"index\.json does not list copy\.h5",
    ),
    "other shape": (
        lambda f: rewritten(f, **(PLAIN | {"image": np.zeros((10, 3, 2), "f4")})),
        rf'{SHARD}: field "image" is float32 of shape \(3, 2\), but float32 of shape \(2, 3\)',
    ),
    "other dtype": (
        lambda f: rewritten(f, **(PLAIN | {"label": np.zeros(10)})),
        rf'{SHARD}: field "label" is float64 .*, but int64 ',
    ),
    "no such field": (
        lambda f: rewritten(f, image=PLAIN["image"], labels=PLAIN["label"]),
        rf'{SHARD}: there is no field "label"\. Did you mean "labels"\?',
    ),
    "zero rows": (
        lambda f: rewritten(f, **(PLAIN | {"image": np.zeros((0, 2, 3), "f4")})),
        rf'{SHARD}: field "image" has no rows',
    ),
    "fewer labels": (
        lambda f: rewritten(f, image=PLAIN["image"], label=PLAIN["label"][:9]),
        rf"{SHARD}: the fields have different numbers of rows: image 10, label 9",
    ),
    "no filter": (no_filter, rf'{SHARD}: field "/image" .* filter 32761 .*pip install'),
    "no permission": (forbid, rf"{SHARD}: Permission denied"),
    "no permission, no index": (
        lambda f: without_index(f, forbid),
        rf"{SHARD}: HDF5 cannot read this file: .*Permission denied",
    ),
    "empty directory": (empty, r"there are no HDF5 files in this folder"),
    "index older than files": (grow, rf"{SHARD}: \d+ bytes, .* the index is older than the file"),
    "index of nothing": (
        lambda f: (f / "index.json").write_text("{}"),
        r"index\.json: version is missing",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(folder: Path, case: str) -> None:
    damage, message = CASES[case]
    train(folder)  # whole, it trains
    damage(folder)
    with as_nobody(), pytest.raises(DatasetError, match=message) as caught:
        train(folder, trusting=not (folder / "index.json").exists())
    assert caught.value.exit_code == ExitCode.DATA
    assert str(folder) in str(caught.value)


def test_a_field_that_the_task_misspells(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r'no field "labels"\. Did you mean "label"\?'):
        train(folder, fields=["image", "labels"])


def test_a_batch_larger_than_the_dataset(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"global_batch_size = 41, but .* only 40 samples"):
        train(folder, global_batch_size=41)


def test_nan_is_found_by_verify(folder: Path) -> None:
    bad = PLAIN["image"].copy()
    bad[7, 1, 2] = np.nan
    rewritten(folder, **(PLAIN | {"image": bad}))
    found = verify(str(folder), jobs=1).problems
    assert [re.sub(r".*/", "", problem) for problem in found] == [
        f'{SHARD}: field "image", row 7: NaN'
    ]


class Failing:
    """A reader of a file that fails so many times before it is itself again."""

    def __init__(self, folder: Path, fail: int) -> None:
        self.dataset, _ = open_datasets(
            DataSection(train=str(folder), global_batch_size=8), ["label"]
        )
        self.inner = open_rows(self.dataset, retries=0)
        self.left = fail
        self.away = folder / "away"
        self.path = folder / SHARD

    files_opened = 0

    def read_runs(self, *arguments: object) -> None:
        """Take the file away while it is to fail: the error is the system's own."""
        if self.left:
            self.left -= 1
            self.path.rename(self.away)
        try:
            self.inner.read_runs(*arguments)  # type: ignore[arg-type]
        finally:
            if self.away.exists():
                self.away.rename(self.path)

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize(("fail", "retries"), [(0, 0), (2, 2), (3, 3), (1, 0), (3, 2)])
def test_reads_are_tried_again(
    folder: Path,
    fail: int,
    retries: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.001)
    failing = Failing(folder, fail)
    reader = retry.Retrying(failing, retries)  # type: ignore[arg-type]
    out = np.zeros((10, 8), np.uint8)
    arguments = ("label", np.array([10]), np.array([10]), out, np.array([0]))
    if fail > retries:
        with pytest.raises(DatasetError, match=rf'{SHARD}: field "label", row 0: No such file'):
            reader.read_runs(*arguments)
    else:
        reader.read_runs(*arguments)
        assert (out.view(np.int64)[:, 0] == np.arange(10, 20)).all()
    assert len(caplog.records) == min(fail, retries)
    reader.close()
    failing.close()


def replace(path: Path) -> None:
    """As editors and rsync do it: a new file under the old name, of the same size."""
    other = path.with_suffix(".new")
    shutil.copy(path, other)
    other.replace(path)


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace, "was replaced by another"),
        (write_in_place, "was written to"),
        (lambda path: os.truncate(path, 2000), r"was truncated from \d+ to 2000 bytes"),
        (Path.unlink, "went away"),
    ],
)
def test_files_that_change_meanwhile_are_noticed(
    folder: Path, change: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "CHECK_SECONDS", 0.0)
    dataset, _ = open_datasets(DataSection(train=str(folder), global_batch_size=8), ["label"])
    reader = open_rows(dataset)
    out = np.zeros((10, 8), np.uint8)

    def read(row: int) -> None:
        reader.read_runs("label", np.array([row]), np.array([10]), out, np.array([0]))

    read(10)
    read(0)
    change(folder / SHARD)
    with pytest.raises(DatasetError, match=rf"{SHARD}: this file {message} while the run reads it"):
        read(20)  # in another file: the one that changed is looked at nevertheless
    reader.close()


def test_an_equal_copy_is_no_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same size and time: restored by rsync, or on a file system without true inodes."""
    monkeypatch.setattr(retry, "CHECK_SECONDS", 0.0)
    dataset, _ = open_datasets(DataSection(train=str(folder), global_batch_size=8), ["label"])
    reader = open_rows(dataset)
    out = np.zeros((ROWS, 8), np.uint8)
    for _ in range(2):
        reader.read_runs("label", np.array([0]), np.array([ROWS]), out, np.array([0]))
        other = folder / "other"
        shutil.copy2(folder / SHARD, other)
        other.replace(folder / SHARD)
    reader.close()


def test_looking_is_cheap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few files each time, in turn; and none before it is time."""
    dataset, _ = open_datasets(DataSection(train=str(folder), global_batch_size=8), ["label"])
    reader = open_rows(dataset)
    looked: list[str] = []
    identify = retry._identify
    monkeypatch.setattr(retry, "_identify", lambda path: looked.append(path) or identify(path))
    out = np.zeros((ROWS, 8), np.uint8)
    whole = (np.array([0]), np.array([ROWS]), out, np.array([0]))
    for _ in range(3):
        reader.read_runs("label", *whole)
    assert sorted(Path(path).name for path in looked) == [shard.name for shard in dataset.shards]
    monkeypatch.setattr(retry, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(retry, "MOST_CHECKED", 3)
    reader._watch._next = 0.0  # type: ignore[attr-defined]
    looked.clear()
    for _ in range(3):
        reader.read_runs("label", *whole)
    assert len(looked) == 3 + 1 + 3
    reader.close()


def test_the_source_of_a_virtual_dataset_that_goes_away(folder: Path) -> None:
    """HDF5 would go on with fill values, and training with them."""
    master = folder.parent / "master.h5"
    layout = h5py.VirtualLayout((10,), "i8")
    layout[:] = h5py.VirtualSource(str(folder / SHARD), "label", (10,))
    with h5py.File(master, "w") as file:
        file.create_virtual_dataset("x", layout)
    dataset, _ = open_datasets(DataSection(train=str(master), global_batch_size=8), ["x"])
    reader = open_rows(dataset)
    out = np.zeros((10, 8), np.uint8)
    whole = ("x", np.array([0]), np.array([10]), out, np.array([0]))
    reader.read_runs(*whole)
    assert (out.view(np.int64)[:, 0] == np.arange(10, 20)).all()
    reader.close()
    (folder / SHARD).unlink()
    with pytest.raises(DatasetError, match=rf"master\.h5: its values come from .*{SHARD}"):
        open_rows(dataset).read_runs(*whole)
